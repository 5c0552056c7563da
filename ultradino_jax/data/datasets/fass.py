"""FASS: fetal abdominal structures (Mendeley 4gcpm9dsc3 v1, CC BY 4.0).

1,588 images of 169 women with masks of four structures. The paper's split is not
published; splits are made by patient.
"""

import functools
import re
from pathlib import PurePosixPath

from ultradino_jax.data.datasets.archive import decode_grey
from ultradino_jax.data.datasets.mask_files import (
    check_partners,
    encode_png,
    find_folder,
    paint,
    stems_in,
)
from ultradino_jax.data.datasets.records import Published, load_segmented
from ultradino_jax.data.formats.restricted_pickle import load_npy_pickle
from ultradino_jax.errors import UserError

CLASSES = (
    "background",
    "aorta artery",
    "liver",
    "stomach",
    "intrahepatic umbilical vein",
)
# In painting order: where two overlap, the later one is kept. Small ones come last.
PAINTED = {"liver": 2, "stomach": 3, "artery": 1, "vein": 4}


def _read(source):
    files, folder = find_folder(source, "IMAGES")
    images = stems_in(files, folder, (".png",))
    arrays = PurePosixPath(folder).parent / "ARRAY_FORMAT"
    masks = stems_in(files, str(arrays), (".npy",))
    check_partners(images, masks, folder)
    for stem in images:
        if not re.fullmatch(r"P\d+_IMG\d+", stem):
            raise UserError(f"{folder}: {stem!r} is not named P.._IMG..")
    return {"train": _examples(files, images, masks)}


def _examples(files, images, masks):
    for stem, name in images.items():
        png = files.read(name)
        # The picture inside the array is not always that of the PNG.
        shape = decode_grey(png).shape
        mask = read_structures(files.read(masks[stem]), shape, masks[stem])
        patient = stem.split("_")[0]  # of no fixed width: P01 is not P010
        yield {
            "id": stem,
            "patient": patient,
            "image": png,
            "mask": encode_png(mask),
        }


def read_structures(data: bytes, shape: tuple[int, int], where: str):
    """Pickled array file -> index mask uint8 [H,W], without running what is in it.

    Raises UserError naming the file for a pickle that wants more than arrays, another
    content, or masks of another size than the image.
    """
    try:
        content = load_npy_pickle(data)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("structures"), dict):
        raise UserError(f"{where}: no dict of structures in it")
    return paint(content["structures"], PAINTED, shape, where)


PUBLISHED = Published(
    name="fass",
    about=__doc__,
    release="Mendeley 4gcpm9dsc3, version 1",
    homepage="https://data.mendeley.com/datasets/4gcpm9dsc3",
    url=(
        "https://data.mendeley.com/public-files/datasets/4gcpm9dsc3/files/"
        "89e74076-ff57-4e81-9634-4fc29c6128ff/file_downloaded"
    ),
    files="the zip",
    classes=CLASSES,
    read=_read,
)

# The data set, without splits: see `load_segmented`.
load = functools.partial(load_segmented, PUBLISHED)
