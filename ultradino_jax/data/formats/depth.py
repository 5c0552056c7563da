"""One rule that makes 8 bits of any numbers, for every format and every caller.

- bool: 0 and 255. uint8: as it is.
- Unsigned integers: the range of the smallest of 8, 10, 12, 14, 16, 24, 32 or 64 bits
  that holds the largest value of the file, to 0..255. So a 10- or 12-bit picture in a
  16-bit file is not black, and nothing overflows. What a header says of the depth is
  not asked: it is wrong too often, and many formats cannot say it.
- Signed integers and floats: the smallest finite value of the file to 0, the largest to
  255. What is not finite becomes the smallest.

Levels are rounded to the nearest. "The file" is all frames that are read of it.
"""

import numpy as np

from ultradino_jax.data.formats.unreadable import Unreadable

DEPTHS = (8, 10, 12, 14, 16, 24, 32, 64)


def to_uint8(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Frames of one file, any number type -> uint8 of the same shapes.

    Raises Unreadable for other types, and where no value is finite.
    """
    if any(f.dtype.kind not in "buif" for f in frames):
        raise Unreadable("unsupported", "pixel type")
    frames = [f * np.uint8(255) if f.dtype.kind == "b" else f for f in frames]
    if all(f.dtype == np.uint8 for f in frames):
        return frames
    if any(not f.size for f in frames):
        raise Unreadable("empty")
    if all(f.dtype.kind == "u" for f in frames):
        largest = max(int(f.max()) for f in frames)
        low, span = 0.0, 2.0 ** min(b for b in DEPTHS if largest < 2**b) - 1
    else:
        frames, low, span = _finite(frames)
    scale = 255 / span if span > 0 and np.isfinite(span) else 0.0
    if all(f.dtype == np.uint16 for f in frames):
        table = np.rint(np.arange(2**16) * scale).clip(0, 255).astype(np.uint8)
        return [table[f] for f in frames]
    return [
        np.rint((f.astype(np.float64) - low) * scale).astype(np.uint8) for f in frames
    ]


def _finite(frames: list[np.ndarray]) -> tuple[list[np.ndarray], float, float]:
    """Frames without what is not finite, the smallest value and the span."""
    frames = [f.astype(np.float64) for f in frames]
    finite = [f[np.isfinite(f)] for f in frames]
    finite = [f for f in finite if f.size]
    if not finite:
        raise Unreadable("unreadable", "no finite pixel")
    low = min(float(f.min()) for f in finite)
    span = max(float(f.max()) for f in finite) - low
    return [np.where(np.isfinite(f), f, low) for f in frames], low, span
