"""Where pretraining images come from: a folder, a list of paths, a prepared cache.

A source is random access: `len(source)`, `source[i]` -> uint8 [H, W, C] (read-only, any
H and W of at least MIN_SIDE pixels), `record_id(i)` -> str, `digest()` -> str. Reading
raises `BadImage` when a record exists but cannot be used; the pipeline replaces it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ultradino_jax.data.cache import FORMAT, VERSION, Shards, record_name
from ultradino_jax.data.formats.listing import list_pictures
from ultradino_jax.data.formats.readers import read_picture
from ultradino_jax.data.formats.tables import names_in_list
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.whole import read_json

MIN_SIDE = 16
IGNORED = "ignored_files.csv"  # beside what is made of a folder


class BadImage(UserError):
    """An image that cannot be used; `reason` says why, `record` names the image."""

    def __init__(self, reason: str, record: str = ""):
        super().__init__(reason, record)  # both, so that it survives pickling
        self.reason = reason
        self.record = record

    def __str__(self) -> str:
        return f"{self.record}: {self.reason}" if self.record else self.reason


def read_image(path: str | os.PathLike, channels: int = 1) -> np.ndarray:
    """Decodes the first frame of a picture file completely, as `formats` does.

    channels=1 gives luma of ITU-R 601 (Pillow's `convert("L")`), which is what the
    reference feeds its FUS augmentation; channels=3 replicates a grey file.

    Returns:
      uint8 [H, W, C], read-only.

    Raises:
      BadImage: missing, truncated or undecodable, or with a side below MIN_SIDE pixels.
    """
    name = os.fspath(path)
    try:
        pixels, _ = read_picture(path, channels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them
        text = str(error)
        if not isinstance(error, UserError):
            text = f"{type(error).__name__}: {error}"
        raise BadImage(text, name) from error
    if min(pixels.shape[:2]) < MIN_SIDE:
        height, width = pixels.shape[:2]
        raise BadImage(f"{width}x{height} pixels, a side below {MIN_SIDE}", name)
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    pixels.flags.writeable = False
    return pixels


class _FileSource:
    """Image files under `root`; subclasses differ in how they find the names."""

    def __init__(self, root: Path, names: Iterable[str], channels: int):
        check_channels(channels)
        self.root = root
        self.channels = channels
        # Millions of paths travel to every spawned worker: one buffer and an offset
        # table are a third of the size of a list of str and pickle at memcpy speed.
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._buffer = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def record_id(self, index: int) -> str:
        """The file's path relative to the root, with forward slashes."""
        check_index(index, len(self))
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._buffer[start : self._ends[index]])

    def __getitem__(self, index: int) -> np.ndarray:
        name = self.record_id(index)
        try:
            return read_image(self.root / name, self.channels)
        except BadImage as error:
            raise BadImage(error.reason, name) from error

    def digest(self) -> str:
        """sha256 over the record ids in order: equal digests mean equal streams."""
        return digest_of(self.record_id(i) for i in range(len(self)))


class FolderSource(_FileSource):
    """Every picture below a folder, sorted by relative path.

    `listing` says which files are taken for pictures, and which are not and why.

    Raises:
      FileNotFoundError: `root` is not a folder.
      UserError: there is no picture below it, or `channels` is not 1 or 3.
    """

    def __init__(self, root: str | os.PathLike, channels: int = 1):
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"image folder {str(root)!r} does not exist")
        self.listing = list_pictures(folder)
        if not self.listing.names:
            raise UserError(f"no picture in folder {str(root)!r}: {self.listing}")
        super().__init__(folder, self.listing.names, channels)


class ListSource(_FileSource):
    """The images named by a text file: one relative path per line, no header.

    This is the format of the reference's `train_paths_13m.csv`; a csv with a column
    `path` is one, too. Paths are relative to `root`, by default the folder of the list.
    Empty lines are ignored. Files are not looked for until they are read, so a missing
    one is a BadImage of that record.

    Raises:
      FileNotFoundError: `list_file` does not exist.
      UserError: it names no image, or `channels` is not 1 or 3.
    """

    def __init__(
        self,
        list_file: str | os.PathLike,
        root: str | os.PathLike | None = None,
        channels: int = 1,
    ):
        path = Path(list_file)
        if not path.is_file():
            raise FileNotFoundError(f"image list {str(list_file)!r} does not exist")
        folder = path.parent if root is None else Path(root)
        names = names_in_list(path.read_bytes(), folder, str(path))
        if not names:
            raise UserError(f"image list {str(list_file)!r} names no image")
        super().__init__(folder, names, channels)


