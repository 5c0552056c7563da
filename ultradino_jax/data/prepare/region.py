"""Where the ultrasound is in a frame: from the DICOM region tags, else from the pixels.

Everything outside the region (patient banner, settings, bars, logos) is blacked out and
cropped away before anything is stored. When neither the tags nor the pixels name a
region the caller must skip the frame.
"""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np

# Masks are found on a copy whose long side is at most this. It makes the kernel sizes
# below mean the same on every machine, and thins out burned-in text.
_LONG_SIDE = 512
_DARK = 48  # video capture puts black at 16, with noise around it
_MIN_SIDE = 32  # a region smaller than this many pixels is of no use
_MIN_AREA = 0.01  # of the frame
_UI_COLOUR = 20  # max(R,G,B) - min(R,G,B) above which a pixel is not B-mode grey
_DOPPLER_SHARE = 0.005  # of the region


class Box(NamedTuple):
    """Half-open pixel box: rows y0:y1, columns x0:x1."""

    y0: int
    x0: int
    y1: int
    x1: int


def _ellipse(side: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _integer(value) -> int | None:
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    return int(value) if math.isfinite(value) else None


def bmode_boxes(regions, rows: int, columns: int) -> list[Box] | None:
    """B-mode boxes named by a DICOM Sequence of Ultrasound Regions (0018,6011).

    regions: items with RegionSpatialFormat, RegionDataType and RegionLocation*
      attributes (PS3.3 C.8.5.5: corners are zero-based and inclusive).
    Returns the boxes; [] when the tags say that nothing here is B-mode (only M-mode,
    spectra, waveforms or graphics); None when the tags do not fit this pixel array (an
    archive that crops or rescales images often keeps the old tags) or are missing or
    malformed: then the pixels have to tell.
    """
    found: dict[int, list[Box]] = {1: [], 2: []}
    items = list(regions or [])
    for item in items:
        kind = _integer(getattr(item, "RegionDataType", None))
        if _integer(getattr(item, "RegionSpatialFormat", None)) != 1:
            continue
        if kind not in found:
            continue
        corners = [
            _integer(getattr(item, f"RegionLocation{name}", None))
            for name in ("MinY0", "MinX0", "MaxY1", "MaxX1")
        ]
        y0, x0, y1, x1 = corners
        if y0 is None or x0 is None or y1 is None or x1 is None:
            return None
        # Some vendors write an exclusive corner: one pixel too many is still a fit.
        if y0 < 0 or x0 < 0 or y1 > rows or x1 > columns:
            return None
        box = Box(y0, x0, min(y1 + 1, rows), min(x1 + 1, columns))
        if min(box.y1 - box.y0, box.x1 - box.x0) >= _MIN_SIDE:
            found[kind].append(box)
    if not items or (not any(found.values()) and _mentions_2d(items)):
        return None
    # Colour flow (2) is drawn over tissue (1) and only counts when it stands alone.
    boxes = found[1] or found[2]
    return [
        a
        for i, a in enumerate(boxes)
        if not any(_inside(a, b) and (a != b or j < i) for j, b in enumerate(boxes))
    ]


def _mentions_2d(items) -> bool:
    return any(
        _integer(getattr(item, "RegionSpatialFormat", None)) in (1, None)
        for item in items
    )


def _inside(a: Box, b: Box) -> bool:
    return a is not b and (
        a.y0 >= b.y0 and a.x0 >= b.x0 and a.y1 <= b.y1 and a.x1 <= b.x1
    )


def chroma(rgb: np.ndarray) -> np.ndarray | None:
    """[H,W,3] uint8 -> max(R,G,B) - min(R,G,B) [H,W] uint8; None for a grey picture.

    A uniform tint (sepia and other B-mode colour maps: one moderate hue on most of the
    tissue) counts as grey.
    """
    red, green, blue = cv2.split(rgb)
    if np.array_equal(red, green) and np.array_equal(green, blue):
        return None
    high = cv2.max(cv2.max(red, green), blue)
    spread = high - cv2.min(cv2.min(red, green), blue)
    tissue = high > 40
    coloured = tissue & (spread > _UI_COLOUR)
    if coloured.sum() > 0.5 * tissue.sum() and tissue.any():
        hue = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 0][coloured] * (np.pi / 90)
        tight = np.hypot(np.cos(hue).mean(), np.sin(hue).mean())
        saturation = np.median(spread[coloured] / high[coloured].astype(np.float32))
        if tight > 0.97 and saturation < 0.6:
            return None
    return spread


