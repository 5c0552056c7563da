"""FETAL_PLANES_DB (Burgos-Artizzu et al. 2020, Zenodo 3904280, CC BY 4.0).

12,400 fetal ultrasound images of 1,792 patients in six classes. The official split is
by patient (7,129 train, 5,271 test); the paper takes a fifth of the training patients
for validation, which ones it does not say.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.archive import read_table
from ultradino_jax.data.datasets.labelled import (
    SPLITS,
    LabelledImages,
    check_patients,
    complete_splits,
)
from ultradino_jax.data.datasets.records import (
    load_records,
    manual_or_download,
    planes_info,
    planes_table,
)
from ultradino_jax.errors import UserError

URL = "https://zenodo.org/records/3904280/files/FETAL_PLANES_ZENODO.zip"
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


class FetalPlanes(tfds.core.GeneratorBasedBuilder):
    """FETAL_PLANES_DB with its official splits; images keep the files' bytes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Zenodo record 3904280"}
    # tfds would find this through importlib_resources, which nothing installs.
    code_path = tfds.core.Path(__file__)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put FETAL_PLANES_ZENODO.zip from {URL}, or what it unpacks to, in this folder"
    )

    def _info(self):
        homepage = "https://zenodo.org/records/3904280"
        return planes_info(self, __doc__, homepage, CLASSES, tuple(COLUMNS))

    def _split_generators(self, dl_manager):
        source = manual_or_download(dl_manager, URL)
        columns = ["Patient_num", *COLUMNS.values()]
        files, rows = planes_table(source, TABLE, "Image_name", columns, CLASSES)
        return {
            split: self._generate_examples(files, rows, flag)
            for split, flag in (("train", "1"), ("test", "0"))
        }

    def _generate_examples(self, files, rows, flag):
        for row in rows:
            if row["Train"] == flag:
                yield (
                    row["id"],
                    {
                        "image": files.read(row["file"]),
                        "label": row["Plane"],
                        "id": row["id"],
                        "patient": row["Patient_num"],
                        **{k: row[v] for k, v in COLUMNS.items()},
                    },
                )


def load_fetal_planes(
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    split_files: Sequence[str] = (),
) -> LabelledImages:
    """The data set, prepared in `data_dir` on first use.

    manual_dir: folder with the user's zip or unpacked files; otherwise `download`
    allows fetching it from Zenodo. Validation is a fraction of the training patients,
    or everything comes from `split_files`: three csv files (train, val, test) with a
    column Image_name, such as the reference's.
    Raises FileNotFoundError when nothing is there and nothing may be downloaded.
    """
    data = load_records(
        FetalPlanes,
        data_dir,
        manual_dir=manual_dir,
        download=download,
        classes=CLASSES,
        groups=tuple(COLUMNS),
    )
    check_patients(data)
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
