"""Labelled images with patients and splits, however they are stored."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from ultradino_jax.errors import UserError

SPLITS = ("train", "val", "test")
# Scanner presets in the upper right corner of FETAL_PLANES_DB can name the class.
CORNER_X, CORNER_Y = 0.84, 0.21


class _InSplits(Protocol):
    """A frozen dataclass of images with patients and splits, [n] str each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def patients(self) -> np.ndarray: ...
    @property
    def splits(self) -> np.ndarray: ...


_Images = TypeVar("_Images", bound=_InSplits)


@dataclass(frozen=True)
class LabelledImages:
    """n labelled images; as a sequence it gives their pixels, uint8 [H,W].

    name, version: which data, for the record. classes: Y names in label order. ids,
    labels, patients, splits: [n] (str, int64, str, str). groups: further columns by
    name, e.g. {"machine": [n]}. read: stored index -> uint8 [H,W]; stored: [n] those
    indices. mask_corner: black out the corner that may hold the scanner's preset.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    ids: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    splits: np.ndarray
    read: Callable[[int], np.ndarray]
    stored: np.ndarray
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    mask_corner: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def stored_pixels(self, index: int) -> np.ndarray:
        """An image as it is stored, nothing blacked out."""
        return self.read(int(self.stored[index]))

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.stored_pixels(index)
        if self.mask_corner:
            image = image.copy()
            height, width = image.shape[:2]
            image[: round(CORNER_Y * height), round(CORNER_X * width) :] = 0
        return image

    def take(self, rows) -> "LabelledImages":
        """The images at `rows`: indices or a boolean mask."""
        columns = ("ids", "labels", "patients", "splits", "stored")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in columns},
            groups={name: values[rows] for name, values in self.groups.items()},
        )

    def split(self, name: str) -> "LabelledImages":
        """The images of 'train', 'val' or 'test'."""
        return self.take(self.splits == name)

    def split_hash(self) -> str:
        """sha256 of which image, label and patient is in which split."""
        columns = (self.ids, self.splits, self.labels, self.patients)
        lines = sorted("\t".join(map(str, row)) for row in zip(*columns, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sorted_by_id(name: str, rows: Sequence[dict]):
    """(order, column): the rows' indices sorted by id, and column(key) -> str [n].

    Raises UserError when an id is there twice.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    for a, b in itertools.pairwise(order):
        if rows[a]["id"] == rows[b]["id"]:
            raise UserError(f"{name}: image {rows[a]['id']!r} is listed twice")

    def column(key: str) -> np.ndarray:
        return np.array([str(rows[i][key]) for i in order], dtype=np.str_)

    return order, column


def labelled_images(
    name: str,
    version: str,
    classes: Sequence[str],
    rows: Sequence[dict],
    read: Callable[[int], np.ndarray],
) -> LabelledImages:
    """Columns from rows {id, label (a class name), patient, split, **groups}.

    Rows are sorted by id, so the order does not depend on how they are stored; row i
    of `rows` is read by `read(i)`.
    Raises UserError when a class is unknown or an id is there twice.
    """
    known = {label: i for i, label in enumerate(classes)}
    for row in rows:
        if row["label"] not in known:
            raise UserError(
                f"{name}: image {row['id']!r} has the unknown class {row['label']!r}; "
                f"known are {', '.join(map(repr, classes))}"
            )
    order, column = sorted_by_id(name, rows)
    special = ("id", "label", "patient", "split")
    others = [key for key in rows[0] if key not in special] if rows else []
    return LabelledImages(
        name=name,
        version=version,
        classes=tuple(classes),
        ids=column("id"),
        labels=np.array([known[rows[i]["label"]] for i in order], np.int64),
        patients=column("patient"),
        splits=column("split"),
        read=read,
        stored=np.array(order, np.int64),
        groups={key: column(key) for key in others},
    )


def held_out_patients(
    patients: Iterable[str], fraction: float, seed: int, name: str
) -> set[str]:
    """ceil(fraction * n) of the n distinct patients, by the order of their hashes.

    It depends on (seed, name, patient) alone, not on the order of the rows.
    Ceiling, as the paper's 180 of 896 validation patients.
    """
    distinct = set(patients)
    count = math.ceil(fraction * len(distinct))
    return set(
        sorted(
            distinct,
            key=lambda p: hashlib.sha256(f"{seed}/{name}/{p}".encode()).digest(),
        )[:count]
    )


def hold_out(
    data: _Images, new: str, *, source: str, fraction: float, seed: int
) -> _Images:
    """Move a fraction of the patients of split `source` to the split `new`."""
    inside = data.splits == source
    chosen = held_out_patients(data.patients[inside], fraction, seed, data.name)
    moved = inside & np.isin(data.patients, list(chosen))
    # dtype given: 'val' must not be cut to the width of the present names.
    return replace(data, splits=np.where(moved, new, data.splits).astype("<U8"))


def complete_splits(
    data: _Images, *, val_fraction: float, test_fraction: float, seed: int
) -> _Images:
    """Adds the splits that the data do not bring along, patient by patient."""
    if "test" not in data.splits:
        data = hold_out(
            data, "test", source="train", fraction=test_fraction, seed=seed + 1
        )
    if "val" not in data.splits:
        data = hold_out(data, "val", source="train", fraction=val_fraction, seed=seed)
    return data


def check_splits(data: LabelledImages) -> None:
    """Raises UserError unless the splits can be trained and scored on.

    Every image is in train, val or test, none of which is empty or lacks a class, and
    no patient is in two of them.
    """
    unknown = sorted(set(data.splits.tolist()) - set(SPLITS))
    if unknown:
        raise UserError(
            f"{data.name}: unknown split {unknown[0]!r}, expected train, val or test"
        )
    for name in SPLITS:
        counts = np.bincount(
            data.labels[data.splits == name], minlength=len(data.classes)
        )
        if counts.sum() == 0:
            raise UserError(f"{data.name}: the {name} split is empty")
        if (counts == 0).any():
            missing = data.classes[int(np.argmin(counts))]
            raise UserError(
                f"{data.name}: the {name} split of {counts.sum()} images has none of "
                f"class {missing!r}"
            )
    check_patients(data)


def check_patients(data: _InSplits) -> None:
    """Raises UserError naming a patient who is in more than one split."""
    seen: dict[str, str] = {}
    overlap = set()
    for patient, split in zip(data.patients, data.splits, strict=True):
        if seen.setdefault(patient, split) != split:
            overlap.add(str(patient))
    if overlap:
        first = min(overlap)
        where = " and ".join(
            name for name in SPLITS if name in data.splits[data.patients == first]
        )
        raise UserError(
            f"{data.name}: {len(overlap)} patients are in more than one split, first "
            f"{first!r} in {where}"
        )


def few_per_class(
    data: LabelledImages, count: int, seed: int, *, by_patient: bool = False
) -> np.ndarray:
    """Sorted rows of `count` random images per class, or of all images of a class that
    `count` random patients have.

    Raises UserError naming the class that has fewer.
    """
    rng = np.random.default_rng([seed, count])
    unit, units = ("patients", data.patients) if by_patient else ("images", data.ids)
    rows = []
    for label, class_name in enumerate(data.classes):
        inside = np.flatnonzero(data.labels == label)
        choices = np.unique(units[inside])
        if len(choices) < count:
            raise UserError(
                f"{data.name}: class {class_name!r} has {len(choices)} {unit}, "
                f"{count} were asked for"
            )
        chosen = rng.choice(choices, count, replace=False)
        rows.append(inside[np.isin(units[inside], chosen)])
    return np.sort(np.concatenate(rows))
