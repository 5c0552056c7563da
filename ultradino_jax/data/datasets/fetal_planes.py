"""FETAL_PLANES_DB (Burgos-Artizzu et al. 2020, Zenodo 3904280, CC BY 4.0).

12,400 fetal ultrasound images of 1,792 patients in six classes. The official split is
by patient (7,129 train, 5,271 test); the paper takes a fifth of the training patients
for validation, which ones it does not say.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ultradino_jax.data.datasets.labelled import (
    SPLITS,
    LabelledImages,
    complete_splits,
)
from ultradino_jax.data.datasets.records import (
    Published,
    load_labelled,
    planes_examples,
)
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError

TABLE = "FETAL_PLANES_DB_data.csv"
# Label order of the csv splits in the paper's repository.
CLASSES = (
    "Other",
    "Maternal cervix",
    "Fetal abdomen",
    "Fetal brain",
    "Fetal femur",
    "Fetal thorax",
)
COLUMNS = {
    "brain_plane": "Brain_plane",
    "operator": "Operator",
    "machine": "US_Machine",
}


def _read(source):
    return planes_examples(
        source,
        TABLE,
        name="Image_name",
        classes=CLASSES,
        groups=COLUMNS,
        patient=lambda row: row["Patient_num"],
    )


PUBLISHED = Published(
    name="fetal_planes",
    about=__doc__,
    release="Zenodo record 3904280",
    homepage="https://zenodo.org/records/3904280",
    url="https://zenodo.org/records/3904280/files/FETAL_PLANES_ZENODO.zip",
    files="FETAL_PLANES_ZENODO.zip",
    classes=CLASSES,
    groups=tuple(COLUMNS),
    read=_read,
)


def load(
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    split_files: Sequence[str | os.PathLike] = (),
) -> LabelledImages:
    """The data set with its official test images.

    Validation is a fraction of the training patients, or everything comes from
    `split_files`: three csv files (train, val, test) with a column Image_name, such as
    the reference's. The other arguments and errors are those of `load_labelled`.
    """
    data = load_labelled(PUBLISHED, data_dir, manual_dir=manual_dir, download=download)
    if split_files:
        return apply_split_files(data, split_files)
    return complete_splits(
        data, val_fraction=val_fraction, test_fraction=0.0, seed=split_seed
    )


def apply_split_files(
    data: LabelledImages, split_files: Sequence[str | os.PathLike]
) -> LabelledImages:
    """Images and splits as three csv files (train, val, test) say.

    Images that none of them lists are left out.
    Raises UserError for an image that is unknown or listed twice.
    """
    if len(split_files) != 3:
        raise UserError(f"split files: three are needed, got {len(split_files)}")
    known = {name: i for i, name in enumerate(data.ids)}
    chosen: dict[int, str] = {}
    for split, path in zip(SPLITS, split_files, strict=True):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{split} split file {str(path)!r} does not exist")
        for row in read_table(Path(path).read_bytes(), ["Image_name"], str(path)):
            name = row["Image_name"].removesuffix(".png")
            if name not in known:
                raise UserError(f"{path}: image {name!r} is not in {data.name}")
            if known[name] in chosen:
                raise UserError(f"{path}: image {name!r} is listed twice")
            chosen[known[name]] = split
    rows = np.array(sorted(chosen))
    part = data.take(rows)
    return LabelledImages(
        **{**vars(part), "splits": np.array([chosen[i] for i in rows], "<U8")}
    )
