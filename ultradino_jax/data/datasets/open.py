"""Data sets by name."""

from ml_collections import ConfigDict

from ultradino_jax.data.datasets.labelled import (
    LabelledImages,
)
from ultradino_jax.errors import UserError


def load_dataset(section: ConfigDict) -> LabelledImages:
    """The data set that a config section names.

    Raises UserError for an unknown name, and what its reader raises.
    """
    name = section.name
    builders = dict(
        data_dir=section.data_dir,
        manual_dir=section.manual_dir,
        download=section.download,
    )
    splits = dict(val_fraction=section.val_fraction, split_seed=section.split_seed)
    tables = dict(classes=tuple(section.classes), test_fraction=section.test_fraction)
    # Imported where needed: the builders bring tensorflow-datasets.
    if name == "fetal_planes":
        from ultradino_jax.data.datasets.fetal_planes import load_fetal_planes

        files = tuple(section.split_files)
        data = load_fetal_planes(**builders, **splits, split_files=files)
    elif name == "african_planes":
        from ultradino_jax.data.datasets.african_planes import load_african_planes

        data = load_african_planes(**builders)
    elif name in ("csv", "folder"):
        from ultradino_jax.data.datasets.table import load_class_folders, load_csv

        read = load_csv if name == "csv" else load_class_folders
        data = read(section.path, **splits, **tables)
    else:
        raise UserError(
            f"data set {name!r} is unknown; choose fetal_planes, african_planes, csv "
            "or folder"
        )
    return LabelledImages(**{**vars(data), "mask_corner": section.mask_corner})
