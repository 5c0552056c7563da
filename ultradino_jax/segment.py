"""Masks of every image of a folder, at each image's own size.

    python -m ultradino_jax.segment --checkpoint runs/fass/teacher/seed0 \
        --input IMAGES --output MASKS

`--checkpoint` is the folder of a training that eval.py made with a segmentation config.
Masks are PNGs of class indices in the folders of the input; `classes.json` says what
the indices mean. Run it again after an interruption and it goes on.
"""

import argparse
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ultradino_jax.cli import command
from ultradino_jax.data.sources import (
    IGNORED,
    BadImage,
    open_source,
    report_ignored,
)
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.segmentation.results import overlay
from ultradino_jax.evaluators.segmentation.segmenter import Segmenter, load_segmenter
from ultradino_jax.progress import Progress
from ultradino_jax.whole import claim, named, whole_file

MODES = ("resize", "window")


def class_scores(
    segmenter: Segmenter, image: np.ndarray, mode: str = "resize", batch_size: int = 8
) -> np.ndarray:
    """uint8 [H,W,C] of any size -> logits float32 [H,W,Y].

    'resize': the image is brought to the network's square as in training (stretched, or
    in a letterbox) and the logits back, bilinearly. 'window': squares of the network's
    side at half a side's stride see the image at its own scale; logits are averaged
    where they overlap and a smaller image is padded with black. Raises UserError for
    another mode.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    height, width = image.shape[:2]
    side = segmenter.preprocess.image_size
    if mode == "resize":
        square = segmenter.preprocess.resize(image)
        y, x, h, w = segmenter.preprocess.box(image.shape)
        logits = segmenter.logits(square[None])[0, y : y + h, x : x + w]
        return cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR)
    pad = [(0, max(side - n, 0)) for n in (height, width)]
    padded = np.pad(image, [*pad, (0, 0)])
    places = [
        (y, x)
        for y in window_starts(padded.shape[0], side)
        for x in window_starts(padded.shape[1], side)
    ]
    total = np.zeros((*padded.shape[:2], len(segmenter.classes)), np.float32)
    weight = np.zeros((*padded.shape[:2], 1), np.float32)
    for start in range(0, len(places), batch_size):
        chunk = places[start : start + batch_size]
        windows = [padded[y : y + side, x : x + side] for y, x in chunk]
        # One shape for all batches: the last is filled up with its last window.
        windows += windows[-1:] * (batch_size - len(windows))
        for (y, x), logits in zip(
            chunk, segmenter.logits(np.stack(windows)), strict=False
        ):
            total[y : y + side, x : x + side] += logits
            weight[y : y + side, x : x + side] += 1
    return (total / weight)[:height, :width]


def window_starts(length: int, side: int) -> list[int]:
    """Starts of windows that cover [0, length), half a side apart, the last flush."""
    return [*range(0, length - side, max(side // 2, 1)), length - side]


def segment(
    checkpoint: str | Path,
    images: str | Path,
    output: str | Path,
    *,
    mode: str = "resize",
    overlays: bool = False,
    say=print,
) -> dict[str, int]:
    """Write a mask per image; returns {'images': n, 'failed': m}.

    overlays: also write NAME_overlay.png. Masks that are there are kept. Files of the
    folder that are no pictures are listed in `ignored_files.csv` there. Raises
    UserError when the output holds masks of another checkpoint or mode, and
    FileNotFoundError for what is missing.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
    output = named(output, "output folder")
    segmenter, record = load_segmenter(checkpoint)
    source = open_source(images, channels=segmenter.backbone.channels)
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, sort_keys=True)
    facts = {
        "classes": dict(enumerate(segmenter.classes)),
        "mode": mode,
        "segmenter": hashlib.sha256(text.encode()).hexdigest(),
    }
    claim(output / "classes.json", facts, "masks", "choose another folder")
    report_ignored(source, say, output / IGNORED)
    failed = 0
    progress = Progress("segment", len(source), unit="img")
    for i in range(len(source)):
        name = Path(source.record_id(i))
        # The suffix stays in the name: a.png and a.jpg are two images.
        target = output / name.parent / f"{name.name}.mask.png"
        if target.exists():
            continue
        try:
            image = source[i]
        except BadImage as error:
            say(f"left out: {error}")
            failed += 1
            continue
        scores = class_scores(segmenter, image, mode)
        mask = scores.argmax(axis=-1).astype(np.uint8)
        target.parent.mkdir(parents=True, exist_ok=True)
        if overlays:
            grey = np.asarray(image).mean(axis=-1).astype(np.uint8)
            picture = Image.fromarray(overlay(grey, mask))
            picture.save(target.with_name(f"{name.name}.overlay.png"))
        with whole_file(target) as fresh:
            Image.fromarray(mask).save(fresh, "PNG")
        progress.update(i + 1)
    progress.close()
    return {"images": len(source) - failed, "failed": failed}


def main(argv=None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="ultradino_jax.segment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, help="folder of images")
    parser.add_argument("--output", required=True, help="folder for the masks")
    parser.add_argument("--mode", choices=MODES, default="resize")
    parser.add_argument("--overlays", action="store_true")
    flags = parser.parse_args(argv)
    counts = segment(
        flags.checkpoint,
        flags.input,
        flags.output,
        mode=flags.mode,
        overlays=flags.overlays,
    )
    print(f"{counts['images']} masks in {flags.output}, {counts['failed']} left out")


if __name__ == "__main__":
    command(main)
