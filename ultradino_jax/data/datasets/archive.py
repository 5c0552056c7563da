"""Files of a downloaded data set: a folder, a zip or a tar, and the tables in them."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ultradino_jax.data.formats.listing import is_junk
from ultradino_jax.data.formats.readers import read_picture
from ultradino_jax.data.formats.walk import walk
from ultradino_jax.errors import UserError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz")


@dataclass(frozen=True)
class Files:
    """Names (relative, forward slashes) and how to read one."""

    names: tuple[str, ...]
    read: Callable[[str], bytes]


def open_files(path: str | os.PathLike) -> Files:
    """The files below a folder or inside an archive.

    A tar has no index, so its content is held in memory: for small sets only.
    Raises FileNotFoundError or UserError naming the path.
    """
    path = Path(path)
    if path.is_dir():
        names = visible(_below(path))
        return Files(names, lambda name: (path / name).read_bytes())
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if zipfile.is_zipfile(path):
        return open_zip(zipfile.ZipFile(path))
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            content = {
                member.name: file.read()
                for member in tar
                if member.isfile() and (file := tar.extractfile(member))
            }
        return Files(visible(content), content.__getitem__)
    raise UserError(f"{str(path)!r} is neither a folder nor a zip or tar archive")


def _below(folder: Path) -> Iterator[str]:
    for entry in walk([os.fspath(folder)], lambda name: not is_junk(name)):
        if entry.reason == "no_permission":  # half a data set would be a wrong one
            raise UserError(f"{entry.path!r} cannot be read: no permission")
        if not entry.reason:
            yield entry.name


def open_zip(archive: zipfile.ZipFile) -> Files:
    """The files in a zip, by names with forward slashes whatever system made it."""
    names = {
        info.filename.replace("\\", "/"): info.filename
        for info in archive.infolist()
        if not info.is_dir() and not info.filename.endswith("\\")
    }
    return Files(visible(names), lambda name: archive.read(names[name]))


def visible(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted, without hidden files and those that operating systems add."""
    return tuple(
        sorted(name for name in names if not any(map(is_junk, name.split("/"))))
    )


def find_table(path: str | os.PathLike, table: str) -> tuple[Files, str]:
    """Files and the name in them of the csv `table`.

    It is looked for in `path` (folder or archive), in any folder below, then in the
    archives that lie in `path`; the shortest name wins.
    Raises FileNotFoundError saying where was looked.
    """
    path = Path(path)
    places = [path]
    if path.is_dir():
        places += sorted(p for p in path.iterdir() if p.name.endswith(ARCHIVES))
    for place in places:
        files = open_files(place)
        found = [n for n in files.names if PurePosixPath(n).name == table]
        if found:
            return files, min(found, key=lambda n: (n.count("/"), n))
    raise FileNotFoundError(
        f"no {table} in {str(path)!r}, in the folders below it or in an archive there"
    )


def match_images(
    files: Files, folder: str, wanted: Iterable[str], where: str
) -> dict[str, str]:
    """{image name without suffix: file name} for PNGs anywhere below `folder`.

    Raises UserError naming images that are missing or whose name occurs twice.
    """
    prefix = f"{folder}/" if folder not in ("", ".") else ""
    found: dict[str, str] = {}
    twice = set()
    for name in files.names:
        if name.startswith(prefix) and name.lower().endswith(".png"):
            stem = PurePosixPath(name).stem
            if stem in found:
                twice.add(stem)
            found[stem] = name
    wanted = list(wanted)
    missing = [stem for stem in wanted if stem not in found]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(wanted)} images have no PNG file, first "
            f"{missing[0]!r}"
        )
    ambiguous = [stem for stem in wanted if stem in twice]
    if ambiguous:
        raise UserError(f"{where}: two files are called {ambiguous[0]!r}")
    return {stem: found[stem] for stem in wanted}


def decode_grey(source: bytes | os.PathLike, where: str = "") -> np.ndarray:
    """A picture's content or path -> uint8 [H,W], as `formats` reads it.

    Raises UserError naming `where`, by default the path.
    """
    where = where or ("image" if isinstance(source, bytes) else os.fspath(source))
    try:
        return read_picture(source, channels=1)[0]
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like
        what = error if isinstance(error, UserError) else type(error).__name__
        raise UserError(f"{where} cannot be read: {what}") from None