def has_colour_flow(spread: np.ndarray | None, mask: np.ndarray) -> bool:
    """Whether colour Doppler (or another colour overlay) fills part of the region.

    spread: `chroma` of the frame [H,W] or None; mask: the region [H,W] bool.
    Thin coloured graphics (calipers, traces) are opened away first.
    """
    if spread is None or not mask.any():
        return False
    side = max(3, round(max(mask.shape) / 200)) | 1
    blobs = cv2.morphologyEx(
        ((spread > _UI_COLOUR + 10) & mask).astype(np.uint8),
        cv2.MORPH_OPEN,
        _ellipse(side),
    )
    return blobs.sum() > _DOPPLER_SHARE * mask.sum()


def _shrink(plane: np.ndarray) -> np.ndarray:
    height, width = plane.shape
    scale = min(1.0, _LONG_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(plane, size, interpolation=cv2.INTER_AREA)


def _black_level(plane: np.ndarray) -> tuple[int, int]:
    """Grey level of the empty screen and how far above it noise reaches, at least 1."""
    counts = np.bincount(plane.ravel(), minlength=256)
    black = top = int(counts[:_DARK].argmax())
    if counts[black] < 0.05 * plane.size:
        return 0, 1  # no screen: the picture fills the frame
    while top < _DARK and counts[top + 1] > 0.15 * counts[black]:
        top += 1
    return black, max(top - black, 1)


def _live(planes: list[np.ndarray], spreads: list[np.ndarray | None]) -> np.ndarray:
    """Pixels that look like tissue [h,w] uint8 0/1, from small grey planes.

    A grey opening removes strokes thinner than its kernel: text, ticks, calipers. Flat
    fills (bars, label maps, blank paper) have no texture. In a clip, what never moves
    is interface.
    """
    black, noise = _black_level(planes[0])
    # It takes a number too, which its stub leaves out.
    subtract: Any = cv2.subtract
    planes = [subtract(plane, black) for plane in planes]
    peak = np.max(planes, axis=0)
    opened = cv2.morphologyEx(peak, cv2.MORPH_OPEN, _ellipse(5))
    near = np.ones((5, 5), np.uint8)
    live = (opened > noise) & (cv2.dilate(opened, near) > cv2.erode(opened, near))
    # Compression leaves a haze between letters, far darker than the letters.
    live &= opened > cv2.dilate(peak, _ellipse(7)) // 8
    coloured = [s for s in spreads if s is not None]
    if coloured:
        live &= np.min(coloured, axis=0) <= _UI_COLOUR
    if len(planes) >= 3:
        swing = cv2.blur(peak - np.min(planes, axis=0), (3, 3)) > noise
        swing = cv2.morphologyEx(swing.astype(np.uint8), cv2.MORPH_OPEN, _ellipse(3))
        swing = cv2.morphologyEx(swing, cv2.MORPH_CLOSE, _ellipse(9))
        if swing.mean() > 2 * _MIN_AREA:  # else a frozen clip: motion says nothing
            live &= swing > 0
    live = live.astype(np.uint8)
    live = cv2.morphologyEx(live, cv2.MORPH_CLOSE, _ellipse(5))
    side = max(3, round(max(live.shape) / 32)) | 1
    return cv2.morphologyEx(live, cv2.MORPH_OPEN, _ellipse(side))


def _is_bar(width: int, height: int, area: int) -> bool:
    longest, shortest = max(width, height), min(width, height)
    return longest > 6 * shortest and area > 0.85 * width * height


def _looks_like_paper(plane: np.ndarray, mask: np.ndarray) -> bool:
    # Tissue spreads over many levels; scanned pages and screens sit on one.
    counts = np.bincount(plane[mask > 0], minlength=256)
    return counts[_DARK:].max() > 0.25 * counts.sum()


def sector_mask(
    frames: list[np.ndarray], spreads: list[np.ndarray | None] | None = None
) -> np.ndarray | None:
    """The ultrasound sector of one still or of a clip, found from its pixels.

    frames: grey [H,W] uint8, all of one shape (a clip shares one mask). spreads: their
    `chroma`, or None where grey. Largest textured, uncoloured, (in clips) moving part,
    joined with others of a tenth of its size, then its convex hull: the recipe of the
    public ultrasound cleaning tools, with text removed first.
    Returns [H,W] bool, or None when nothing looks like a sector.
    """
    planes = [_shrink(f) for f in frames]
    small = [None if s is None else _shrink(s) for s in spreads or []]
    live = _live(planes, small)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(live, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not areas.size or areas.max() < _MIN_AREA * live.size:
        return None
    keep = [
        i
        for i, (_, _, w, h, area) in enumerate(stats[1:].tolist(), start=1)
        if area == areas.max() or (area > areas.max() / 10 and not _is_bar(w, h, area))
    ]
    tissue = np.isin(labels, keep).astype(np.uint8)
    outlines, _ = cv2.findContours(tissue, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    hull = cv2.convexHull(np.concatenate(outlines))
    filled = cv2.fillConvexPoly(np.zeros_like(tissue), hull, 1)
    if tissue.sum() < 0.35 * filled.sum() or _looks_like_paper(planes[0], filled):
        return None
    height, width = frames[0].shape
    # Map pixel centres of the small hull to the full grid (16 = 4 fractional bits).
    scale = np.array([width / live.shape[1], height / live.shape[0]])
    corners = np.round(((hull[:, 0] + 0.5) * scale - 0.5) * 16).astype(np.int32)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillConvexPoly(mask, corners, 1, shift=4)
    if _extent(mask) is None:
        return None
    return mask > 0


def _extent(mask: np.ndarray) -> Box | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size < _MIN_SIDE or columns.size < _MIN_SIDE:
        return None
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def find_regions(
    frames: list[np.ndarray],
    spreads: list[np.ndarray | None],
    boxes: list[Box] | None,
) -> list[tuple[Box, np.ndarray]]:
    """Regions of a clip: (box in the frame, mask [h,w] bool inside the box).

    boxes: from `bmode_boxes`. Without them the whole frame is searched. Each box is
    searched for its sector, so that text inside a box goes too. Returns [] when the
    frames must be skipped.
    """
    height, width = frames[0].shape
    found = []
    for outer in [Box(0, 0, height, width)] if boxes is None else boxes:
        rows, columns = slice(outer.y0, outer.y1), slice(outer.x0, outer.x1)
        mask = sector_mask(
            [f[rows, columns] for f in frames],
            [None if s is None else s[rows, columns] for s in spreads],
        )
        if mask is None:
            continue
        inner = _extent(mask)
        assert inner is not None  # sector_mask makes sure
        box = Box(
            outer.y0 + inner.y0,
            outer.x0 + inner.x0,
            outer.y0 + inner.y1,
            outer.x0 + inner.x1,
        )
        found.append((box, mask[inner.y0 : inner.y1, inner.x0 : inner.x1]))
    return found


def crop(frame: np.ndarray, box: Box, mask: np.ndarray) -> np.ndarray:
    """Grey frame [H,W] -> the box's pixels [h,w], black outside the mask [h,w]."""
    return cv2.copyTo(frame[box.y0 : box.y1, box.x0 : box.x1], mask.view(np.uint8))
