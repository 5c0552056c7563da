"""Files of segmentation sets: index masks, painted structures."""

import io
import itertools
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ultradino_jax.data.datasets.archive import (
    ARCHIVES,
    Files,
    open_files,
    open_zip,
)
from ultradino_jax.data.datasets.segmented import (
    values_in,
)
from ultradino_jax.data.formats.metaimage import read_metaimage
from ultradino_jax.data.formats.unreadable import Unreadable
from ultradino_jax.errors import UserError


def find_folder(path: str | os.PathLike, folder: str) -> tuple[Files, str]:
    """Files and the name in them of the first folder called `folder`.

    It is looked for in `path` (folder or archive), in the archives in it and in the
    zips inside a zip: one of the downloads comes that way.
    Raises FileNotFoundError saying where was looked.
    """
    path = Path(path)
    places = [open_files(path)]
    if path.is_dir():
        places += [
            open_files(p) for p in sorted(path.iterdir()) if p.name.endswith(ARCHIVES)
        ]
    for files in itertools.chain(places, _inner_zips(places)):
        found = {
            str(parent)
            for name in files.names
            for parent in PurePosixPath(name).parents
            if parent.name == folder
        }
        if found:
            return files, min(found, key=lambda n: (n.count("/"), n))
    raise FileNotFoundError(
        f"no folder {folder!r} in {str(path)!r}, below it or in an archive there"
    )


def _inner_zips(places: Sequence[Files]):
    """Zips inside the places, each held in memory while it is read."""
    for files in places:
        for name in files.names:
            if name.lower().endswith(".zip"):
                yield open_zip(zipfile.ZipFile(io.BytesIO(files.read(name))))


def stems_in(files: Files, folder: str, suffixes: Sequence[str]) -> dict[str, str]:
    """{name without suffix: file name} of the files directly in a folder."""
    return {
        PurePosixPath(name).stem: name
        for name in files.names
        if str(PurePosixPath(name).parent) == folder
        and PurePosixPath(name).suffix.lower() in suffixes
    }


def check_partners(images: Mapping, masks: Mapping, where: str) -> None:
    """Raises UserError naming the first image without mask or mask without image."""
    for have, lack, text in (
        (images, masks, "image {!r} has no mask"),
        (masks, images, "mask {!r} has no image"),
    ):
        alone = sorted(set(have) - set(lack))
        if alone:
            raise UserError(
                f"{where}: {text.format(alone[0])} ({len(alone)} of {len(have)})"
            )


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H,W] -> PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def remap(mask: np.ndarray, values: Mapping[int, int], where: str) -> np.ndarray:
    """Stored values -> class indices. Raises UserError for a value without one."""
    table = np.full(256, 255, np.uint8)
    table[list(values)] = list(values.values())
    unknown = np.setdiff1d(values_in(mask), list(values))
    if len(unknown):
        raise UserError(
            f"{where}: unknown mask value {unknown[0]}; known are "
            f"{', '.join(map(str, values))}"
        )
    return table[mask]


def paint(
    structures: Mapping[str, np.ndarray],
    painted: Mapping[str, int],
    shape: tuple[int, int],
    where: str,
) -> np.ndarray:
    """Binary masks -> one index mask; where they overlap, the later of `painted` wins.

    painted: {structure: class index} in painting order; one that is not there has no
    pixel. Raises UserError for an unknown structure, another size or value.
    """
    unknown = sorted(set(structures) - set(painted))
    if unknown:
        raise UserError(f"{where}: unknown structure {unknown[0]!r}")
    mask = np.zeros(shape, np.uint8)
    for name, index in painted.items():
        if name not in structures:
            continue
        binary = np.asarray(structures[name])
        if binary.shape != shape:
            raise UserError(
                f"{where}: structure {name!r} is {list(binary.shape)}, the image "
                f"{list(shape)}"
            )
        if not np.isin(binary, (0, 1)).all():
            raise UserError(f"{where}: structure {name!r} has values beyond 0 and 1")
        mask[binary == 1] = index
    return mask


def read_mha(data: bytes, where: str) -> np.ndarray:
    """MetaImage of bytes -> uint8 array, axes in the order of the last DimSize first.

    Raises UserError naming the file.
    """
    try:
        pixels = read_metaimage(data)
    except Unreadable as error:
        raise UserError(f"{where}: MetaImage {error}") from None
    if pixels.dtype != np.uint8:
        raise UserError(f"{where}: MetaImage of {pixels.dtype}, not of bytes")
    return pixels
