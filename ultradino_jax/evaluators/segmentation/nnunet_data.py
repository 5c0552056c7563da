"""Data sets in nnU-Net v2's raw format, and its masks back. Images and files.

Format: documentation/dataset_format.md of nnU-Net. Names of cases are the places of the
images in the data set, so that any image id will do.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ultradino_jax.data.datasets.labelled import SPLITS
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.progress import Progress
from ultradino_jax.whole import whole_folder, write_json

IGNORE = 255


def case_name(index: int) -> str:
    """The case identifier of the data set's image `index`."""
    return f"case{index:05d}"


def export_split(
    folder: Path, data: SegmentedImages, split: SegmentedImages
) -> dict[str, str]:
    """One raw dataset of nnU-Net: images, labels, dataset.json, splits_final.json.

    data: all images, whose order names the cases; split: those to be written, train and
    val into imagesTr and labelsTr, test into imagesTs (nnU-Net never gets its labels).
    Pixels to be ignored become nnU-Net's 'ignore' label, which follows the classes.
    Format: documentation/dataset_format.md of nnU-Net. Returns {case: image id}.
    """
    y, ignored = len(data.classes), False
    rows = np.searchsorted(data.ids, split.ids)  # both are sorted by id
    fold: dict[str, list[str]] = {name: [] for name in SPLITS}
    progress = Progress(f"export {folder.name}", len(split), unit="img")
    with whole_folder(folder) as fresh:
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (fresh / name).mkdir()
        for i, row in enumerate(rows):
            case, part = case_name(row), str(split.splits[i])
            fold[part].append(case)
            images = fresh / ("imagesTs" if part == "test" else "imagesTr")
            Image.fromarray(split[i]).save(images / f"{case}_0000.png")
            if part != "test":
                mask = split.mask(i)
                ignored |= bool((mask == IGNORE).any())
                mask = np.where(mask == IGNORE, y, mask).astype(np.uint8)
                Image.fromarray(mask).save(fresh / "labelsTr" / f"{case}.png")
            progress.update(i + 1)
        progress.close()
        labels = {name: k for k, name in enumerate(data.classes)}
        labels = {"background": labels.pop(data.classes[0]), **labels}
        if ignored:
            labels["ignore"] = y
        facts = {
            "channel_names": {"0": "ultrasound"},  # not 'CT': normalised one by one
            "labels": labels,
            "numTraining": len(fold["train"]) + len(fold["val"]),
            "file_ending": ".png",
            "overwrite_image_reader_writer": "NaturalImage2DIO",
            "name": folder.name,
        }
        write_json(fresh / "dataset.json", facts)
        parts = {name: sorted(fold[name]) for name in ("train", "val")}
        write_json(fresh / "splits_final.json", [parts])
    return {case_name(row): str(split.ids[i]) for i, row in enumerate(rows)}


def read_masks(
    folder: Path, rows, data: SegmentedImages, preprocess: Preprocess
) -> np.ndarray:
    """Predicted masks uint8 [n,S,S] of the data set's images `rows`.

    They are put into the square to the nearest pixel, as the labels are. Raises
    UserError when one is missing, of another size, or holds a value that is no class.
    """
    side = preprocess.image_size
    squares = np.zeros((len(rows), side, side), np.uint8)
    for square, row in zip(squares, rows, strict=True):
        path = folder / f"{case_name(row)}.png"
        if not path.is_file():
            missing = sum(not (folder / f"{case_name(r)}.png").is_file() for r in rows)
            raise UserError(
                f"{missing} of {len(rows)} predictions are missing, first {str(path)!r}"
                f" (image {str(data.ids[row])!r})"
            )
        mask = read_labels(path)
        if mask.shape != data[row].shape or mask.max() >= len(data.classes):
            raise UserError(
                f"{str(path)!r} is {list(mask.shape)} with values to {mask.max()}; the "
                f"image is {list(data[row].shape)}, classes end at "
                f"{len(data.classes) - 1}"
            )
        y, x, h, w = preprocess.box(mask.shape)
        square[y : y + h, x : x + w] = cv2.resize(
            mask.astype(np.uint8), (w, h), interpolation=cv2.INTER_NEAREST
        )
    return squares
