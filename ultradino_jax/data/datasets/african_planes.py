"""African fetal planes (Sendra-Balcells et al. 2023, Zenodo 7540448, CC BY 4.0).

450 images of four planes from Algeria, Egypt, Ghana, Malawi and Uganda: an external
test for what was trained on FETAL_PLANES_DB.
"""

import functools

from ultradino_jax.data.datasets.records import (
    Published,
    load_labelled,
    planes_examples,
)

TABLE = "African_planes_database.csv"
CLASSES = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax")


def _read(source):
    return planes_examples(
        source,
        TABLE,
        name="Filename",
        classes=CLASSES,
        groups={"center": "Center"},
        # Numbers start again in each country.
        patient=lambda row: f"{row['Center']}/{row['Patient_num']}",
    )


PUBLISHED = Published(
    name="african_planes",
    about=__doc__,
    release="Zenodo record 7540448",
    homepage="https://zenodo.org/records/7540448",
    url="https://zenodo.org/records/7540448/files/Zenodo_dataset.tar.xz",
    files="Zenodo_dataset.tar.xz",
    classes=CLASSES,
    groups=("center",),
    read=_read,
)

# The data set with the table's splits 'train' and 'test': see `load_labelled`.
load = functools.partial(load_labelled, PUBLISHED)