def open_source(
    root: str | os.PathLike,
    *,
    list_file: str | os.PathLike | None = None,
    channels: int = 1,
):
    """Opens the source that a folder is.

    With `list_file`, the images it names relative to `root`, the list itself being
    looked up in `root` first; a folder whose manifest.json has the format
    "ultradino_cache" is a prepared cache; any other folder is searched for images.

    Raises:
      FileNotFoundError: the folder or the list does not exist.
      UserError: no image there, an unreadable manifest, or a bad argument.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"image folder {str(root)!r} does not exist")
    if list_file is not None:
        inside = folder / list_file
        chosen = inside if inside.is_file() else Path(list_file)
        return ListSource(chosen, folder, channels)
    if _is_cache(folder / "manifest.json"):
        return CacheSource(root, channels)
    return FolderSource(root, channels)


def report_ignored(source, say: Callable[[str], object], file: str | Path) -> None:
    """Say which files of a folder are not read and why, and list them in `file`, a csv.

    Nothing is said or written where every file is read.
    """
    listing = source.listing if isinstance(source, FolderSource) else None
    if not listing:
        return
    if listing.ignored:
        listing.write(file)
    say(f"{listing}; listed in {file}" if listing.ignored else str(listing))


def _is_cache(manifest: Path) -> bool:
    if not manifest.is_file():
        return False
    return read_json(manifest).get("format") == FORMAT


def digest_of(ids: Iterable[str]) -> str:
    """sha256 over record ids in their order."""
    sha = hashlib.sha256()
    for record_id in ids:
        sha.update(os.fsencode(record_id) + b"\0")
    return sha.hexdigest()


def check_channels(channels: int) -> None:
    """Raises UserError unless it is 1 or 3."""
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 or 3, got {channels}")


def check_index(index: int, length: int) -> None:
    """Raises IndexError outside of 0 .. length-1."""
    if not 0 <= index < length:
        raise IndexError(f"record {index} of a source of {length}")


class CacheSource:
    """A finished cache as a source: `source[i]` -> uint8 [H,W,C].

    root: the cache's directory. channels: 1, or 3 equal ones.
    Picklable. Raises UserError when the cache is not finished or a shard is missing or
    of another length; reading a damaged record raises BadImage.
    """

    def __init__(self, root: str | os.PathLike, channels: int = 1):
        check_channels(channels)
        root = Path(root)
        path = root / "manifest.json"
        if not path.is_file():
            raise UserError(f"{root}: no manifest.json: run prepare again")
        self.manifest = read_json(path)
        found = (self.manifest.get("format"), self.manifest.get("version"))
        if found != (FORMAT, VERSION):
            raise UserError(f"{path}: not a version {VERSION} cache of prepare")
        with damaged(path):
            self._shards = Shards(root, self.manifest["shards"])
            for name in ("mean", "std"):
                (value,) = self.manifest[name]
                self.manifest[name] = [float(value)]
        if not len(self._shards):
            raise UserError(f"{path}: the cache holds no picture")
        self._root, self._channels = root, channels
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"CacheSource({str(self._root)!r}, channels={self._channels})"

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            pixels = self._shards.pixels(index)
        except ValueError as error:
            raise BadImage(str(error), self.record_id(index)) from None
        if self._channels == 1:
            return pixels[:, :, None]
        return np.repeat(pixels[:, :, None], self._channels, axis=2)

    def record_id(self, position: int) -> str:
        """Keyed-hash name of a record; says nothing without the key."""
        return record_name(self._shards.entry(position))

    def group_id(self, position: int) -> str:
        """Keyed hash of the record's patient (or folder): split on this."""
        return self._shards.entry(position)["patient"].tobytes().hex()

    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every shard."""
        return self._digest
