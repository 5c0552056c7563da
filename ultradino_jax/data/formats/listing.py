"""Which files of a folder are pictures, and why each of the others is not."""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ultradino_jax.data.formats.archives import KINDS as ARCHIVES
from ultradino_jax.data.formats.readers import HEAD, count_frames, kind_of
from ultradino_jax.data.formats.walk import walk
from ultradino_jax.progress import Progress
from ultradino_jax.whole import write_whole

# Taken for pictures by name: millions of files need not be opened to be listed. What
# such a file holds is found out when it is read.
_ONE_FRAME = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib")
_PAGES = (".apng", ".tif", ".tiff", ".gif", ".webp", ".pbm", ".pgm", ".ppm", ".pnm")
_MEDICAL = (".npy", ".mha", ".mhd", ".nii", ".nii.gz", ".dcm", ".dicom")
SUFFIXES = frozenset((*_ONE_FRAME, *_PAGES, *_MEDICAL))
_SYSTEM = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx")


class Listing(NamedTuple):
    """The files below a folder.

    names: of pictures, relative to it, with forward slashes, sorted. ignored: (name,
    key of REASONS) of every other file, and of folders that are not entered. more: how
    many pictures have further frames, and how many frames these are.
    """

    names: list[str]
    ignored: list[tuple[str, str]]
    more: tuple[int, int] = (0, 0)

    def __bool__(self) -> bool:
        """Whether there is anything that is not read."""
        return bool(self.ignored) or self.more[0] > 0

    def __str__(self) -> str:
        """'4 of 36 files read; 30 .webp unsupported, 2 junk'."""
        total = len(self.names) + len(self.ignored)
        counts = Counter(map(_said, self.ignored))
        order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        said = [f"{n} {what}" for what, n in order[:_KINDS_SAID]]
        if others := sum(n for _, n in order[_KINDS_SAID:]):
            said.append(f"{others} others")
        reasons = f"; {', '.join(said)}" if said else ""
        files, frames = self.more
        if files:
            reasons += (
                f"; the first frame or page of {files}, prepare reads {frames} more"
            )
        return f"{len(self.names)} of {total} files read{reasons}"

    def write(self, path: str | Path) -> None:
        """Every ignored file and why, as csv: reason, file."""
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(("reason", "file"))
        rows.writerows((reason, name) for name, reason in self.ignored)
        write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))

    def tell(self, place: object, say: Callable[[str], object]) -> None:
        """Say how many files are read when there are others."""
        if self:
            say(f"{place}: {self}")


_KINDS_SAID = 8  # more kinds of ignored files are summed up


def _said(ignored: tuple[str, str]) -> str:
    name, reason = ignored
    if reason == "unsupported":
        return f"{suffix(name) or 'without suffix'} unsupported"
    return reason.replace("_", " ")


def list_pictures(folder: str | os.PathLike) -> Listing:
    """All files below a folder, pictures apart from the rest.

    Links are followed, each real folder once. Hidden files and folders and those of
    operating systems are junk. A suffix of SUFFIXES makes a picture, whatever its case;
    any other file is one when its first bytes say so. Raises PermissionError when the
    folder itself cannot be listed.
    """
    names, ignored = [], []
    for entry in walk([os.fspath(folder)], lambda name: not is_junk(name)):
        if not entry.name:
            raise PermissionError(f"{os.fspath(folder)!r} cannot be listed")
        base = entry.name.rpartition("/")[2]
        known = suffix(base) in SUFFIXES
        if entry.reason == "junk" or is_junk(base):
            reason = "junk"
        elif entry.reason and not (known and entry.reason == "not_a_file"):
            reason = entry.reason
        else:  # a picture's broken link is a picture that cannot be read
            reason = "" if known else _sniff(entry.path)
        if reason:
            ignored.append((entry.name, reason))
        else:
            names.append(entry.name)
    known_names = set(names)
    ignored = [x for x in ignored if not _is_detached(x[0], known_names)]
    return Listing(sorted(names), ignored, _more_frames(folder, names))


def _more_frames(folder: str | os.PathLike, names: list[str]) -> tuple[int, int]:
    names = [name for name in names if suffix(name) not in _ONE_FRAME]
    progress = Progress("counting frames", len(names), unit="files")
    found = []
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(count_frames, (os.path.join(folder, n) for n in names))
        for done, count in enumerate(counts, 1):
            progress.update(done)
            if count > 1:
                found.append(count - 1)
    progress.close()
    return len(found), sum(found)


def _sniff(path: str) -> str:
    """Why a file of no known suffix is no picture; "" when it is one."""
    try:
        with open(path, "rb") as file:
            kind = kind_of(file.read(HEAD))
    except PermissionError:
        return "no_permission"
    except OSError:
        return "unreadable"
    if kind in ARCHIVES:
        return "archive"
    return {"video": "video", "": "unsupported"}.get(kind, "")


def _is_detached(name: str, pictures: Iterable[str]) -> bool:
    """Whether it holds the pixels of a header file beside it, which is the picture."""
    return suffix(name) in (".raw", ".zraw") and f"{stem(name)}.mhd" in pictures


def suffix(name: str) -> str:
    """Lower-case suffix of a file name; '.nii.gz' is one."""
    lower = name.lower()
    return ".nii.gz" if lower.endswith(".nii.gz") else os.path.splitext(lower)[1]


def stem(name: str) -> str:
    """Name without its suffix, folders kept."""
    return name[: len(name) - len(suffix(name))]


def is_junk(name: str) -> bool:
    """Whether a file or folder is the operating system's, or hidden (a leading dot)."""
    hidden = name.startswith(".") and name not in (".", "..")
    return hidden or name.lower() in _SYSTEM
