"""PSFHS (Zenodo 10969427) and FH-PS-AOP (Zenodo 7851339), CC BY 4.0: MetaImages.

256 x 256 frames with pubic symphysis and fetal head. No patient is named, so every
image counts as one. FH-PS-AOP is derived from JNU-IFM and its numbers overlap those of
PSFHS: never train on one of the three and test on another.
"""

import functools
from pathlib import PurePosixPath

from ultradino_jax.data.datasets.jnu_ifm import CLASSES
from ultradino_jax.data.datasets.mask_files import (
    check_partners,
    encode_png,
    find_folder,
    read_mha,
    remap,
    stems_in,
)
from ultradino_jax.data.datasets.records import Published, load_segmented
from ultradino_jax.errors import UserError

VALUES = {0: 0, 1: 1, 2: 2}


def _read(source):
    """Folders image_mha and label_mha as one split of PNGs."""
    files, folder = find_folder(source, "image_mha")
    images = stems_in(files, folder, (".mha",))
    labels = str(PurePosixPath(folder).parent / "label_mha")
    masks = stems_in(files, labels, (".mha",))
    check_partners(images, masks, folder)
    return {"train": _examples(files, images, masks)}


def _examples(files, images, masks):
    for stem, name in images.items():
        image = read_mha(files.read(name), name)
        if image.ndim == 3:
            if (image != image[:1]).any():
                raise UserError(f"{name}: three channels that are not equal")
            image = image[0]
        stored = read_mha(files.read(masks[stem]), masks[stem])
        yield {
            "id": stem,
            "patient": stem,
            "image": encode_png(image),
            "mask": encode_png(remap(stored, VALUES, masks[stem])),
        }


PUBLISHED = Published(
    name="psfhs",
    about=__doc__,
    release="Zenodo record 10969427",
    homepage="https://zenodo.org/records/10969427",
    url="https://zenodo.org/records/10969427/files/PSFHS.zip",
    files="PSFHS.zip (or the zip of FH-PS-AOP)",
    classes=CLASSES,
    read=_read,
)

# The data set, without splits: see `load_segmented`.
load = functools.partial(load_segmented, PUBLISHED)
