"""Data sets by name: the one place that knows which there are."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ultradino_jax.data.datasets import (
    african_planes,
    fass,
    fetal_planes,
    jnu_ifm,
    masks,
    psfhs,
    table,
)
from ultradino_jax.data.datasets.labelled import LabelledImages
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.errors import UserError

LABELLED = {
    "fetal_planes": fetal_planes.load,
    "african_planes": african_planes.load,
    "csv": table.load_csv,
    "folder": table.load_class_folders,
}
SEGMENTED = {
    "fass": fass.load,
    "jnu_ifm": jnu_ifm.load,
    "psfhs": psfhs.load,
    "folder": masks.load_mask_folders,
}
Images = TypeVar("Images")


def open_labelled(section: Mapping[str, Any]) -> LabelledImages:
    """The labelled images that a section names.

    section: of a config, or a dict: 'name', a key of LABELLED; the arguments of that
    set's loader, those of others being ignored; 'mask_corner', of LabelledImages.
    Raises UserError for an unknown name, and what the loader raises.
    """
    values = dict(section)
    data = _load(LABELLED, values)
    return replace(data, mask_corner=values.get("mask_corner", False))


def open_segmented(section: Mapping[str, Any]) -> SegmentedImages:
    """The images with masks that a section names, without splits of this project.

    section: 'name', a key of SEGMENTED, and that loader's arguments, as above.
    """
    return _load(SEGMENTED, dict(section))


def _load(loaders: Mapping[str, Callable[..., Images]], values: dict) -> Images:
    if values["name"] not in loaders:
        *first, last = loaders
        raise UserError(
            f"data set {values['name']!r} is unknown; choose {', '.join(first)} or "
            f"{last}"
        )
    load = loaders[values["name"]]
    taken = inspect.signature(load).parameters
    return load(**{name: values[name] for name in taken if name in values})
