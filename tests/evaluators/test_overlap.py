"""Images of an evaluation that were seen in pretraining."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data.datasets.labelled import labelled_images
from ultradino_jax.data.datasets.segmented import segmented_images
from ultradino_jax.data.sources import open_source
from ultradino_jax.evaluators.overlap import check_overlap
from ultradino_jax.prepare import prepare
from ultradino_jax.weights.lineage import lineage


def pretrained_on(tmp_path, root, list_file=""):
    """A checkpoint with the config.json that its run left beside it."""
    config = {"data": {"root": str(root), "list_file": list_file}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "backbone"


def counts_of(*args, **options):
    record = check_overlap(*args, **options, say=quiet)
    return {k: record[k] for k in ("checked", "train", "val", "test")}


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
    counts = counts_of(whole, data, allowed=True)
    assert counts == {"checked": True, "train": 6, "val": 2, "test": 4}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{name}.png" for name in data.ids[:5]))
    listed = pretrained_on(tmp_path, folder, str(names))
    counts = counts_of(listed, data, allowed=False)
    assert counts == {"checked": True, "train": 5, "val": 0, "test": 0}


def test_files_of_the_same_name_are_compared_by_pixels(data, tmp_path):
    for name in data.ids[:4]:
        Image.new("L", (48, 40)).save(tmp_path / f"{name}.png")
    checkpoint = pretrained_on(tmp_path, tmp_path)
    counts = counts_of(checkpoint, data, allowed=False)
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
    counts = counts_of(checkpoint, first, allowed=False)
    assert counts == {"checked": True, "train": 1, "val": 0, "test": 0}
    with pytest.raises(ValueError, match="1 validation or test .* first 'b'"):
        check_overlap(checkpoint, first, later, allowed=False, say=quiet)
    counts = counts_of(checkpoint, first, later, allowed=True)
    assert counts == {"checked": True, "train": 1, "val": 1, "test": 0}


def test_pixels_are_compared_as_they_are_stored(data, pictures, tmp_path):
    """With the corner blacked out in what the network sees, in folders and caches."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in zip(data.ids, pictures, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    prepare(folder, tmp_path / "cache", workers=0, short_side=32, progress=False)
    masked = dataclasses.replace(data, mask_corner=True)
    for root in (folder, tmp_path / "cache"):
        counts = counts_of(pretrained_on(tmp_path, root), masked, allowed=True)
        assert counts == {"checked": True, "train": 6, "val": 2, "test": 4}


@pytest.mark.parametrize("noted", [True, False])
def test_runs_that_a_run_began_with_are_asked_too(data, pictures, tmp_path, noted):
    """b began with a, and c with b; a saw two test images."""
    places = {}
    for name, rows in {"a": (8, 9), "b": (0,), "c": (1,)}.items():
        images = tmp_path / name / "images"
        images.mkdir(parents=True)
        for i in rows:
            Image.fromarray(pictures[i]).save(images / f"{data.ids[i]}.png")
        places[name] = pretrained_on(tmp_path / name, images).parent
    for name, before in {"b": "a", "c": "b"}.items():
        path = places[name] / "config.json"
        config = json.loads(path.read_text()) | {"init_from": str(places[before])}
        path.write_text(json.dumps(config))
        if noted:
            ancestors = {"ancestors": lineage(places[before])}
            (places[name] / "run.json").write_text(json.dumps(ancestors))
    if noted:  # and the run in between is gone by now
        shutil.rmtree(places["b"])
    with pytest.raises(ValueError, match="2 validation or test .* first 'image08'"):
        check_overlap(places["c"] / "backbone", data, allowed=False, say=quiet)
    record = check_overlap(places["c"], data, allowed=True, say=quiet)
    asked = [entry["images"] for entry in record["of"]]
    assert asked == [str(places[x] / "images") for x in ("ca" if noted else "cba")]
    assert record["checked"] == (not noted) and record["test"] == 2
    if noted:
        assert "cannot be opened" in record["not_checked"][0]


def test_images_changed_since_are_not_called_checked(data, pictures, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(pictures[i]).save(folder / f"{data.ids[i]}.png")
    checkpoint = pretrained_on(tmp_path, folder)
    digest = {"digest": open_source(folder).digest()}
    (tmp_path / "run.json").write_text(json.dumps(digest))
    assert counts_of(checkpoint, data, allowed=False)["train"] == 3
    (folder / f"{data.ids[0]}.png").unlink()
    record = check_overlap(checkpoint, data, allowed=False, say=quiet)
    assert not record["checked"] and "now holds other images" in record["reason"]
