"""Command line of the phantom: synthetic ultrasound on disk, in a known layout.

    python -m ultradino_jax.phantom --layout=fetal_planes --patients 20 --out data/
    python -m ultradino_jax.phantom --layout=sheet --out docs/phantom.png

The same arguments give the same bytes. About 20 images a second and core at full size.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ultradino_jax.cli import command
from ultradino_jax.data.phantom import layouts
from ultradino_jax.data.phantom.dicom import write_dicom
from ultradino_jax.data.phantom.render import (
    FASS_STRUCTURES,
    JNU_STRUCTURES,
    PLANES,
    PhantomImage,
    render_phantom,
)
from ultradino_jax.errors import UserError
from ultradino_jax.whole import named

LAYOUTS = {
    "fetal_planes": layouts.write_fetal_planes,
    "fass": layouts.write_fass,
    "jnu_ifm": layouts.write_jnu_ifm,
    "psfhs": layouts.write_psfhs,
    "african": layouts.write_african,
    "dicom": write_dicom,
    "folder": layouts.write_folder,
}


def write_phantoms(
    layout: str,
    out: str | Path,
    *,
    patients: int = 4,
    seed: int = 0,
    size: int | None = None,
    settings: int | None = None,
) -> Path:
    """Write phantoms in the layout of a real data set; returns the folder.

    layout: one of LAYOUTS. size: pixels of the longer side; None as the real set.
    settings: number of scanners and mothers, for 'fetal_planes' only. Raises UserError
    for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    options = {"settings": settings} if settings else {}
    LAYOUTS[layout](named(out, "folder"), patients, seed, size, **options)
    return Path(out)


# The sheet's palette: 32 greys keep the file small, four colours name structures.
OUTLINES = ((255, 80, 80), (80, 220, 100), (90, 150, 255), (255, 220, 80))


def write_sheet(path: Path, patients: int, seed: int = 0, size: int | None = None):
    """A contact sheet: a column per plane, a row per patient, FASS and JNU below.

    path: a .png file. Structures of the last two rows are outlined. size: pixels of a
    tile's longer side. Raises UserError for another kind of file.
    """
    if path.suffix != ".png":
        raise UserError(f"{str(path)!r}: a sheet is written to a file NAME.png")
    options = {"seed": seed, "size": layouts.fitted((384, 512), size or 168)}
    rows = []
    for patient in range(patients):
        tiles = [
            render_phantom(6 * patient + k, images_per_patient=6, **options)
            for k in range(6)
        ]
        rows.append(sorted(tiles, key=lambda tile: tile.label))
    bands = [_band(6 * options["size"][1], [(plane, 31) for plane in PLANES])]
    bands += [_row(row) for row in rows]
    for task, names in (("fass", FASS_STRUCTURES), ("jnu", JNU_STRUCTURES)):
        words = [(task, 31)] + [(name, 32 + k) for k, name in enumerate(names)]
        bands.append(_band(bands[0].shape[1], words))
        tiles = [render_phantom(12 * k, task=task, **options) for k in range(6)]
        bands.append(_row(tiles))
    picture = Image.fromarray(np.concatenate(bands), "P")
    greys = np.repeat(np.arange(32) * 255 // 31, 3).tolist()
    picture.putpalette(greys + [value for colour in OUTLINES for value in colour])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def _row(tiles) -> np.ndarray:
    return np.concatenate([_tile(tile) for tile in tiles], 1)


def _band(width: int, words: list[tuple[str, int]]) -> np.ndarray:
    """A line of words in six columns, each with its palette index."""
    band = np.zeros((18, width), np.uint8)
    for k, (word, colour) in enumerate(words):
        at = (k * width // 6 + 4, 13)
        ink = np.zeros_like(band)
        cv2.putText(ink, word, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 255, 1)
        band[ink > 90] = colour
    return band


def _tile(phantom: PhantomImage) -> np.ndarray:
    """Palette indices [H, W]: 0-31 grey, 32-35 the outlines of fass and jnu."""
    tile = phantom.image >> 3
    if tuple(phantom.masks) in (FASS_STRUCTURES, JNU_STRUCTURES):
        for k, mask in enumerate(phantom.masks.values()):
            edge = mask - cv2.erode(mask, np.ones((3, 3), np.uint8))
            tile[edge > 0] = 32 + k
    return tile


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and write; bad flags end with one line and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m ultradino_jax.phantom",
        description="Write synthetic ultrasound images in the layout of a real set.",
    )
    parser.add_argument("--layout", required=True, choices=[*LAYOUTS, "sheet"])
    parser.add_argument("--out", required=True, type=Path, help="folder (sheet: file)")
    parser.add_argument("--patients", type=int, default=4, help="default 4")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--size", type=int, help="pixels of the longer side; default as the real set"
    )
    parser.add_argument(
        "--settings", type=int, help="scanners and mothers; fetal_planes only"
    )
    args = parser.parse_args(argv)
    if args.settings is not None and (
        args.settings < 1 or args.layout != "fetal_planes"
    ):
        parser.error("--settings is a number of at least 1, for --layout=fetal_planes")
    if args.patients < 1 or args.seed < 0 or (args.size is not None and args.size < 32):
        parser.error("--patients must be >= 1, --seed >= 0 and --size >= 32")
    cv2.setNumThreads(0)
    if args.layout == "sheet":
        write_sheet(args.out, args.patients, args.seed, args.size)
    else:
        options = {"settings": args.settings} if args.settings else {}
        LAYOUTS[args.layout](args.out, args.patients, args.seed, args.size, **options)
    print(f"phantom: wrote {args.layout} of {args.patients} patients to {args.out}")


if __name__ == "__main__":
    command(main)
