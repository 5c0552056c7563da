"""MetaImage: .mha, its pixels in the same file, and .mhd, in a file beside it."""

import os
import zlib
from pathlib import Path

import numpy as np

from ultradino_jax.data.formats.frames import MAX_BYTES
from ultradino_jax.data.formats.unreadable import Unreadable

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


def read_metaimage(data: bytes, path: str | os.PathLike | None = None) -> np.ndarray:
    """File -> array, the last axis of DimSize first, channels last: [N,H,W] or so.

    Raw or zlib, of any number type. path: where the file lies; pixels in another file
    are read from its folder alone. Raises Unreadable.
    """
    try:
        return _read(data, path)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # whatever a damaged header or stream leads to
        raise Unreadable("unreadable", type(error).__name__) from None


def _read(data: bytes, path: str | os.PathLike | None) -> np.ndarray:
    fields, position = {}, 0
    while "ElementDataFile" not in fields:
        end = data.find(b"\n", position)
        if end < 0 or position > 2**16:
            raise Unreadable("unreadable", "header")
        key, _, value = data[position:end].decode("latin1").partition("=")
        fields[key.strip()] = value.strip()
        position = end + 1
    kind = _TYPES.get(fields.get("ElementType", ""))
    if kind is None or fields.get("BinaryData", "True") != "True":
        raise Unreadable("unsupported", "MetaImage kind")
    big = "True" in (
        fields.get("BinaryDataByteOrderMSB"),
        fields.get("ElementByteOrderMSB"),
    )
    dtype = np.dtype((">" if big else "<") + kind)
    # DimSize runs from the fastest axis: width, height, slices.
    shape = [int(n) for n in fields["DimSize"].split()][::-1]
    channels = int(fields.get("ElementNumberOfChannels", 1))
    if channels > 1:
        shape.append(channels)
    wanted = int(np.prod([float(n) for n in shape])) * dtype.itemsize
    if min(shape) < 1 or wanted > MAX_BYTES:
        raise Unreadable("too_large")
    body = data[position:]
    if fields["ElementDataFile"] != "LOCAL":
        body = _beside(fields["ElementDataFile"], path)
    if fields.get("CompressedData") == "True":
        body = zlib.decompressobj().decompress(body, wanted)
    if len(body) < wanted:
        raise Unreadable("unreadable", "truncated")
    return np.frombuffer(body[:wanted], dtype).reshape(shape)


def _beside(name: str, path: str | os.PathLike | None) -> bytes:
    if path is None:
        raise Unreadable("unsupported", "pixels in another file of an archive")
    if name.startswith("LIST") or "%" in name:
        raise Unreadable("unsupported", "MetaImage of several files")
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise Unreadable("unsupported", "pixels in another folder")
    try:
        with (Path(path).parent / name).open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError:
        raise Unreadable("unreadable", "the file of the pixels is not there") from None
