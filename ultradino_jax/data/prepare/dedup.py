"""Exact and near duplicates, and lists of images that must never enter pretraining."""

import base64
import hashlib
import json
from array import array
from pathlib import Path

import cv2
import numpy as np

from ultradino_jax.errors import UserError

_BANDS = 8  # 128 bits in bands of 16: a distance of 7 leaves one band untouched
_MAX_BITS = _BANDS - 1
_MIN_CORRELATION = 0.99
_FORMAT = {"format": "ultradino_hashes", "version": 1}


def pixel_sha256(frame: np.ndarray) -> bytes:
    """SHA-256 of a decoded grey frame [H,W] uint8 and its shape: whatever the file."""
    digest = hashlib.sha256(b"%d %d " % frame.shape)
    digest.update(np.ascontiguousarray(frame).data)
    return digest.digest()


def near_hash(frame: np.ndarray) -> np.ndarray:
    """Perceptual hash of a grey picture [H,W] uint8 -> uint8 [272].

    16 bytes of difference hash (signs of 8x8 horizontal and 8x8 vertical steps), then a
    16x16 thumbnail that `NearIndex` uses to confirm.
    """
    # One reduction of the large picture; 144 is a multiple of all three grids.
    frame = cv2.resize(frame, (144, 144), interpolation=cv2.INTER_AREA)
    across = cv2.resize(frame, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    down = cv2.resize(frame, (8, 9), interpolation=cv2.INTER_AREA).astype(np.int16)
    signs = np.concatenate([np.diff(across, axis=1) > 0, np.diff(down, axis=0).T > 0])
    # Transposed, each band of 16 bits mixes corners (often black) with the centre.
    bits = np.packbits(signs.reshape(-1, _BANDS * 2).T)
    thumb = cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA)
    return np.concatenate([bits, thumb.ravel()])


class NearIndex:
    """Near-duplicate search over `near_hash` values, in the order they were added."""

    def __init__(self):
        self._rows = np.empty((1024, 272), np.uint8)
        self._count = 0
        self._buckets: dict[tuple[int, int], array] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, value: np.ndarray) -> None:
        """Append one hash; its number is the count before."""
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._count] = value
        for key in enumerate(value[:16].view(np.uint16).tolist()):
            self._buckets.setdefault(key, array("L")).append(self._count)
        self._count += 1

    def find(self, value: np.ndarray) -> int | None:
        """Number of the first added near duplicate, or None.

        Near: at most 7 of 128 bits differ and the thumbnails correlate by 0.99.
        """
        keys = enumerate(value[:16].view(np.uint16).tolist())
        buckets = [self._buckets[key] for key in keys if key in self._buckets]
        if not buckets:
            return None
        rows = np.unique(np.concatenate([np.frombuffer(b, np.uint) for b in buckets]))
        distance = np.bitwise_count(self._rows[rows, :16] ^ value[:16]).sum(axis=1)
        for row in rows[distance <= _MAX_BITS].tolist():
            if _correlation(self._rows[row, 16:], value[16:]) >= _MIN_CORRELATION:
                return row
        return None


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a = a.astype(np.float64) - a.mean()
    b = b.astype(np.float64) - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float(np.array_equal(a, b))


class ExcludeList:
    """Images that must not enter a cache, from files that `write_hashes` made."""

    def __init__(self, paths):
        self._exact: set[bytes] = set()
        self._near = NearIndex()
        self.digests = []
        for path in paths:
            data = Path(path).read_bytes()
            self.digests.append(hashlib.sha256(data).hexdigest())
            try:
                head, *lines = data.decode().splitlines() or [""]
                if json.loads(head) != _FORMAT:
                    raise ValueError
                for line in lines:
                    entry = json.loads(line)
                    self._exact.add(bytes.fromhex(entry["sha256"]))
                    for text in entry["near"]:
                        value = np.frombuffer(base64.b64decode(text), np.uint8)
                        self._near.add(value)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}: not a hash list of prepare") from None

    def matches(self, sha256: bytes, near: list[np.ndarray]) -> bool:
        """Whether a frame is on a list: same pixels, or a near view of it.

        near: `near_hash` of the whole frame and of its regions.
        """
        if sha256 in self._exact:
            return True
        return any(self._near.find(value) is not None for value in near)


def format_hashes(entries) -> str:
    """Text of a hash list. entries: (sha256, [near_hash, ...]) of each frame."""
    lines = [json.dumps(_FORMAT)]
    for sha256, near in entries:
        texts = [base64.b64encode(value.tobytes()).decode() for value in near]
        lines.append(json.dumps({"sha256": sha256.hex(), "near": texts}))
    return "\n".join(lines) + "\n"
