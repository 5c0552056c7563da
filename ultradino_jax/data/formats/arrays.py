"""Arrays in files: NumPy's .npy, MetaImage and NIfTI."""

import gzip
import io
import os
import zlib

import numpy as np
from numpy.lib import format as npy_format

from ultradino_jax.data.formats.frames import MAX_INFLATED, MAX_PIXELS
from ultradino_jax.data.formats.metaimage import read_metaimage
from ultradino_jax.data.formats.restricted_pickle import UnsafePickle, load_npy_pickle
from ultradino_jax.data.formats.unreadable import Unreadable

KINDS = ("npy", "mha", "nifti")


def read_array(
    data: bytes, kind: str, path: str | os.PathLike | None = None
) -> np.ndarray:
    """A file's frames -> [N,H,W] or [N,H,W,3] of its own number type.

    path: where the file lies, for a header whose pixels are in a file beside it.
    Raises Unreadable.
    """
    if kind == "nifti":
        return _frames(_read_nifti(data))
    if kind == "mha":
        return _frames(read_metaimage(data, path))
    return _frames(_read_npy(data))


def _frames(array: np.ndarray) -> np.ndarray:
    """[H,W], [H,W,3|4], [N,H,W] or [N,H,W,3|4]; alpha says nothing."""
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        array = array[None]
    if array.ndim == 4 and array.shape[3] in (3, 4):
        array = array[..., :3]
    elif array.ndim != 3:
        raise Unreadable("unsupported", "array shape")
    if not array.size:
        raise Unreadable("empty")
    if array.shape[1] * array.shape[2] > MAX_PIXELS:
        raise Unreadable("too_large")
    return array


def _read_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    major, _ = npy_format.read_magic(file)
    read = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
    if major not in read:
        raise Unreadable("unsupported", "npy version")
    shape, _, dtype = read[major](file)
    if not dtype.hasobject:
        # numpy would first allocate what the header asks for.
        wanted = np.prod([float(n) for n in shape]) * dtype.itemsize
        if wanted > len(data):
            raise Unreadable("unreadable", "truncated")
        return np.load(io.BytesIO(data), allow_pickle=False)
    try:
        loaded = load_npy_pickle(data)
    except UnsafePickle:
        raise Unreadable("unsafe_pickle") from None
    image = loaded.get("image") if isinstance(loaded, dict) else None
    if not isinstance(image, np.ndarray):
        raise Unreadable("unsupported", "pickle without an image")
    return image


def is_nifti(head: bytes) -> bool:
    """Whether a file's first bytes are a NIfTI header, gzipped or not."""
    if head.startswith(b"\x1f\x8b"):
        try:
            head = zlib.decompressobj(31).decompress(head, 352)
        except zlib.error:
            return False
    return head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")


def _read_nifti(data: bytes) -> np.ndarray:
    """[N,H,W] or [N,H,W,3]: x to the right, y downwards, the other axes frames.

    That is the order in which SimpleITK gives and takes arrays, as in CAMUS. The
    affine, which says how the scan lay in the body, is not asked.
    """
    try:
        import nibabel
    except ImportError:
        hint = "NIfTI: pip install 'ultradino_jax[nifti]'"
        raise Unreadable("missing_decoder", hint) from None
    if data.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            data = file.read(MAX_INFLATED + 1)
        if len(data) > MAX_INFLATED:
            raise Unreadable("too_large")
    two = data[4:7] == b"n+2"
    kind = nibabel.Nifti2Image if two else nibabel.Nifti1Image
    image = kind.from_bytes(data)
    if np.prod([float(n) for n in image.shape]) > MAX_INFLATED:
        raise Unreadable("too_large")
    array = np.asanyarray(image.dataobj)
    if array.dtype.names:  # RGB24 or RGBA32
        array = np.stack([array[name] for name in array.dtype.names[:3]], axis=-1)
        x, y = array.shape[:2]
        return array.reshape(x, y, -1, 3, order="F").transpose(2, 1, 0, 3)
    if array.ndim < 2:
        raise Unreadable("unsupported", "array shape")
    x, y = array.shape[:2]
    return array.reshape(x, y, -1, order="F").transpose(2, 1, 0)
