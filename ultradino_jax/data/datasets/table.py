"""Any labelled images: a csv that names them, or a folder per class."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ultradino_jax.data.datasets.labelled import (
    SPLITS,
    LabelledImages,
    complete_splits,
    labelled_images,
)
from ultradino_jax.data.formats.tables import find_name, read_table
from ultradino_jax.data.sources import FolderSource, read_image
from ultradino_jax.errors import UserError
from ultradino_jax.progress import warn


def load_csv(
    path: str | os.PathLike,
    *,
    classes: Sequence[str] = (),
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> LabelledImages:
    """Images of a csv with columns path, label[, patient][, split][, anything].

    Paths are relative to the csv's folder. classes: label names in label order, by
    default the sorted names that occur. Without a patient column every image is its
    own patient. Splits that are not there are made patient by patient; further columns
    become groups, for which figures are reported apart.
    Raises FileNotFoundError or UserError naming what is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"csv {str(path)!r} does not exist")
    content = path.read_bytes()
    table = read_table(content, ["path", "label"], str(path))
    rows = []
    for row in table:
        row = dict(row)
        name = find_name(path.parent, row.pop("path"))
        row["id"] = name
        row["patient"] = row.get("patient") or name
        row["split"] = row.get("split") or "train"
        rows.append(row)
    files = [path.parent / row["id"] for row in rows]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(files)} images do not exist, first "
            f"{missing[0]!r}"
        )
    data = labelled_images(
        path.stem,
        hashlib.sha256(content).hexdigest()[:16],
        tuple(classes) or sorted({row["label"] for row in rows}),
        rows,
        _FileImages(files),
    )
    return complete_splits(
        data, val_fraction=val_fraction, test_fraction=test_fraction, seed=split_seed
    )


def load_class_folders(
    path: str | os.PathLike,
    *,
    classes: Sequence[str] = (),
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> LabelledImages:
    """Images of path/CLASS/... or path/{train,val,test}/CLASS/...

    Every image is its own patient: where a patient has several, use a csv.
    """
    source = FolderSource(path)
    source.listing.tell(path, warn)
    names = [source.record_id(i) for i in range(len(source))]
    by_split = all(name.split("/")[0] in SPLITS for name in names)
    rows = []
    for name in names:
        parts = name.split("/")
        split, parts = (parts[0], parts[1:]) if by_split else ("train", parts)
        if len(parts) < 2:
            raise UserError(f"{str(path)!r}: {name!r} is not in a folder of a class")
        rows.append({"id": name, "patient": name, "label": parts[0], "split": split})
    data = labelled_images(
        Path(path).resolve().name,
        source.digest()[:16],
        tuple(classes) or sorted({row["label"] for row in rows}),
        rows,
        _FileImages([Path(path) / name for name in names]),
    )
    return complete_splits(
        data, val_fraction=val_fraction, test_fraction=test_fraction, seed=split_seed
    )


class _FileImages:
    """Grey pixels of the i-th file."""

    def __init__(self, files):
        self.files = files

    def __call__(self, index: int):
        return read_image(self.files[index])[:, :, 0]
