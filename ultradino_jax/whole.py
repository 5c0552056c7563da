"""Files and folders that are there whole or not at all, and that belong to one job.

What is written lies beside its place, is flushed to the disk, and is renamed last. A
full disk leaves the file that was there before.

A job is told by named settings, noted in its folder by the first run and checked by
every later one. Another job is refused with a line that names each setting that
differs, so that nothing is mixed and nothing is overwritten.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ultradino_jax.errors import UserError


def named(path: str | Path, what: str) -> Path:
    """The path. Raises UserError for '', which would stand for the current folder."""
    if not os.fspath(path):
        raise UserError(f"the name of the {what} is empty")
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Path to write to; it becomes `path` at the end, or is removed on an error."""
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    try:
        yield fresh
        _sync(fresh)
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    _sync(path.absolute().parent)


def write_whole(path: str | Path, data: str | bytes) -> None:
    """Write bytes, or text as UTF-8.

    File names that are no UTF-8 become escapes, which JSON reads back as they were.
    """
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")
    with whole_file(path) as fresh:
        fresh.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with an indent of 1 and a closing newline."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming the file when it holds none."""
    text = Path(path).read_bytes()
    try:
        value = json.loads(text)
    except ValueError as error:  # also of a byte that is no UTF-8
        raise UserError(f"{str(path)!r} is cut or not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} holds no JSON object")
    return value


@contextlib.contextmanager
def whole_folder(
    folder: str | Path,
    *,
    first: bool = True,
    meet: Callable[[str], None] = lambda what: None,
) -> Iterator[Path]:
    """Folder to write into, made empty; it takes the place of `folder` at the end.

    An error inside leaves what was there. Where several processes write together, all
    of them enter: `first` is true in one, which makes and renames the folder, and
    meet(what) waits for the others.
    """
    folder = Path(folder).absolute()
    fresh, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
    meet(f"{folder.name}: fresh folder")
    try:
        yield fresh
    except BaseException:
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
        raise
    meet(f"{folder.name}: written")
    if first:
        for place, _, names in os.walk(fresh):
            for name in (*names, "."):
                _sync(Path(place) / name)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    meet(f"{folder.name}: in place")


def newest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint in a folder that is complete, or None.

    Raises OSError when there is a folder that cannot be listed.
    """
    names = os.listdir(directory) if directory.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flat(settings: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, values as JSON gives them back."""
    values = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return values


def differing(
    there: Mapping,
    now: Mapping,
    *,
    free: Collection[str] = (),
    missing: Mapping[str, Any] | None = None,
) -> list[str]:
    """One text for each setting that differs, by name.

    free: names that may differ. missing: what a setting stands for in a record that
    was written before it existed.
    """
    old, new = flat(missing or {}) | flat(there), flat(now)
    return [
        f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]


def _short(value) -> str:
    text = repr(value)
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{text[:13]}.." if is_digest else text


def check_same(
    there: Mapping, now: Mapping, place: str | Path, what: str, advice: str, **options
) -> None:
    """Raises UserError naming what differs when a place holds the work of another job.

    what: 'a run', 'parts', ..; advice: what to do instead; options: of `differing`.
    """
    found = differing(there, now, **options)
    if found:
        raise UserError(
            f"{str(place)!r} holds {what} with other settings ({'; '.join(found)}); "
            f"{advice}"
        )


def claim(
    record: Path, settings: Mapping, what: str, advice: str, **options
) -> dict[str, Any] | None:
    """Note the settings in a JSON file, or check that the ones there are the same.

    Returns the record that was there, or None for a fresh folder. Raises UserError as
    `check_same`, and when the record is damaged.
    """
    if record.is_file():
        there = read_json(record)
        check_same(there, settings, record.parent, what, advice, **options)
        return there
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)
    return None


class Lock:
    """Exclusive use of a workdir, given back by the kernel when the process ends.

    Raises UserError naming the process that holds it.
    """

    def __init__(self, workdir: Path):
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = (workdir / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"workdir {str(workdir)!r} is in use by {holder}; wait for it or use "
                "another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def close(self) -> None:
        """Give the workdir back."""
        self._file.close()
