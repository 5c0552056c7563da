"""PACS exports, cine loops, folders and archives -> a clean, fast training cache.

    python -m ultradino_jax.prepare --input EXPORT --output CACHE

then train with `--config.data.root=CACHE`. docs/prepare.md says what is promised.
"""

import argparse
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ultradino_jax.cli import command
from ultradino_jax.data.cache import ENCODINGS, OutputError
from ultradino_jax.data.formats import archives
from ultradino_jax.data.formats.readers import HEAD, kind_of
from ultradino_jax.data.formats.walk import Entry, walk
from ultradino_jax.data.prepare.build import DEDUP, CacheBuilder
from ultradino_jax.data.prepare.dedup import ExcludeList, format_hashes
from ultradino_jax.data.prepare.file import MemberResult, Settings, Task
from ultradino_jax.data.prepare.pool import run_in_order
from ultradino_jax.data.prepare.scan import Key
from ultradino_jax.errors import UserError
from ultradino_jax.whole import write_whole

_EVERY_SECONDS = 5.0


def prepare(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    short_side: int = 256,
    encoding: str = "jpeg",
    fps: float = 3.0,
    max_frames: int = 32,
    region: bool = True,
    dedup: str = "near",
    exclude: Sequence[str | os.PathLike] = (),
    key: str | os.PathLike | None = None,
    workers: int | None = None,
    timeout: float = 120.0,
    shard_records: int = 4096,
    progress: bool = True,
) -> dict:
    """Turns files into a cache of small grey pictures, and returns its manifest.

    Killed and called again with the same arguments it goes on, and ends with the same
    bytes as an uninterrupted run; called on a finished cache it does nothing.

    Args:
      inputs: folders or files. Of equal pictures the first in order is kept.
      output: the cache's directory, new or from an earlier run; not inside an input.
      short_side: pixels of the stored pictures' short side; never enlarged; 0 keeps
        the size.
      encoding: "jpeg" (quality 95), "png" or "raw".
      fps: at most so many frames per second of a clip.
      max_frames: at most so many frames of a clip.
      region: keep only the ultrasound region, and skip what has none. False takes
        every frame whole, DICOM of all modalities included: nothing is removed.
      dedup: "near" drops exact and near duplicates, "exact" only the former, "none".
      exclude: hash lists (`write_hashes`) of images that must not enter.
      key: file with the secret behind the ids, made on first use; by default
        `output` + ".key". Keep it apart from the cache.
      workers: processes, by default one per core; 0 works in this one, unprotected.
      timeout: seconds for one file.
      shard_records: pictures per shard; work since the last full one is lost by a kill.
      progress: print rate and time left to stderr.

    Raises:
      UserError: arguments or directories that do not fit together.
      OutputError: the output cannot be written. A later call goes on from there.
    """
    output = Path(output).absolute()
    _check_options(short_side, encoding, fps, max_frames, dedup, shard_records)
    roots = _roots(inputs, output)
    secret = _load_key(key, output)
    excluded = ExcludeList(exclude)
    entries = list(walk(roots))
    settings = Settings(short_side, encoding, float(fps), max_frames, region)
    plan = {
        "inputs": secret.inputs_digest(entries),
        "key": secret.hash("key").hex(),
        "options": {
            "short_side": short_side,
            "encoding": encoding,
            "fps": float(fps),
            "max_frames": max_frames,
            "region": region,
            "dedup": dedup,
            "exclude": excluded.digests,
            "shard_records": shard_records,
        },
    }
    with CacheBuilder(output, plan, secret, excluded, dedup, shard_records) as builder:
        if builder.manifest is not None:
            return builder.manifest
        bar = _Progress(len(entries), builder, progress)
        for number, result in _results(
            entries, builder.cursor, settings, workers, timeout
        ):
            entry = entries[number]
            file_id = secret.file_id(entry.root, entry.name, result.member)
            builder.add(number, file_id, result)
            bar.show(number)
        manifest = builder.finish(_versions())
        bar.show(len(entries))
    return manifest


