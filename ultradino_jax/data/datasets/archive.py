"""Files of a downloaded data set: a folder, a zip or a tar, and the tables in them."""

import csv
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ultradino_jax.errors import UserError, as_user_error

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
        names = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return Files(visible(names), lambda name: (path / name).read_bytes())
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = (i.filename for i in archive.infolist() if not i.is_dir())
        return Files(visible(names), archive.read)
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as tar:
            content = {
                member.name: file.read()
                for member in tar
                if member.isfile() and (file := tar.extractfile(member))
            }
        return Files(visible(content), content.__getitem__)
    raise UserError(f"{str(path)!r} is neither a folder nor a zip or tar archive")


def visible(names: Iterable[str]) -> tuple[str, ...]:
    """Sorted, without the shadow files that macOS adds to archives."""
    return tuple(
        sorted(
            name
            for name in names
            if not any(p.startswith((".", "__MACOSX")) for p in name.split("/"))
        )
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


def read_table(data: bytes, columns: Iterable[str], where: str) -> list[dict[str, str]]:
    """Rows of a csv with ',' or ';', blanks around headers and values removed.

    Raises UserError naming the columns that are missing and those that are there, and
    for a file that is no UTF-8 text or no csv.
    """
    with as_user_error(f"{where}: not a csv in UTF-8: "):
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds a NUL byte")
    header = text.split("\n", 1)[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","
    lines = csv.reader(io.StringIO(text), delimiter=delimiter)
    lined = lines_of(lines, where)
    names = [name.strip() for name in next(lined, [])]
    missing = [name for name in columns if name not in names]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, names))}"
        )
    rows = []
    for line in lined:
        if not any(value.strip() for value in line):
            continue
        if len(line) != len(names):
            raise UserError(
                f"{where}, line {lines.line_num}: {len(line)} values for "
                f"{len(names)} columns"
            )
        rows.append({k: v.strip() for k, v in zip(names, line, strict=True)})
    if not rows:
        raise UserError(f"{where}: there is no row below the header")
    return rows


def lines_of(lines, where: str) -> Iterator[list[str]]:
    """The lines of a csv.reader; its errors as UserError with file and line."""
    try:
        yield from lines
    except csv.Error as error:
        raise UserError(f"{where}, line {lines.line_num}: {error}") from error


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


def decode_grey(data: bytes) -> np.ndarray:
    """Image file -> uint8 [H,W], Pillow's convert("L"): alpha is ignored."""
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("transparency", None)
        return np.asarray(image.convert("L"))
