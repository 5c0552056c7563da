"""The safetensors file format in NumPy: a JSON header, then raw little-endian arrays.

Reading needs no other package, and writing is the same bytes that the safetensors
library writes: 8 bytes header length, header {name: {dtype, shape, data_offsets}},
data. Format: github.com/huggingface/safetensors, README.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from ultradino_jax.errors import UserError

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


def read_safetensors(
    path: str | Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata) of a file.

    Raises UserError saying what is wrong when the file is cut short, not of this
    format, or holds a dtype without a NumPy equivalent.
    """
    data = np.memmap(path, np.uint8, mode="r") if Path(path).stat().st_size else b""
    if len(data) < 8:
        raise UserError(f"only {len(data)} bytes: not a safetensors file")
    (length,) = struct.unpack("<Q", bytes(data[:8]))
    if length > _MAX_HEADER or bytes(data[8:9]) != b"{":
        raise UserError("not a safetensors file (no JSON header)")
    if 8 + length > len(data):
        raise UserError(f"cut short: the header needs {length} bytes")
    body = data[8 + length :]
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        metadata = header.pop("__metadata__", {})
        end = max((e["data_offsets"][1] for e in header.values()), default=0)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"damaged safetensors header ({error!r})") from error
    if end > len(body):
        raise UserError(f"cut short: {len(body)} of {end} bytes of tensor data")
    return {name: _tensor(name, e, body) for name, e in header.items()}, metadata


def _tensor(name: str, entry: dict, body: np.ndarray) -> np.ndarray:
    dtype, shape = _DTYPES.get(entry.get("dtype")), tuple(entry.get("shape", ()))
    if dtype is None:
        raise UserError(f"{name}: dtype {entry.get('dtype')} is not supported")
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop or stop - start != dtype.itemsize * np.prod(
        shape, dtype=np.int64
    ):
        raise UserError(f"{name}: {stop - start} bytes do not hold {list(shape)}")
    return np.frombuffer(bytes(body[start:stop]), dtype).reshape(shape)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays and string metadata; the names are sorted, the bytes repeatable."""
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    for name, x in arrays.items():
        header[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [offset, offset + x.nbytes],
        }
        offset += x.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with Path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in arrays.values():
            file.write(x.tobytes())
