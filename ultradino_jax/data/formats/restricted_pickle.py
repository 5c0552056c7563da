"""Pickled .npy files (FASS keeps its masks in one) without running what is in them.

`numpy.load(allow_pickle=True)` lets a file call any function. Here a pickle may name
numpy's array constructors and nothing else.
"""

import collections
import io
import pickle

import numpy as np
from numpy._core import multiarray, numeric
from numpy.lib import format as npy_format

from ultradino_jax.errors import UserError


class UnsafePickle(UserError):
    """The pickle names something other than arrays, or is damaged."""


def _encode(text: str, encoding: str) -> bytes:
    # Pickles written with protocol 2 keep bytes as latin-1 text.
    if encoding != "latin1":
        raise UnsafePickle("pickle encodes text")
    return text.encode("latin1")


_CONSTRUCTORS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
}
# Its stub leaves it out.
_frombuffer = numeric._frombuffer  # pyright: ignore[reportAttributeAccessIssue]
for _module in ("numpy.core", "numpy._core"):
    _CONSTRUCTORS |= {
        (f"{_module}.multiarray", "_reconstruct"): multiarray._reconstruct,
        (f"{_module}.multiarray", "scalar"): multiarray.scalar,
        (f"{_module}.numeric", "_frombuffer"): _frombuffer,
    }


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        try:
            return _CONSTRUCTORS[module, name]
        except KeyError:
            raise UnsafePickle(f"pickle names {module}.{name}") from None


def load_npy_pickle(source):
    """Object stored by `numpy.save(path, obj, allow_pickle=True)`.

    source: a path or the file's bytes. A 0-d object array (a saved dict) comes back as
    the object itself, any other object array as the array.
    Raises UnsafePickle when the pickle wants anything but arrays, dicts, lists, text
    and numbers, or is damaged; UserError when the file is not a pickled .npy.
    """
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read()
    file = io.BytesIO(source)
    major, _ = npy_format.read_magic(file)
    read_header = {
        1: npy_format.read_array_header_1_0,
        2: npy_format.read_array_header_2_0,
    }.get(major)
    if read_header is None:
        raise UserError(f"npy format version {major} holds no pickle")
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise UserError("npy file holds a plain array: use numpy.load")
    try:
        loaded = _ArraysOnly(file).load()
    except UnsafePickle:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UnsafePickle(f"damaged pickle ({type(error).__name__})") from None
    if isinstance(loaded, np.ndarray) and loaded.shape == ():
        return loaded.item()
    return loaded
