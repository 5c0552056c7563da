"""Masks: labels, not light. Never scaled, never blended, turned as their picture is."""

import os
from pathlib import Path

import numpy as np

from ultradino_jax.data.formats.arrays import KINDS as ARRAYS
from ultradino_jax.data.formats.arrays import read_array
from ultradino_jax.data.formats.readers import HEAD, STILLS, kind_of
from ultradino_jax.data.formats.stills import read_pages
from ultradino_jax.data.formats.unreadable import Unreadable
from ultradino_jax.errors import UserError


def read_labels(source: bytes | os.PathLike, where: str = "") -> np.ndarray:
    """Content or path of an index mask -> uint8 [H,W]: grey values or palette indices.

    PNG, TIFF, BMP and other lossless stills, NumPy, MetaImage and NIfTI of one frame; 1
    bit is 0 and 1. A colour picture is taken when its channels are equal.
    Raises UserError naming the mask (`where`, by default the path) and what is wrong.
    """
    path = None if isinstance(source, bytes) else source
    where = where or ("mask" if path is None else os.fspath(path))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        labels = _stored(data, path)
    except Unreadable as error:
        raise UserError(f"{where}: {error}") from None
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno is not None:
            raise
        raise UserError(f"{where}: damaged ({error})") from None
    except Exception as error:  # decoders raise what they like
        raise UserError(f"{where}: damaged ({type(error).__name__})") from None
    if labels.ndim == 3:
        if (labels != labels[:, :, :1]).any():
            raise UserError(f"{where}: a colour picture is no index mask")
        labels = labels[:, :, 0]
    low, high = labels.min(initial=0), labels.max(initial=0)
    if not np.isfinite([low, high]).all() or (labels != np.rint(labels)).any():
        raise UserError(f"{where}: labels are whole numbers, and these are not")
    if low < 0 or high > 255:
        value = low if low < 0 else high
        raise UserError(f"{where}: the value {value:g} is not between 0 and 255")
    return labels.astype(np.uint8)


def _stored(data: bytes, path: str | os.PathLike | None) -> np.ndarray:
    if not data:
        raise Unreadable("empty")
    kind = kind_of(data[:HEAD])
    if kind == "jpeg":
        raise Unreadable("unsupported", "JPEG changes labels: save the mask as PNG")
    if kind in STILLS:
        pages, _, count = read_pages(data, lambda *_: [0], stored=True)
        labels = pages[0]
    elif kind in ARRAYS:
        frames = read_array(data, kind, path)
        labels, count = frames[0], len(frames)
    else:
        raise Unreadable("unsupported")
    if count > 1:
        raise Unreadable("unsupported", f"a mask of {count} pages")
    return labels
