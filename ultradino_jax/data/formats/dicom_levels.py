"""Stored numbers of a DICOM frame -> grey levels, as its tags say they are shown."""

from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

from ultradino_jax.data.formats.depth import DEPTHS, to_uint8
from ultradino_jax.data.formats.dicom_tags import items, number, numbers, text


class Window(NamedTuple):
    """A VOI window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""

    centre: float
    width: float
    function: str

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Values -> uint8."""
        x = values.astype(np.float64) - self.centre
        if self.function == "SIGMOID":
            share = 1 / (1 + np.exp(np.clip(-4 * x / self.width, -700, 700)))
        elif self.function == "LINEAR_EXACT":
            share = x / self.width + 0.5
        else:
            share = (x + 0.5) / max(self.width - 1, 1e-6) + 0.5
        return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def grey_levels(
    frames: list[np.ndarray], positions: list[int], dataset: Dataset, colour: str
) -> list[np.ndarray]:
    """Stored numbers [H,W] of frames at some positions -> uint8 [H,W].

    Rescale and window come from the frame's own functional group, the shared one or the
    file, in this order. Without window or VOI table the general rule of `depth` holds,
    for all frames alike. colour: MONOCHROME1 is inverted, as is PresentationLUTShape.
    """
    shown: dict[int, np.ndarray] = {}
    rest: dict[int, np.ndarray] = {}
    falling = False
    for position, frame in zip(positions, frames, strict=True):
        places = _places(dataset, position)
        values, slope = _rescaled(frame, places, dataset)
        window = _window(places)
        if items(dataset, "VOILUTSequence"):
            shown[position] = _by_table(values, dataset)
        elif window:
            shown[position] = window.levels(values)
        else:  # a slope alone changes no level, unless it falls
            rest[position] = frame if slope is not None else values
            falling = slope is not None and slope < 0
    if rest:
        levels = to_uint8(list(rest.values()))
        levels = [255 - x for x in levels] if falling else levels
        shown |= dict(zip(rest, levels, strict=True))
    inverse = text(dataset, "PresentationLUTShape") == "INVERSE"
    if colour == "MONOCHROME1" or inverse:
        return [255 - shown[p] for p in positions]
    return [shown[p] for p in positions]


def _places(dataset: Dataset, position: int) -> list[Dataset]:
    """Where the tags of one frame may lie, nearest first."""
    each = items(dataset, "PerFrameFunctionalGroupsSequence")
    own = each[position : position + 1]
    return [*own, *items(dataset, "SharedFunctionalGroupsSequence")[:1], dataset]


def _inside(place: Dataset, sequence: str) -> Dataset:
    """The item of a functional group, or the place itself for the file's own tags."""
    return next(iter(items(place, sequence)), place)


def _rescaled(
    frame: np.ndarray, places: list[Dataset], dataset: Dataset
) -> tuple[np.ndarray, float | None]:
    """(values after the modality transform, its slope, or None after a table)."""
    if items(dataset, "ModalityLUTSequence"):
        return apply_modality_lut(_indices(frame), dataset), None
    for place in places:
        group = _inside(place, "PixelValueTransformationSequence")
        slope = number(group, "RescaleSlope")
        intercept = number(group, "RescaleIntercept")
        if slope is not None or intercept is not None:
            slope = 1.0 if slope is None else slope
            if slope == 0:
                break
            return frame * np.float64(slope) + (intercept or 0.0), slope
    return frame, 1.0


def _indices(frame: np.ndarray) -> np.ndarray:
    return np.rint(frame).astype(np.int64).astype(np.int32)


def _window(places: list[Dataset]) -> Window | None:
    """The first window that can be used."""
    for place in places:
        group = _inside(place, "FrameVOILUTSequence")
        centres, widths = numbers(group, "WindowCenter"), numbers(group, "WindowWidth")
        function = text(group, "VOILUTFunction") or "LINEAR"
        smallest = {"LINEAR": 1.0, "LINEAR_EXACT": 1e-9, "SIGMOID": 1e-9}.get(function)
        if centres and widths and smallest is not None and widths[0] >= smallest:
            return Window(centres[0], widths[0], function)
    return None


def _by_table(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """By the first VOI table; its own largest entry says what range it has."""
    largest = _largest(items(dataset, "VOILUTSequence")[0])
    span = 2.0 ** min(b for b in DEPTHS if largest < 2**b) - 1
    looked_up = apply_voi_lut(_indices(values), dataset, prefer_lut=True)
    return np.rint(np.clip(looked_up / span, 0, 1) * 255).astype(np.uint8)


def _largest(table: Dataset) -> float:
    data = table.get("LUTData")
    if isinstance(data, bytes):  # of VR OW: words, or bytes where there are as many
        entries = int(numbers(table, "LUTDescriptor")[0]) or 2**16
        kind = "<u2" if len(data) >= 2 * entries else "u1"
        return float(np.frombuffer(data, kind).max(initial=0))
    return max(numbers(table, "LUTData") or [255.0])


def coloured(frames: list[np.ndarray], dataset: Dataset) -> list[np.ndarray]:
    """Palette indices [H,W] -> uint8 [H,W,3].

    Palettes of 16 bits keep the level in the high byte (0xff00 is white), unless no
    entry is above 255.
    """
    found = [apply_color_lut(np.ascontiguousarray(f), dataset) for f in frames]
    high = max(int(f.max(initial=0)) for f in found) > 255
    return [(f >> 8 if high else f).astype(np.uint8) for f in found]
