"""A clip of 8-bit frames: what every reader returns, and how frames are chosen."""

from dataclasses import dataclass

import numpy as np

MAX_PIXELS = 2**25  # of one frame: 33 million, an 8K screen
MAX_SIDE = 2**15 - 1  # the widest that every encoder takes
MAX_BYTES = 2**31  # of one file
MAX_INFLATED = 2**28  # of a file that is packed as a whole: 300 frames of 1024 x 768
_ASSUMED_MS = 33.0  # clips without frame times are taken to run at 30 frames/s


@dataclass
class Clip:
    """Frames chosen from one file.

    frames: uint8 [H,W] grey or [H,W,3] RGB. chosen: their positions in the file.
    count: frames in the file. regions: DICOM region tags, if any. patient, study: what
    identifies them in the input; they leave memory only as keyed hashes.
    """

    frames: list[np.ndarray]
    chosen: list[int]
    count: int
    regions: object = None
    patient: str | None = None
    study: str | None = None


def choose_frames(
    count: int, frame_ms: float | None, fps: float, max_frames: int
) -> list[int]:
    """Positions of the frames to keep: at most `fps` per second and `max_frames`.

    Evenly spaced from the first to the last of `count` frames. frame_ms: milliseconds
    between frames, None where unknown.
    """
    stride = max(1.0, 1000 / fps / (frame_ms or _ASSUMED_MS))
    keep = min(count, max_frames, 1 + int((count - 1) / stride))
    if keep == 1:
        return [0]
    return [round(i * (count - 1) / (keep - 1)) for i in range(keep)]
