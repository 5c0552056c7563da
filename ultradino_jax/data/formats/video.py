"""Video files through OpenCV."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from ultradino_jax.data.formats.frames import MAX_PIXELS, Clip, choose_frames
from ultradino_jax.data.formats.unreadable import Unreadable

_MAX_FRAMES = 10**6


def read_video(path: str | os.PathLike, fps: float, max_frames: int) -> Clip:
    """Chosen frames of a video file that OpenCV can open, RGB. Raises Unreadable.

    Headers that lie about the number of frames, in either direction, are found out by
    reading on: then the frames are counted, and chosen among those that are there.
    """
    with tempfile.TemporaryDirectory() as folder:
        # By another name: OpenCV crashes on names that are no UTF-8, and takes a '%'
        # for the pattern of a sequence of pictures.
        link = os.path.join(folder, "video")
        os.symlink(os.path.abspath(path), link)
        clip = _read(link, fps, max_frames, None)
        if clip is None:
            clip = _read(link, fps, max_frames, _count(link))
    if clip is None or not clip.frames:
        raise Unreadable("unreadable")
    return clip


@contextmanager
def _opened(path: str) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise Unreadable("unreadable")
        width = capture.get(cv2.CAP_PROP_FRAME_WIDTH)
        if width * capture.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS:
            raise Unreadable("too_large")
        yield capture
    finally:
        capture.release()


def _count(path: str) -> int:
    """Frames that there are."""
    with _opened(path) as capture:
        count = 0
        while count < _MAX_FRAMES and capture.grab():
            count += 1
    return count


def _read(path: str, fps: float, max_frames: int, known: int | None) -> Clip | None:
    """Chosen frames; None when there are not as many as the header says.

    known: how many there are, None to believe the header.
    """
    with _opened(path) as capture:
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if known is None else known
        if not 1 <= count <= _MAX_FRAMES:
            if known is None:
                return None
            raise Unreadable("bad_frame_count")
        rate = capture.get(cv2.CAP_PROP_FPS)
        milliseconds = 1000 / rate if 0 < rate < 1000 else None
        chosen = choose_frames(count, milliseconds, fps, max_frames)
        frames, wanted = [], set(chosen)
        for position in range(chosen[-1] + 1):
            good = capture.grab()
            if good and position in wanted:
                good, pixels = capture.retrieve()
                if good:
                    frames.append(np.ascontiguousarray(pixels[..., ::-1]))
            if not good:
                if known is None:
                    return None
                break
        if known is None and chosen[-1] == count - 1 and capture.grab():
            return None  # there are more
    return Clip(frames, chosen[: len(frames)], count)
