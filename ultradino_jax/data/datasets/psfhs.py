"""PSFHS (Zenodo 10969427) and FH-PS-AOP (Zenodo 7851339), CC BY 4.0: MetaImages.

256 x 256 frames with pubic symphysis and fetal head. No patient is named, so every
image counts as one. FH-PS-AOP is derived from JNU-IFM and its numbers overlap those of
PSFHS: never train on one of the three and test on another.
"""

import os
from pathlib import PurePosixPath
from typing import ClassVar

import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.jnu_ifm import CLASSES
from ultradino_jax.data.datasets.masks import (
    check_partners,
    encode_png,
    find_folder,
    read_mha,
    remap,
    stems_in,
)
from ultradino_jax.data.datasets.records import (
    load_segmented_records,
    manual_or_download,
    masked_info,
)
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.errors import UserError

URL = "https://zenodo.org/records/10969427/files/PSFHS.zip"
VALUES = {0: 0, 1: 1, 2: 2}


class Psfhs(tfds.core.GeneratorBasedBuilder):
    """Folders image_mha and label_mha as one split of PNGs."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Zenodo record 10969427"}
    # tfds would find this through importlib_resources, which nothing installs.
    code_path = tfds.core.Path(__file__)
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put PSFHS.zip from {URL} (or the zip of FH-PS-AOP), or what it unpacks to, "
        "in this folder"
    )

    def _info(self):
        return masked_info(self, __doc__, "https://zenodo.org/records/10969427")

    def _split_generators(self, dl_manager):
        source = manual_or_download(dl_manager, URL)
        files, folder = find_folder(source, "image_mha")
        images = stems_in(files, folder, (".mha",))
        labels = str(PurePosixPath(folder).parent / "label_mha")
        masks = stems_in(files, labels, (".mha",))
        check_partners(images, masks, folder)
        return {"train": self._generate_examples(files, images, masks)}

    def _generate_examples(self, files, images, masks):
        for stem, name in images.items():
            image = read_mha(files.read(name), name)
            if image.ndim == 3:
                if (image != image[:1]).any():
                    raise UserError(f"{name}: three channels that are not equal")
                image = image[0]
            stored = read_mha(files.read(masks[stem]), masks[stem])
            yield (
                stem,
                {
                    "image": encode_png(image),
                    "mask": encode_png(remap(stored, VALUES, masks[stem])),
                    "id": stem,
                    "patient": stem,
                },
            )


def load_psfhs(
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
) -> SegmentedImages:
    """The data set, prepared in `data_dir` on first use; arguments as for FASS."""
    return load_segmented_records(
        Psfhs, data_dir, manual_dir=manual_dir, download=download, classes=CLASSES
    )
