"""Are these the pictures that they were? All names and sizes, the pixels of a few.

The rule for a run that goes on: the names must be the same in the same order, every
file must have the size it had, and the pixels of a fixed sample must be the same. Times
are not asked: a copy of the folder has others. What keeps its name and its size, and is
in no sample, can be another picture; of pictures that were all exchanged one is seen.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ultradino_jax.data.sources import FolderSource, ListSource
from ultradino_jax.errors import UserError

SAMPLE, BLOCKS = 32, 256
# Waiting for a file server, not computing.
_THREADS = 16


class Pictures(Protocol):
    """Images by number: uint8 [H,W] or [H,W,C]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


def sample_of(length: int) -> list[int]:
    """Up to SAMPLE different positions below `length`, the same every time."""
    if length <= SAMPLE:
        return list(range(length))
    drawn = np.random.default_rng(length).choice(length, SAMPLE, replace=False)
    return sorted(drawn.tolist())


def sampled_pixels(pictures: Pictures) -> dict[str, str]:
    """{position: digest of shape and pixels} of `sample_of`, '' for unreadable ones."""
    positions = sample_of(len(pictures))

    def digest(i: int) -> str:
        try:
            image = np.ascontiguousarray(pictures[i])
        except UserError:
            return ""
        return _short(str(image.shape).encode(), image.tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(digest, positions))
    return dict(zip(map(str, positions), found, strict=True))


def stream_record(source) -> dict:
    """What identifies a run's images; JSON values, small however many there are.

    records, digest: their number and the source's digest of their names. sizes: of
    files, a digest per block of consecutive ones, BLOCKS of them. names, pixels: of the
    sample, by position.
    """
    positions = sample_of(len(source))
    names = {str(i): _short(os.fsencode(source.record_id(i))) for i in positions}
    return {
        "records": len(source),
        "digest": source.digest(),
        "sizes": _size_blocks(source),
        "names": names,
        "pixels": sampled_pixels(source),
    }


def difference(there: dict, now: dict, source) -> str:
    """What tells two records of `stream_record` apart, naming a file; '' if nothing.

    now: that of `source`. What `there`, an older run's, does not say is not compared.
    """
    if there["records"] != now["records"]:
        return f"{there['records']} images there, {now['records']} now"
    for key, what in (("names", "stood there"), ("pixels", "had other pixels")):
        for i in _differing(there.get(key, {}), now[key]):
            name = source.record_id(int(i))
            other = "another image" if key == "names" else "it"
            return f"image {i} is {name!r} now, {other} {what}"
    if there["digest"] != now["digest"]:
        return "some have other names"
    old = there.get("sizes") or now["sizes"]
    for k, (a, b) in enumerate(zip(old, now["sizes"], strict=True)):
        if a != b:
            first, last = _edges(len(source))[k : k + 2]
            names = [repr(source.record_id(int(i))) for i in (first, last - 1)]
            return f"{' or one up to '.join(dict.fromkeys(names))} had another size"
    return ""


def _differing(there: dict, now: dict) -> Iterable[str]:
    return (i for i in there if i in now and there[i] != now[i])


def _edges(length: int) -> np.ndarray:
    return np.linspace(0, length, min(BLOCKS, length) + 1).astype(int)


def _size_blocks(source) -> list[str]:
    if not isinstance(source, FolderSource | ListSource):
        return []  # a cache's digest covers its shards, a phantom has no file
    edges = _edges(len(source))

    def block(k: int) -> str:
        sizes = (_size(source, i) for i in range(edges[k], edges[k + 1]))
        return _short(np.fromiter(sizes, np.int64).tobytes())

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(block, range(len(edges) - 1)))


def _size(source, index: int) -> int:
    try:
        return os.stat(source.root / source.record_id(index)).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1  # a list may name what is not there; reading it will say so


def _short(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]
