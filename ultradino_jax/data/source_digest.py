"""Are these the pictures that they were? What is asked of each, and of a few.

Names say which pictures there are and in which order. Sizes of files are compared where
both sides know them. The pixels of a fixed sample are compared, whatever the names,
sizes and times say: a copy of a folder has other times, and the same picture written
anew may have another size, so neither alone refuses anything.
"""

import hashlib
from typing import Protocol

import numpy as np

from ultradino_jax.errors import UserError

SAMPLE = 32


class Pictures(Protocol):
    """Images by number: uint8 [H,W] or [H,W,C]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


def sample_of(length: int, count: int = SAMPLE) -> list[int]:
    """Up to `count` different positions below `length`, the same every time."""
    if length <= count:
        return list(range(length))
    drawn = np.random.default_rng(length).choice(length, count, replace=False)
    return sorted(drawn.tolist())


def pixels_digest(image: np.ndarray) -> str:
    """Half a sha256 over shape and pixels."""
    sha = hashlib.sha256(str(image.shape).encode())
    sha.update(np.ascontiguousarray(image).tobytes())
    return sha.hexdigest()[:32]


def sampled_pixels(pictures: Pictures) -> dict[str, str]:
    """{position: digest of its pixels} of `sample_of`, '' for what cannot be read."""
    found = {}
    for i in sample_of(len(pictures)):
        try:
            found[str(i)] = pixels_digest(pictures[i])
        except UserError:
            found[str(i)] = ""
    return found
