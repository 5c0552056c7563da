"""Any file -> frames. The bytes say what a file is, never its name."""

import os
import re

import numpy as np

from ultradino_jax.data.formats.archives import KINDS as ARCHIVES
from ultradino_jax.data.formats.arrays import KINDS as ARRAYS
from ultradino_jax.data.formats.arrays import is_nifti, read_array
from ultradino_jax.data.formats.depth import to_uint8
from ultradino_jax.data.formats.frames import (
    MAX_BYTES,
    Clip,
    choose_frames,
)
from ultradino_jax.data.formats.stills import count_pages, read_pages, to_grey
from ultradino_jax.data.formats.unreadable import Unreadable

HEAD = 512  # bytes that `kind_of` needs
_VIDEO = (b"\x1aE\xdf\xa3", b"\0\0\x01\xba", b"\0\0\x01\xb3", b"0&\xb2u")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # and BigTIFF
STILLS = ("png", "jpeg", "bmp", "pillow")


def kind_of(head: bytes) -> str:
    """Kind of a file from its first HEAD bytes; "" when it is none this project reads.

    One of png jpeg bmp pillow dicom mha npy nifti video, or zip tar gzip xz bzip2.
    """
    if looks_like_dicom(head):
        return "dicom"
    if is_nifti(head):
        return "nifti"
    starts = {
        "png": (b"\x89PNG\r\n\x1a\n",),
        "jpeg": (b"\xff\xd8\xff",),
        "npy": (b"\x93NUMPY",),
        "zip": (b"PK\x03\x04", b"PK\x05\x06"),
        "gzip": (b"\x1f\x8b",),
        "xz": (b"\xfd7zXZ\0",),
        "bzip2": (b"BZh",),
        "video": _VIDEO,
        "pillow": (*_TIFF, b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    }
    for kind, magics in starts.items():
        if head.startswith(magics):
            return kind
    if re.match(rb"P[1-6]\s+[#\d]", head):  # PNM
        return "pillow"
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
    path: str | os.PathLike | None = None,
) -> Clip:
    """Chosen frames of one file held in memory (videos: `video.read_video`).

    fps, max_frames: see `frames.choose_frames`. any_modality: take DICOM that is not
    ultrasound. path: where the file lies, None in an archive. Raises Unreadable;
    decoders may raise other errors on damaged files.
    """
    if kind == "dicom":
        # Slow to import: only where there is one.
        from ultradino_jax.data.formats.dicom import read_dicom

        return read_dicom(data, fps, max_frames, any_modality)
    if kind in STILLS:
        return Clip(
            *read_pages(data, lambda n, ms: choose_frames(n, ms, fps, max_frames))
        )
    if kind in ARRAYS:
        frames = read_array(data, kind, path)
        chosen = choose_frames(len(frames), None, fps, max_frames)
        pages = to_uint8([np.ascontiguousarray(frames[i]) for i in chosen])
        return Clip(pages, chosen, len(frames))
    raise Unreadable("unsupported")


def read_picture(
    source: str | os.PathLike | bytes, channels: int | None = None
) -> tuple[np.ndarray, int]:
    """(the first frame of a file, how many frames there are in it).

    The frame is uint8 [H,W] or [H,W,3] RGB; channels: 1 or 3 for one of them whatever
    the file holds. DICOM of any modality is taken; what a sequence says of itself is
    prepare's to ask. Raises Unreadable, and OSError for a file that cannot be read;
    decoders may raise other errors on damaged files.
    """
    path = None if isinstance(source, bytes) else source
    data = source if isinstance(source, bytes) else _content(source)
    if not data:
        raise Unreadable("empty")
    kind = kind_of(data[:HEAD])
    if kind == "video":
        raise Unreadable("video")
    if kind in ARCHIVES:
        raise Unreadable("archive")
    if kind in STILLS:
        pages, _, count = read_pages(data, lambda *_: [0], grey=channels == 1)
    else:
        clip = read_clip(data, kind, max_frames=1, any_modality=True, path=path)
        pages, count = clip.frames, clip.count
    pixels = to_grey(pages[0]) if channels == 1 else pages[0]
    if channels == 3 and pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels, count


def count_frames(path: str | os.PathLike) -> int:
    """How many frames a file says it has, found without decoding where there is a way.

    1 for a file that cannot be read: who reads it will say why.
    """
    try:
        with open(path, "rb") as file:
            kind = kind_of(file.read(HEAD))
        if kind == "dicom":
            from ultradino_jax.data.formats.dicom import declared_frames

            return declared_frames(path)
        if kind in STILLS:
            return count_pages(path)
        return read_picture(path)[1]
    except Exception:  # decoders raise what they like
        return 1


def _content(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        # By size: read(n) takes memory for n bytes, read() alone copies once more.
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise Unreadable("too_large")
        return file.read(size)