def write_hashes(
    inputs: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    workers: int | None = None,
    timeout: float = 120.0,
) -> int:
    """Writes the hash list of an evaluation set, for `exclude`; returns its length.

    Every frame of every file is listed, with a perceptual hash of the whole frame and
    of its ultrasound region. Raises UserError when a picture among the inputs cannot
    be read: a list with gaps would exclude less than it seems to.
    """
    entries = list(walk(_roots(inputs)))
    settings = Settings(fps=1e6, max_frames=10**6, hashes_only=True)
    listed, problems = [], 0
    for _, result in _results(entries, (0, 0), settings, workers, timeout):
        # Tables and notes beside the images are no images.
        problems += result.reason not in ("", "unsupported", "no_pixels", "junk")
        for frame in result.frames:
            near = [frame.near, *(record.near for record in frame.records)]
            listed.append((frame.sha256, near))
    if problems or not listed:
        raise UserError(f"{problems} unreadable files, {len(listed)} frames: no list")
    write_whole(Path(output), format_hashes(listed))
    return len(listed)


def lookup(
    path: str | os.PathLike, inputs: Sequence[str | os.PathLike], key: Path
) -> Iterator[tuple[str, str]]:
    """(id, path) of a file, or of all files below a folder, for those who hold the key.

    inputs: as given to `prepare`, in the same order. Members of archives follow their
    archive. Raises UserError when the key or the path does not exist.
    """
    if not key.is_file():
        raise UserError(f"{key}: no such key file")
    secret = Key.load(key)
    wanted = os.path.abspath(path)
    found = False
    for entry in walk(_roots(inputs)):
        here = os.path.abspath(entry.path)
        if here != wanted and not here.startswith(wanted.rstrip("/") + "/"):
            continue
        found = True
        yield secret.file_id(entry.root, entry.name).hex(), entry.path
        for member, name in _member_names(entry):
            file_id = secret.file_id(entry.root, entry.name, member)
            yield file_id.hex(), f"{entry.path}!{name}"
    if not found:
        raise UserError(f"{path}: not below the inputs")


def _member_names(entry: Entry) -> Iterator[tuple[int, str]]:
    if entry.reason:
        return
    try:
        with open(entry.path, "rb") as file:
            kind = kind_of(file.read(HEAD))
        if kind in archives.KINDS:
            yield from enumerate(archives.member_names(entry.path, kind))
    except Exception:  # a damaged archive has the members that can be named
        return


def _roots(inputs, output: Path | None = None) -> list[str]:
    if isinstance(inputs, str | os.PathLike):
        inputs = [inputs]
    roots = [os.fspath(i) for i in inputs]
    if not roots:
        raise UserError("no input")
    for root in roots:
        if not os.path.exists(root):
            raise UserError(f"input {root} does not exist")
        real = os.path.realpath(root)
        if output and Path(os.path.realpath(output)).is_relative_to(real):
            raise UserError(f"output {output} lies inside input {root}")
    return roots


def _check_options(short_side, encoding, fps, max_frames, dedup, shard_records):
    for name, value, allowed in (
        ("encoding", encoding, ENCODINGS),
        ("dedup", dedup, DEDUP),
    ):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(allowed)}: {value!r}")
    if short_side != 0 and short_side < 32:
        raise UserError(f"short_side must be 0 or at least 32: {short_side}")
    if not all(0 < number < math.inf for number in (fps, max_frames, shard_records)):
        raise UserError("fps, max_frames and shard_records must be positive numbers")


def _load_key(path: str | os.PathLike | None, output: Path) -> Key:
    path = Path(path or output.with_name(output.name + ".key")).absolute()
    if path.is_relative_to(output):
        raise UserError(f"key {path} lies inside the cache: keep it elsewhere")
    try:
        return Key.load(path)
    except OSError as error:
        raise OutputError(f"cannot write key {path}: {error.strerror}") from error


