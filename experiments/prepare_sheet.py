"""Draws docs/prepare_contact_sheet.png: frames as exported, and what prepare keeps.

    python -m experiments.prepare_sheet docs/prepare_contact_sheet.png

Top rows: the five ultrasound files that come with pydicom. Below: one phantom patient's
DICOM files. Each frame with the region found (white outline) stands left of its crop.
"""

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
from pydicom.data import get_testdata_file

from ultradino_jax.data.formats.dicom import read_dicom
from ultradino_jax.data.phantom.dicom import write_dicom
from ultradino_jax.data.prepare.region import (
    bmode_boxes,
    chroma,
    crop,
    find_regions,
    has_colour_flow,
)

_FILES = (
    "examples_palette.dcm",
    "examples_ybr_color.dcm",
    "examples_rgb_color.dcm",
    "examples_jpeg2k.dcm",
    "ExplVR_BigEnd.dcm",
)
_WIDTH, _HEIGHT = 200, 130


def pair(path: Path) -> np.ndarray:
    """[H, 2W] tile: first frame with outline, and the crop if there is one."""
    clip = read_dicom(path.read_bytes(), 30.0, 32, False)
    colour = [frame.ndim == 3 for frame in clip.frames]
    grey = [
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) if c else frame
        for frame, c in zip(clip.frames, colour, strict=True)
    ]
    spreads = [
        chroma(frame) if c else None
        for frame, c in zip(clip.frames, colour, strict=True)
    ]
    boxes = bmode_boxes(clip.regions, *grey[0].shape) if clip.regions else None
    frame, kept, note = grey[0].copy(), None, "left out"
    for box, mask in find_regions(grey, spreads, boxes):
        place = np.zeros(frame.shape, np.uint8)
        place[box.y0 : box.y1, box.x0 : box.x1] = mask
        outline, _ = cv2.findContours(place, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(frame, outline, -1, 255, max(1, round(frame.shape[1] / 200)))
        if spreads[0] is not None and has_colour_flow(spreads[0], place > 0):
            note = "left out: colour"
        else:
            kept = crop(grey[0], box, mask)
    if kept is None:
        kept = np.zeros((_HEIGHT, _WIDTH), np.uint8)
        cv2.putText(kept, note, (20, _HEIGHT // 2), 0, 0.5, 200, 1, cv2.LINE_AA)
    return np.hstack([_fit(frame), _fit(kept)])


def _fit(picture: np.ndarray) -> np.ndarray:
    scale = min((_WIDTH - 6) / picture.shape[1], (_HEIGHT - 6) / picture.shape[0])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    tile = np.full((_HEIGHT, _WIDTH), 40, np.uint8)
    tile[3 : 3 + size[1], 3 : 3 + size[0]] = small
    return tile


def main() -> None:
    """Writes the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        write_dicom(Path(folder), 1)
        paths = [Path(str(get_testdata_file(name, download=False))) for name in _FILES]
        paths += sorted(p for p in Path(folder).rglob("IM_*"))
        tiles = [pair(path) for path in paths]
    tiles += [np.full_like(tiles[0], 40)] * (-len(tiles) % 2)
    rows = [np.hstack(tiles[i : i + 2]) for i in range(0, len(tiles), 2)]
    cv2.imwrite(str(out), np.vstack(rows), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
