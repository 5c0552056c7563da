"""Members of zip and tar archives, one after the other, without unpacking to disk."""

import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

from ultradino_jax.data.formats.frames import MAX_BYTES
from ultradino_jax.data.formats.unreadable import Unreadable

KINDS = ("zip", "tar", "gzip", "xz", "bzip2")
# A compressed tar has no random access: few large parts, not many small ones.
PART = {"zip": 32, "tar": 32}
PART_STREAM = 512


def _is_unsafe(name: str) -> bool:
    name = name.replace("\\", "/")
    return name.startswith("/") or ".." in PurePosixPath(name).parts or ":" in name[:3]


def _tar_members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := file.next()) is not None:
        # tarfile remembers every member it has passed; millions would fill the memory.
        # Its stub leaves the list out.
        file.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if not info.isdir():
            yield info


def _members(
    file: zipfile.ZipFile | tarfile.TarFile,
) -> Iterator[tuple[str, zipfile.ZipInfo | tarfile.TarInfo]]:
    """(name, entry) of what is not a directory."""
    if isinstance(file, zipfile.ZipFile):
        yield from ((i.filename, i) for i in file.infolist() if not i.is_dir())
    else:
        yield from ((i.name, i) for i in _tar_members(file))


def _open_tar(path: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.ReadError:
        raise Unreadable("unsupported", "compressed, but not a tar") from None


def count_members(path: str, kind: str, beat) -> tuple[int, bool]:
    """(members that are not directories, whether the archive is damaged after them).

    Calls beat(position) at each member. Raises Unreadable.
    """
    if kind == "zip":
        try:
            with zipfile.ZipFile(path) as file:
                return sum(not info.is_dir() for info in file.infolist()), False
        except zipfile.BadZipFile:
            raise Unreadable("unreadable", "damaged archive") from None
    count = 0
    try:
        with _open_tar(path) as file:
            for _ in _tar_members(file):
                beat(count)
                count += 1
            return count, kind == "tar" and not _ends_well(file, path)
    except Unreadable:
        raise
    except Exception:
        return count, True


def _ends_well(file: tarfile.TarFile, path: str) -> bool:
    # tarfile takes a damaged header for the end of the archive; the end is zeros.
    with open(path, "rb") as raw:
        raw.seek(file.offset)
        return not any(raw.read(512))


def read_members(
    path: str, kind: str, start: int, stop: int, beat
) -> Iterator[tuple[int, str, bytes | Unreadable]]:
    """(position, name, contents or what is wrong) of the members start..stop-1.

    Contents are at most MAX_BYTES whatever the archive claims. A member whose path
    would leave the archive, and any link, is refused. Calls beat(position) before each.
    """
    with zipfile.ZipFile(path) if kind == "zip" else _open_tar(path) as file:
        for position, (name, info) in enumerate(_members(file)):
            if position >= stop:
                return
            beat(position)
            if position < start:
                continue
            try:
                yield position, name, _read(file, info, name)
            except Unreadable as error:
                yield position, name, error


def _read(file, info, name: str) -> bytes:
    if _is_unsafe(name):
        raise Unreadable("unsafe_member")
    zipped = isinstance(info, zipfile.ZipInfo)
    size = info.file_size if zipped else info.size
    link = (info.external_attr >> 28) == 0xA if zipped else not info.isreg()
    if link:
        raise Unreadable("unsafe_member", "link")
    if zipped and info.flag_bits & 0x1:
        raise Unreadable("encrypted")
    if size > MAX_BYTES:
        raise Unreadable("too_large")
    try:
        with file.open(info) if zipped else file.extractfile(info) as member:
            data = member.read(size + 1)
    except NotImplementedError:
        raise Unreadable("unsupported", "zip compression") from None
    except Exception as error:
        raise Unreadable("unreadable", type(error).__name__) from None
    if len(data) != size:
        raise Unreadable("unreadable", "truncated")
    return data


def member_names(path: str, kind: str) -> Iterator[str]:
    """Names of the members that `read_members` numbers, in its order."""
    with zipfile.ZipFile(path) if kind == "zip" else _open_tar(path) as file:
        yield from (name for name, _ in _members(file))
