"""African fetal planes (Sendra-Balcells et al. 2023, Zenodo 7540448, CC BY 4.0).

450 images of four planes from Algeria, Egypt, Ghana, Malawi and Uganda: an external
test for what was trained on FETAL_PLANES_DB.
"""

import os
from pathlib import PurePosixPath
from typing import ClassVar

import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.archive import (
    find_table,
    match_images,
    read_table,
)
from ultradino_jax.data.datasets.labelled import LabelledImages, check_patients
from ultradino_jax.data.datasets.records import load_records, planes_features

URL = "https://zenodo.org/records/7540448/files/Zenodo_dataset.tar.xz"
TABLE = "African_planes_database.csv"
CLASSES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax")


class AfricanPlanes(tfds.core.GeneratorBasedBuilder):
    """African planes with the table's splits; images keep the files' bytes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Zenodo record 7540448"}
    # tfds would find this through importlib_resources, which nothing installs.
    code_path = tfds.core.Path(__file__)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put Zenodo_dataset.tar.xz from {URL}, or what it unpacks to, in this folder"
    )

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=planes_features(CLASSES, ("center",)),
            supervised_keys=("image", "label"),
            homepage="https://zenodo.org/records/7540448",
        )

    def _split_generators(self, dl_manager):
        try:
            source = dl_manager.manual_dir
        except AssertionError:  # there is none, or it is empty
            source = dl_manager.download(URL)
        files, table = find_table(source, TABLE)
        columns = ["Filename", "Center", "Patient_num", "Plane", "Train"]
        rows = read_table(files.read(table), columns, table)
        for row in rows:
            if row["Plane"] not in CLASSES:
                raise ValueError(
                    f"{table}: image {row['Filename']!r} has the unknown class "
                    f"{row['Plane']!r}; known are {', '.join(map(repr, CLASSES))}"
                )
            if row["Train"] not in ("0", "1"):
                raise ValueError(
                    f"{table}: Train of image {row['Filename']!r} is "
                    f"{row['Train']!r}, not 0 or 1"
                )
        folder = str(PurePosixPath(table).parent)
        names = [row["Filename"].removesuffix(".png") for row in rows]
        paths = match_images(files, folder, names, table)

        return {
            "train": self._generate_examples(files, paths, rows, "1"),
            "test": self._generate_examples(files, paths, rows, "0"),
        }

    def _generate_examples(self, files, paths, rows, flag):
        for row in rows:
            if row["Train"] == flag:
                name = row["Filename"].removesuffix(".png")
                yield (
                    name,
                    {
                        "image": files.read(paths[name]),
                        "label": row["Plane"],
                        "id": name,
                        # Numbers start again in each country.
                        "patient": f"{row['Center']}/{row['Patient_num']}",
                        "center": row["Center"],
                    },
                )


def load_african_planes(
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
) -> LabelledImages:
    """The data set, prepared in `data_dir` on first use; splits 'train' and 'test'.

    manual_dir, download: as for FETAL_PLANES_DB.
    """
    data = load_records(
        AfricanPlanes,
        data_dir,
        manual_dir=manual_dir,
        download=download,
        classes=CLASSES,
        groups=("center",),
    )
    check_patients(data)
    return data
