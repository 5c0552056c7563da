"""Data sets opened by name, from the sections of the configs."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import fass, fetal_planes
from ultradino_jax.data.datasets.open import (
    LABELLED,
    SEGMENTED,
    open_labelled,
    open_segmented,
)
from ultradino_jax.data.phantom.layouts import write_psfhs

tfds.disable_progress_bar()


def pictures(root, folders):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in "ab":
            pixels = np.full((20, 30), 1, np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{name}.png")
    return str(root)


def test_a_section_of_a_config_or_a_dict_opens_the_same(tmp_path):
    section = fetal_planes.dataset("folder")
    section.path = pictures(tmp_path, ("cat", "dog"))
    section.mask_corner = True
    data = open_labelled(section)
    assert data.classes == ("cat", "dog") and len(data) == 4
    assert data[0][0, 29] == 0 and data[0][19, 0] == 1
    plain = open_labelled({"name": "folder", "path": section.path})
    assert plain.split_hash() == data.split_hash() and plain[0][0, 29] == 1

    section = fass.dataset("folder")
    section.path = pictures(tmp_path / "sets", ("images", "masks"))
    section.classes = ("background", "head")
    assert open_segmented(section).mask(1).all()


def test_a_published_set_is_prepared_once(tmp_path):
    write_psfhs(tmp_path / "psfhs", 2, size=32)
    section = fass.dataset("psfhs")
    section.data_dir, section.manual_dir = str(tmp_path), str(tmp_path / "psfhs")
    first = open_segmented(section)
    again = open_segmented({"name": "psfhs", "data_dir": tmp_path})
    assert first.split_hash() == again.split_hash() and len(first) == 2
    with pytest.raises(ValueError, match="psfhs: data_dir is empty"):
        open_segmented(fass.dataset("psfhs"))


def test_an_unknown_name_is_told_those_there_are():
    with pytest.raises(ValueError, match="'x' is unknown; choose .*csv or folder"):
        open_labelled({"name": "x"})
    with pytest.raises(ValueError, match="'csv' is unknown; choose fass, .*or folder"):
        open_segmented({"name": "csv"})
    assert {*LABELLED, *SEGMENTED} >= {"fetal_planes", "african_planes", "jnu_ifm"}
