"""Images of an evaluation that were seen in pretraining."""

import json

import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data.datasets.labelled import labelled_images
from ultradino_jax.data.datasets.segmented import segmented_images
from ultradino_jax.evaluators.overlap import check_overlap
from ultradino_jax.prepare import prepare


def pretrained_on(tmp_path, root, list_file=""):
    """A checkpoint with the config.json that its run left beside it."""
    config = {"data": {"root": str(root), "list_file": list_file}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "backbone"


def quiet(line):
    del line


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 48)).astype(np.uint8) for _ in range(12)]


@pytest.fixture(scope="module")
def data(pictures):
    """Twelve images: six to train, two to validate, four to test."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    rows = [
        {"id": f"image{i:02d}", "label": "a", "patient": str(i), "split": split}
        for i, split in enumerate(splits)
    ]
    return labelled_images("pictures", "1", ("a",), rows, pictures.__getitem__)


def test_test_images_in_pretraining_stop_the_run(data, pictures, tmp_path):
    """A list of training images passes, the whole folder does not."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in zip(data.ids, pictures, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    whole = pretrained_on(tmp_path, folder)
    with pytest.raises(ValueError, match="6 validation or test images of pictures"):
        check_overlap(whole, data, allowed=False, say=quiet)
    counts = check_overlap(whole, data, allowed=True, say=quiet)
    assert counts == {"checked": True, "train": 6, "val": 2, "test": 4}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{name}.png" for name in data.ids[:5]))
    listed = pretrained_on(tmp_path, folder, str(names))
    counts = check_overlap(listed, data, allowed=False, say=quiet)
    assert counts == {"checked": True, "train": 5, "val": 0, "test": 0}


def test_files_of_the_same_name_are_compared_by_pixels(data, tmp_path):
    for name in data.ids[:4]:
        Image.new("L", (48, 40)).save(tmp_path / f"{name}.png")
    checkpoint = pretrained_on(tmp_path, tmp_path)
    counts = check_overlap(checkpoint, data, allowed=False, say=quiet)
    assert counts == {"checked": True, "train": 0, "val": 0, "test": 0}


def test_a_prepared_cache_is_asked_by_hash(data, pictures, tmp_path):
    source = tmp_path / "renamed"
    source.mkdir()
    for i in (1, 7, 9):  # renamed: only the pixels can tell
        Image.fromarray(pictures[i]).convert("RGB").save(source / f"{90 - i}.png")
    prepare(source, tmp_path / "cache", workers=0, short_side=32, progress=False)
    checkpoint = pretrained_on(tmp_path, tmp_path / "cache")
    with pytest.raises(ValueError, match="2 validation or test .* first 'image07'"):
        check_overlap(checkpoint, data, allowed=False, say=quiet)


def test_what_cannot_be_checked_is_said(data, tmp_path):
    lines = []
    for root, word in ((None, "no config.json"), ("", "phantom"), ("moved", "moved")):
        checkpoint = tmp_path if root is None else pretrained_on(tmp_path, root)
        record = check_overlap(checkpoint, data, allowed=False, say=lines.append)
        assert not record["checked"]
        assert "not checked" in lines[-1] and word in lines[-1]
    record = check_overlap(None, data, allowed=False, say=lines.append)
    assert record == {"checked": False, "reason": "nothing was pretrained"}


def test_an_image_seen_in_pretraining_is_found_in_every_runs_split(pictures, tmp_path):
    """It trains in the first split and validates in the second."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(pictures[1]).save(folder / "b.png")
    checkpoint = pretrained_on(tmp_path, folder)

    def split(*names):
        rows = [
            {"id": i, "patient": i, "split": s}
            for i, s in zip("abcd", names, strict=True)
        ]
        read = pictures.__getitem__
        return segmented_images("set", "1", ("background", "x"), rows, read, read)

    first = split("train", "train", "val", "test")
    later = split("train", "val", "train", "test")
    counts = check_overlap(checkpoint, first, allowed=False, say=quiet)
    assert counts == {"checked": True, "train": 1, "val": 0, "test": 0}
    with pytest.raises(ValueError, match="1 validation or test .* first 'b'"):
        check_overlap(checkpoint, first, later, allowed=False, say=quiet)
    counts = check_overlap(checkpoint, first, later, allowed=True, say=quiet)
    assert counts == {"checked": True, "train": 1, "val": 1, "test": 0}
