"""African fetal planes (Sendra-Balcells et al. 2023, Zenodo 7540448, CC BY 4.0).

450 images of four planes from Algeria, Egypt, Ghana, Malawi and Uganda: an external
test for what was trained on FETAL_PLANES_DB.
"""

import os
from typing import ClassVar

import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.labelled import LabelledImages, check_patients
from ultradino_jax.data.datasets.records import (
    load_records,
    manual_or_download,
    planes_info,
    planes_table,
)

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
        homepage = "https://zenodo.org/records/7540448"
        return planes_info(self, __doc__, homepage, CLASSES, ("center",))

    def _split_generators(self, dl_manager):
        source = manual_or_download(dl_manager, URL)
        columns = ["Center", "Patient_num"]
        files, rows = planes_table(source, TABLE, "Filename", columns, CLASSES)
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
