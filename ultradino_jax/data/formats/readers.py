"""Any file -> frames. The bytes say what a file is, never its name."""

import io
import os

import cv2
import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

from ultradino_jax.data.formats.frames import (
    MAX_PIXELS,
    Clip,
    choose_frames,
    stretch,
)
from ultradino_jax.data.formats.metaimage import read_metaimage
from ultradino_jax.data.formats.restricted_pickle import UnsafePickle, load_npy_pickle
from ultradino_jax.data.formats.unreadable import Unreadable

HEAD = 512  # bytes that `kind_of` needs
_VIDEO = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"0&\xb2u")
_OPENCV = ("png", "jpeg", "bmp")


def kind_of(head: bytes) -> str:
    """Kind of a file from its first HEAD bytes; "" when it is none this project reads.

    One of png jpeg bmp pillow dicom mha npy video, or zip tar gzip xz bzip2.
    """
    if looks_like_dicom(head):
        return "dicom"
    starts = {
        "png": (b"\x89PNG\r\n\x1a\n",),
        "jpeg": (b"\xff\xd8\xff",),
        "npy": (b"\x93NUMPY",),
        "zip": (b"PK\x03\x04", b"PK\x05\x06"),
        "gzip": (b"\x1f\x8b",),
        "xz": (b"\xfd7zXZ\0",),
        "bzip2": (b"BZh",),
        "video": _VIDEO,
        "pillow": (b"II*\0", b"MM\0*", b"GIF8", b"P5\n", b"P6\n"),
    }
    for kind, magics in starts.items():
        if head.startswith(magics):
            return kind
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "bmp"
    if (head[:4] == b"RIFF" and head[8:12] == b"AVI ") or head[4:8] == b"ftyp":
        return "video"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "pillow"
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith((b"ObjectType", b"NDims", b"Comment")) and b"=" in head:
        return "mha"
    return ""


def looks_like_dicom(head: bytes) -> bool:
    """Whether a file's first bytes are DICOM, with or without the 128-byte preamble."""
    if head[128:132] == b"DICM":
        return True
    # Without preamble: starts with a tag of group 0002 or 0008, in either byte order.
    little, big = head[:2], head[1::-1]
    return (little in (b"\x02\0", b"\x08\0") or big in (b"\x02\0", b"\x08\0")) and (
        len(head) >= 8 and head[:4].count(0) >= 2
    )


def read_clip(
    data: bytes,
    kind: str,
    fps: float = 3.0,
    max_frames: int = 32,
    any_modality: bool = False,
) -> Clip:
    """Chosen frames of one file held in memory (videos: `read_video`).

    fps, max_frames: see `frames.choose_frames`. any_modality: take DICOM that is not
    ultrasound. Raises Unreadable; decoders may raise other errors on damaged files.
    """
    if kind == "dicom":
        # Slow to import: only where there is one.
        from ultradino_jax.data.formats.dicom import read_dicom

        return read_dicom(data, fps, max_frames, any_modality)
    if kind in _OPENCV:
        return Clip(stretch([_read_still(data, kind)]), [0], 1)
    if kind == "pillow":
        return _read_pillow(data, fps, max_frames)
    if kind == "mha":
        return _from_array(read_metaimage(data), fps, max_frames)
    if kind == "npy":
        return _from_array(_read_npy(data), fps, max_frames)
    raise Unreadable("unsupported")


def _read_still(data: bytes, kind: str) -> np.ndarray:
    # OpenCV 4 fills the missing part of a truncated JPEG with grey and says nothing.
    if kind == "jpeg" and b"\xff\xd9" not in data[-4096:]:
        raise Unreadable("unreadable", "truncated")
    with Image.open(io.BytesIO(data)) as header:  # the size, before any decoding
        if header.width * header.height > MAX_PIXELS:
            raise Unreadable("too_large")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise Unreadable("unreadable")
    if pixels.ndim == 3 and pixels.shape[2] == 2:
        return np.ascontiguousarray(pixels[..., 0])  # grey with alpha
    if pixels.ndim == 3:
        return np.ascontiguousarray(pixels[..., 2::-1])  # BGR(A): alpha says nothing
    return pixels


def _read_pillow(data: bytes, fps: float, max_frames: int) -> Clip:
    """TIFF, GIF, WebP, PNM, with all their pages."""
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        count = getattr(image, "n_frames", 1)
        chosen = choose_frames(count, image.info.get("duration"), fps, max_frames)
        for position in chosen:
            image.seek(position)
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable("too_large")
            if image.mode in ("1", "LA"):
                frames.append(np.asarray(image.convert("L")))
            elif image.mode in ("L", "F", "RGB") or image.mode.startswith("I"):
                frames.append(np.asarray(image))
            else:
                frames.append(np.asarray(image.convert("RGB")))
    return Clip(stretch(frames), chosen, count)


def _from_array(array: np.ndarray, fps: float, max_frames: int) -> Clip:
    """[H,W], [H,W,3|4], [N,H,W] or [N,H,W,3|4] of any number type."""
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        array = array[None]
    if array.ndim == 4 and array.shape[3] in (3, 4):
        array = array[..., :3]
    elif array.ndim != 3:
        raise Unreadable("unsupported", "array shape")
    count, height, width = array.shape[:3]
    if not array.size:
        raise Unreadable("empty")
    if height * width > MAX_PIXELS:
        raise Unreadable("too_large")
    chosen = choose_frames(count, None, fps, max_frames)
    frames = stretch([np.ascontiguousarray(array[i]) for i in chosen])
    return Clip(frames, chosen, count)


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


def read_video(path: str | os.PathLike, fps: float, max_frames: int) -> Clip:
    """Chosen frames of a video file that OpenCV can open. Raises Unreadable."""
    capture = cv2.VideoCapture(os.fspath(path))
    try:
        if not capture.isOpened():
            raise Unreadable("unreadable")
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS)
        width = capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        if width * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS:
            raise Unreadable("too_large")
        if not 1 <= count < 10**7:
            raise Unreadable("bad_frame_count")
        milliseconds = 1000 / rate if 0 < rate < 1000 else None
        chosen = choose_frames(count, milliseconds, fps, max_frames)
        frames, wanted = [], set(chosen)
        for position in range(chosen[-1] + 1):
            # Containers overstate their length: keep what there is.
            if not capture.grab():
                break
            if position in wanted:
                good, pixels = capture.retrieve()
                if not good:
                    break
                frames.append(np.ascontiguousarray(pixels[..., ::-1]))
    finally:
        capture.release()
    if not frames:
        raise Unreadable("unreadable")
    return Clip(frames, chosen[: len(frames)], count)