def _results(
    entries: list[Entry],
    cursor: tuple[int, int],
    settings: Settings,
    workers: int | None,
    timeout: float,
) -> Iterator[tuple[int, MemberResult]]:
    """(number of the entry, result) in order, from the cursor's entry and member on."""
    first, member = cursor
    if workers is None:
        workers = os.cpu_count() or 1
    if workers < 0 or not 0 < timeout < math.inf:
        raise UserError(
            f"workers {workers} must be 0 or more, timeout {timeout} a positive number"
        )
    readable = [i for i in range(first, len(entries)) if not entries[i].reason]
    tasks = (
        Task(i, entries[i].path, entries[i].name, member if i == first else 0)
        for i in readable
    )
    waiting = iter([i for i in range(first, len(entries)) if entries[i].reason])
    problem = next(waiting, None)
    # One file can be an archive that keeps all workers busy.
    workers = workers if readable else 0
    for number, result in run_in_order(tasks, settings, workers, timeout):
        while problem is not None and problem < number:
            yield problem, MemberResult(-1, entries[problem].reason)
            problem = next(waiting, None)
        yield number, result
    while problem is not None:
        yield problem, MemberResult(-1, entries[problem].reason)
        problem = next(waiting, None)


def _versions() -> dict[str, str]:
    packages = ("numpy", "opencv-python-headless", "pillow", "pydicom", "array-record")
    return {name: importlib.metadata.version(name) for name in packages}


class _Progress:
    """Lines on stderr: how far, how fast, how long still."""

    def __init__(self, total: int, builder: CacheBuilder, on: bool):
        self._total, self._builder, self._on = total, builder, on
        self._first, self._before = builder.cursor[0], builder.records
        self._start = self._last = time.monotonic()

    def show(self, number: int) -> None:
        """number: inputs that are behind us."""
        now, last = time.monotonic(), number == self._total
        if not self._on or (now - self._last < _EVERY_SECONDS and not last):
            return
        self._last = now
        seconds, kept = max(now - self._start, 1e-9), self._builder.records
        left = ""
        if self._first < number < self._total:
            rate = (number - self._first) / seconds
            left = f", about {(self._total - number) / rate:.0f} s left"
        print(
            f"prepare: {number} of {self._total} inputs, {kept} pictures kept, "
            f"{(kept - self._before) / seconds:.1f} pictures/s{left}",
            file=sys.stderr,
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ultradino_jax.prepare",
        description=(__doc__ or "").splitlines()[0],
    )
    add = parser.add_argument
    add("--input", action="append", required=True, help="folder or file; repeatable")
    add("--output", help="directory of the cache")
    add("--short-side", type=int, default=256, help="256, 384, 512; 0 keeps the size")
    add("--encoding", choices=ENCODINGS, default="jpeg")
    add("--fps", type=float, default=3.0, help="frames per second taken from clips")
    add("--max-frames", type=int, default=32, help="frames taken from one clip")
    add("--no-region", action="store_true", help="take frames whole, remove nothing")
    add("--dedup", choices=DEDUP, default="near", help="duplicates to drop")
    add("--exclude", action="append", default=[], help="hash list; repeatable")
    add("--key", help="file with the secret behind the ids (default: OUTPUT.key)")
    add("--workers", type=int, help="processes, at least 1 (default: one per core)")
    add("--timeout", type=float, default=120.0, help="seconds for one file")
    add("--write-hashes", metavar="FILE", help="only write a list for --exclude")
    add("--lookup", metavar="PATH", help="only print the ids of a file or folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and do what they ask; bad flags end with exit status 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.write_hashes and not args.output and not (args.lookup and args.key):
        parser.error("--output is required")
    # Never in this process: a file that crashes its decoder would end it.
    workers = 1 if args.workers == 0 else args.workers
    common = {"workers": workers, "timeout": args.timeout}
    if args.lookup:
        key = Path(args.key or os.path.abspath(args.output) + ".key")
        for file_id, path in lookup(args.lookup, args.input, key):
            print(file_id, path)
    elif args.write_hashes:
        count = write_hashes(args.input, args.write_hashes, **common)
        print(f"{args.write_hashes}: {count} frames")
    else:
        manifest = prepare(
            args.input,
            args.output,
            short_side=args.short_side,
            encoding=args.encoding,
            fps=args.fps,
            max_frames=args.max_frames,
            region=not args.no_region,
            dedup=args.dedup,
            exclude=args.exclude,
            key=args.key,
            **common,
        )
        print(f"{args.output}: {manifest['records']} pictures; see report.html")


if __name__ == "__main__":
    command(main)
