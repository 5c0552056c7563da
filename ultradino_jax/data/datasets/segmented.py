"""Images with index masks, patients and splits, however they are stored."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ultradino_jax.data.datasets.labelled import (
    SPLITS,
    check_patients,
    complete_splits,
    held_out_patients,
    sorted_by_id,
)
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError

UNUSED = "unused"


@dataclass(frozen=True)
class SegmentedImages:
    """n images with masks; as a sequence it gives the images, uint8 [H,W].

    name, version: which data, for the record. classes: Y names, background first. ids,
    patients, splits: [n] str. read_image, read_mask: stored index -> uint8 [H,W];
    stored: [n] those indices.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    ids: np.ndarray
    patients: np.ndarray
    splits: np.ndarray
    read_image: Callable[[int], np.ndarray]
    read_mask: Callable[[int], np.ndarray]
    stored: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def stored_pixels(self, index: int) -> np.ndarray:
        """An image as it is stored."""
        return self.read_image(int(self.stored[index]))

    def __getitem__(self, index: int) -> np.ndarray:
        return self.stored_pixels(index)

    def mask(self, index: int) -> np.ndarray:
        """Class indices uint8 [H,W] of an image, of the image's size.

        Raises UserError naming the image when sizes differ or a value is no class.
        """
        mask, image = self.read_mask(int(self.stored[index])), self[index]
        name = f"{self.name}: mask of {str(self.ids[index])!r}"
        if mask.shape != image.shape:
            raise UserError(
                f"{name} is {list(mask.shape)}, the image {list(image.shape)}"
            )
        values = values_in(mask)
        if 255 in values and not np.setdiff1d(values, [0, 255]).size:
            raise UserError(
                f"{name} holds 0 and 255 alone, and 255 is left out of training and "
                "scores: in a black and white mask, write 1 for 255"
            )
        unknown = np.setdiff1d(values, [*range(len(self.classes)), 255])
        if len(unknown):
            raise UserError(
                f"{name} holds the value {unknown[0]}; known are 0 to "
                f"{len(self.classes) - 1} and 255 (ignored)"
            )
        return mask

    def take(self, rows) -> "SegmentedImages":
        """The images at `rows`: indices or a boolean mask."""
        columns = ("ids", "patients", "splits", "stored")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def split(self, name: str) -> "SegmentedImages":
        """The images of 'train', 'val' or 'test'."""
        return self.take(self.splits == name)

    def split_hash(self) -> str:
        """sha256 of which image and patient is in which split."""
        columns = (self.ids, self.splits, self.patients)
        lines = sorted("\t".join(map(str, row)) for row in zip(*columns, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def values_in(mask: np.ndarray) -> np.ndarray:
    """Sorted distinct values of a uint8 mask."""
    return np.flatnonzero(np.bincount(mask.ravel()))


def segmented_images(
    name: str,
    version: str,
    classes: Sequence[str],
    rows: Sequence[dict],
    read_image: Callable[[int], np.ndarray],
    read_mask: Callable[[int], np.ndarray],
) -> SegmentedImages:
    """Columns from rows {id, patient, split}, sorted by id; row i is read by index i.

    Raises UserError when there is no row or an id is there twice.
    """
    if not rows:
        raise UserError(f"{name}: there is no image with a mask")
    order, column = sorted_by_id(name, rows)
    return SegmentedImages(
        name=name,
        version=version,
        classes=tuple(classes),
        ids=column("id"),
        patients=column("patient"),
        splits=column("split"),
        read_image=read_image,
        read_mask=read_mask,
        stored=np.array(order, np.int64),
    )


def hash_order(names, seed: int, name: str) -> list[str]:
    """Distinct names in an order that depends on (seed, name, each name) alone.

    What comes first in it stays first when others are added or removed.
    """
    return sorted(
        set(map(str, names)),
        key=lambda x: hashlib.sha256(f"{seed}/{name}/{x}".encode()).digest(),
    )


def training_subset(
    data: SegmentedImages, subset: str, seed: int, *, max_images: int = 10
) -> SegmentedImages:
    """The same test set with less to train on.

    'full': as it is. '10pct': that share of the training patients, at least one;
    shares of one seed are nested. 'n20': 20 images out of train and val, 'p4': at most
    `max_images` of each of 4 patients out of them; validation is then all the rest,
    without the other images of those patients, so that no patient is on two sides.
    Raises UserError for another word, or when there is not enough.
    """
    parsed = re.fullmatch(r"full|n(\d+)|p(\d+)|(\d+)pct", subset)
    if parsed is None:
        raise UserError(f"subset {subset!r}: expected full, n20, p4 or 10pct")
    images, patients, percent = (int(g) if g else 0 for g in parsed.groups())
    if subset == "full":
        return data
    if not (images or patients or 0 < percent <= 100):
        raise UserError(f"subset {subset!r} draws nothing to train on")
    splits = data.splits.astype("<U8")
    if percent:
        inside = splits == "train"
        kept = held_out_patients(
            data.patients[inside], percent / 100, seed, f"{data.name}/share"
        )
        splits[inside & ~np.isin(data.patients, list(kept))] = UNUSED
        return replace(data, splits=splits).take(splits != UNUSED)
    pool = splits != "test"
    if images:
        available = hash_order(data.ids[pool], seed, f"{data.name}/images")
        chosen = available[:images]
    else:
        available = hash_order(data.patients[pool], seed, f"{data.name}/patients")
        chosen = []
        for patient in available[:patients]:
            own = data.ids[pool & (data.patients == patient)]
            chosen += hash_order(own, seed, f"{data.name}/{patient}")[:max_images]
    if len(available) < (images or patients):
        unit = "images" if images else "patients"
        raise UserError(
            f"{data.name}: {len(available)} {unit} outside the test set, {subset} "
            f"needs {images or patients}"
        )
    train = pool & np.isin(data.ids, chosen)
    drawn = np.isin(data.patients, data.patients[train])
    splits[pool] = "val"
    splits[pool & drawn] = UNUSED
    splits[train] = "train"
    return replace(data, splits=splits).take(splits != UNUSED)


def apply_split_file(data: SegmentedImages, path: str | os.PathLike) -> SegmentedImages:
    """Splits as a csv with the columns id and split says; others are left out.

    Raises UserError for an id that is unknown or listed twice, or another split.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"split file {str(path)!r} does not exist")
    known = {str(name): i for i, name in enumerate(data.ids)}
    chosen: dict[int, str] = {}
    for row in read_table(Path(path).read_bytes(), ["id", "split"], str(path)):
        if row["id"] not in known:
            raise UserError(f"{path}: image {row['id']!r} is not in {data.name}")
        if row["split"] not in SPLITS:
            raise UserError(
                f"{path}: split {row['split']!r} of {row['id']!r}; expected one of "
                f"{', '.join(SPLITS)}"
            )
        if known[row["id"]] in chosen:
            raise UserError(f"{path}: image {row['id']!r} is listed twice")
        chosen[known[row["id"]]] = row["split"]
    rows = np.array(sorted(chosen))
    splits = np.array([chosen[i] for i in rows], "<U8")
    return replace(data.take(rows), splits=splits)


def make_splits(
    data: SegmentedImages,
    subset: str,
    seed: int,
    *,
    test_fraction: float,
    val_fraction: float,
    split_seed: int,
    split_file: str = "",
    max_images: int = 10,
) -> SegmentedImages:
    """The data as run `seed` trains, validates and tests on them.

    Test and validation patients depend on split_seed, what is drawn of the others on
    `seed`. split_file: a csv that says everything instead; {seed} in its name is
    replaced. Raises UserError when a split is empty or shares a patient.
    """
    if split_file:
        data = apply_split_file(data, split_file.replace("{seed}", str(seed)))
    else:
        data = complete_splits(
            data,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=split_seed,
        )
        data = training_subset(data, subset, seed, max_images=max_images)
    for name in SPLITS:
        if name not in data.splits:
            raise UserError(f"{data.name}, {subset}: the {name} split is empty")
    check_patients(data)
    return data
