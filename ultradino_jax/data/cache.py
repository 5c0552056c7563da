"""The prepared cache: ArrayRecord shards of small grey pictures, each with an index.

CACHE/manifest.json              written last: a cache without it is not finished
CACHE/shard-00000.array_record   one encoded picture per record, pixels only
CACHE/shard-00000.npy            INDEX of the same records
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# A compiled module without types.
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.whole import whole_file, write_whole

FORMAT = "ultradino_cache"
VERSION = 1
# `file` is the keyed hash of the input file, so file-frame-box names a record for those
# who hold the key; patient and study are keyed hashes too.
INDEX = np.dtype(
    [
        ("file", "u1", 12),
        ("frame", "<u4"),
        ("box", "u1"),
        ("patient", "u1", 12),
        ("study", "u1", 12),
        ("sha256", "u1", 32),  # of the decoded frame before cropping
        ("near", "u1", 272),  # dedup.near_hash of the record's region
        ("height", "<u2"),
        ("width", "<u2"),
        ("text_lines", "<u2"),
    ]
)
_RAW = b"RAW1"
_PARAMETERS = {
    "png": (".png", [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]),
    "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]),
}
ENCODINGS = (*_PARAMETERS, "raw")


class OutputError(OSError):
    """The cache cannot be written: disk full, no permission, disk gone."""


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """Grey picture [H,W] uint8 -> record bytes. encoding: one of ENCODINGS."""
    if encoding == "raw":
        size = np.array(pixels.shape, "<u4").tobytes()
        return _RAW + size + np.ascontiguousarray(pixels).tobytes()
    extension, parameters = _PARAMETERS[encoding]
    return cv2.imencode(extension, pixels, parameters)[1].tobytes()


def decode(record: bytes) -> np.ndarray:
    """Record bytes -> grey picture [H,W] uint8. Raises UserError when damaged."""
    if record[:4] == _RAW:
        height, width = np.frombuffer(record, "<u4", 2, offset=4).tolist()
        if len(record) != 12 + height * width:
            raise UserError("raw record of the wrong length")
        return np.frombuffer(record, np.uint8, offset=12).reshape(height, width)
    pixels = None
    if record:  # OpenCV has another error for no bytes at all
        pixels = cv2.imdecode(np.frombuffer(record, np.uint8), cv2.IMREAD_GRAYSCALE)
    if pixels is None:
        raise UserError("record cannot be decoded")
    return pixels


def write_shard(stem: Path, payloads: list[bytes], index: np.ndarray) -> dict:
    """Writes stem.array_record and stem.npy, each whole or not at all.

    The bytes depend on the arguments alone. Returns the manifest's entry.
    Raises OutputError.
    """
    path = stem.with_suffix(".array_record")
    try:
        with whole_file(path) as fresh:
            # One picture per chunk: any record costs one read. They are compressed
            # already.
            writer = array_record_module.ArrayRecordWriter(
                str(fresh), "group_size:1,uncompressed"
            )
            for payload in payloads:
                writer.write(payload)
            writer.close()
            with open(fresh, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        write_whole(stem.with_suffix(".npy"), _npy(index))
    except (RuntimeError, OSError) as error:  # array_record raises RuntimeError
        raise OutputError(f"cannot write {path}: {error}") from error
    return {
        "file": path.name,
        "records": len(payloads),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def _npy(index: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, index)
    return file.getvalue()


def record_name(entry: np.void) -> str:
    """Id of a record from its INDEX entry: file hash, frame, region."""
    return f"{entry['file'].tobytes().hex()}-{entry['frame']}-{entry['box']}"


class Shards:
    """Random access to written shards. Picklable: each process opens what it reads.

    shards: entries of the manifest. Raises UserError when a file is missing or of
    another length.
    """

    def __init__(self, root: Path, shards: list[dict]):
        self._files = [root / shard["file"] for shard in shards]
        counts = [int(shard["records"]) for shard in shards]
        if min(counts, default=0) < 0:
            raise UserError(f"{root}: a shard of {min(counts)} records")
        for file, shard in zip(self._files, shards, strict=True):
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(f"{file}: missing, or not {shard['bytes']} bytes long")
            if not file.with_suffix(".npy").is_file():
                raise UserError(f"{file.with_suffix('.npy')}: missing")
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._readers: dict[int, Any] = {}
        self._indexes: dict[int, np.ndarray] = {}

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}, "_indexes": {}}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _count(self, shard: int) -> int:
        return int(self._starts[shard + 1] - self._starts[shard])

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return shard, int(position - self._starts[shard])

    def pixels(self, position: int) -> np.ndarray:
        """Grey picture [H,W] uint8. Raises UserError when the record is damaged."""
        shard, row = self._locate(position)
        try:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self._files[shard]),
                    options="readahead_buffer_size:0,max_parallelism:0",
                )
            return decode(self._readers[shard].read([row])[0])
        # array_record raises RuntimeError, and IndexError where a shard is cut short.
        except (RuntimeError, IndexError, ValueError) as error:
            name = self._files[shard].name
            raise UserError(f"{name} record {row} is damaged: {error}") from None

    def entry(self, position: int) -> np.void:
        """INDEX entry of a record: group keys, hashes, size, text-like lines."""
        shard, row = self._locate(position)
        if shard not in self._indexes:
            path = self._files[shard].with_suffix(".npy")
            with damaged(path):
                index = np.load(path, mmap_mode="r")
                if index.dtype != INDEX or len(index) != self._count(shard):
                    raise UserError(f"{path}: not the index of its shard")
            self._indexes[shard] = index
        return self._indexes[shard][row]
