"""Any images with index masks: folders of files of equal base names."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ultradino_jax.data.datasets.archive import decode_grey
from ultradino_jax.data.datasets.labelled import SPLITS
from ultradino_jax.data.datasets.mask_files import check_partners
from ultradino_jax.data.datasets.segmented import SegmentedImages, segmented_images
from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.data.formats.listing import (
    SUFFIXES,
    is_junk,
    list_pictures,
    stem,
    suffix,
)
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError
from ultradino_jax.progress import warn

MASK_FOLDERS = ("annotations", "masks", "mask", "labels")


def load_mask_folders(
    path: str | os.PathLike, *, classes: Sequence[str]
) -> SegmentedImages:
    """Any set of images and index masks of equal base names.

    PATH/images and PATH/masks (or annotations, mask, labels), or the same below
    PATH/train[/..], PATH/val and PATH/test; folders inside them belong to the name. A
    mask may be called NAME_mask. With PATH/patients.csv (columns id, patient) images
    are grouped; otherwise each is its own patient. Ids are names without suffix; where
    one occurs in two splits, they begin with the split. classes: names in index order,
    background first.
    Raises FileNotFoundError or UserError naming what is missing or there twice.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"folder {str(root)!r} does not exist")
    if len(classes) < 2:
        raise UserError(f"{str(root)!r}: name the classes, background first")
    rows, files = [], []
    for folder in _image_folders(root):
        first = folder.relative_to(root).parts[0]
        split = first if first in SPLITS else "train"
        for name, image, mask in _pairs(folder, _mask_folder(folder)):
            rows.append({"id": name, "patient": name, "split": split})
            files.append((image, mask))
    if len({row["id"] for row in rows}) < len(rows):
        for row in rows:
            row["patient"] = row["id"] = f"{row['split']}/{row['id']}"
    _group(rows, root / "patients.csv")
    names = "\n".join(f"{r['split']}/{r['id']}/{r['patient']}" for r in rows)
    return segmented_images(
        root.resolve().name,
        hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        classes,
        rows,
        lambda i: decode_grey(files[i][0]),
        lambda i: read_labels(files[i][1]),
    )


def _image_folders(root: Path) -> list[Path]:
    """Every folder 'images' below, sorted; what lies in one belongs to it."""
    found = []

    def fail(error):
        raise error  # a folder that cannot be listed is not left out in silence

    for parent, folders, _ in os.walk(root, onerror=fail):
        if "images" in folders:
            found.append(Path(parent) / "images")
        folders[:] = [f for f in folders if f != "images" and not is_junk(f)]
    if not found:
        raise FileNotFoundError(f"no folder 'images' in {str(root)!r} or below")
    return sorted(found)


def _mask_folder(images: Path) -> Path:
    for name in MASK_FOLDERS:
        if (images.parent / name).is_dir():
            return images.parent / name
    raise FileNotFoundError(
        f"no folder of masks ({', '.join(MASK_FOLDERS)}) beside {str(images)!r}"
    )


def _pairs(images: Path, masks: Path) -> list[tuple[str, Path, Path]]:
    """(name, image, its mask) of two folders, sorted by name."""
    by_name = _by_stem(images, lambda name: name)
    partners = _by_stem(
        masks, lambda name: name if name in by_name else name.removesuffix("_mask")
    )
    check_partners(by_name, partners, str(images.parent))
    return [(name, path, partners[name]) for name, path in sorted(by_name.items())]


def _by_stem(folder: Path, called) -> dict[str, Path]:
    """{called(name without suffix): file}. Raises UserError for two of one name."""
    listing = list_pictures(folder)
    listing.tell(folder, warn)
    found: dict[str, Path] = {}
    for name in listing.names:
        key = called(stem(name))
        if key in found:
            raise UserError(
                f"{folder}: {found[key].name!r} and {name!r} have one name, and there "
                "can be one mask for each name: rename or remove one"
            )
        found[key] = folder / name
    return found


def _group(rows: list[dict[str, str]], table: Path) -> None:
    """Put in the patients of a table, if there is one."""
    if not table.is_file():
        return
    content = read_table(table.read_bytes(), ["id", "patient"], str(table))
    patients = {_bare(row["id"]): row["patient"] for row in content}
    for row in rows:
        plain = row["id"].removeprefix(f"{row['split']}/")
        patient = patients.get(row["id"]) or patients.get(plain)
        if patient is None:
            raise UserError(f"{table}: no patient of image {row['id']!r}")
        row["patient"] = patient


def _bare(name: str) -> str:
    """A file's name as an id; a name without a picture's suffix is one already."""
    return stem(name) if suffix(name) in SUFFIXES else name
