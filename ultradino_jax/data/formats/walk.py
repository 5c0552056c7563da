"""Every file below some folders, in a defined order, and what cannot be listed."""

import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    """One file. root: number of its input; name: path below that input, with slashes.

    reason: why it is no file to read, "" otherwise.
    """

    root: int
    path: str
    name: str
    size: int
    mtime_ns: int
    reason: str = ""


def walk(
    inputs: list[str], enter: Callable[[str], bool] = lambda name: True
) -> Iterator[Entry]:
    """Files below each input (a folder or one file), sorted by the bytes of the names.

    Links are followed; a folder is entered once, so that loops end. What cannot be
    listed or is no regular file comes with a reason. enter: says by its own name
    whether a folder below is looked into; one that is not is 'junk'.
    """
    seen: set[tuple[int, int]] = set()
    # A stack, not recursion: folders can be nested deeper than Python can call.
    stack = [(root, top, "") for root, top in enumerate(inputs)][::-1]
    while stack:
        root, path, name = stack.pop()
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                name = name or os.path.basename(path)
                yield Entry(root, path, name, status.st_size, status.st_mtime_ns)
                continue
            identity = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode) or identity in seen:
                yield Entry(root, path, name, 0, 0, "not_a_file")
                continue
            if name and not enter(os.path.basename(path)):
                yield Entry(root, path, name, 0, 0, "junk")
                continue
            children = sorted(os.listdir(path), key=os.fsencode, reverse=True)
        except PermissionError:
            yield Entry(root, path, name, 0, 0, "no_permission")
            continue
        except OSError:  # broken link, link to itself, name too long
            yield Entry(root, path, name, 0, 0, "not_a_file")
            continue
        seen.add(identity)
        stack.extend(
            (root, os.path.join(path, child), f"{name}/{child}" if name else child)
            for child in children
        )
