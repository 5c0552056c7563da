"""Other pictures under the same names are seen; a copy of a folder is the same."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data import source_digest
from ultradino_jax.data.source_digest import difference, sample_of, stream_record
from ultradino_jax.data.sources import FolderSource, ListSource


@pytest.fixture
def folder(tmp_path):
    """Forty uncompressed pictures of one size and one broken file."""
    rng = np.random.default_rng(0)
    place = tmp_path / "images"
    place.mkdir()
    for i in range(40):
        picture = rng.integers(0, 256, (20, 24)).astype(np.uint8)
        Image.fromarray(picture).save(place / f"{i:02d}.bmp")
    (place / "40.png").write_bytes(b"broken")
    return place


def compared(folder, before):
    source = FolderSource(folder)
    return difference(before, stream_record(source), source)


def test_a_copy_with_other_times_is_the_same(folder, tmp_path):
    before = stream_record(FolderSource(folder))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    assert compared(copy, before) == ""
    old = {key: before[key] for key in ("records", "digest")}  # all that was noted once
    assert compared(copy, old) == ""


def test_other_pixels_of_the_same_size_are_named(folder):
    before = stream_record(FolderSource(folder))
    for path in folder.glob("*.bmp"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 255
        path.write_bytes(data)
    first = f"{sample_of(41)[0]:02d}.bmp"
    assert compared(folder, before).endswith(f"is '{first}' now, it had other pixels")


@pytest.mark.parametrize("blocks", [256, 4])
def test_another_size_anywhere_is_named(folder, blocks, monkeypatch):
    monkeypatch.setattr(source_digest, "BLOCKS", blocks)
    before = stream_record(FolderSource(folder))
    outside = next(i for i in range(40) if i not in sample_of(41))
    path = folder / f"{outside:02d}.bmp"
    path.write_bytes(path.read_bytes() + b"\0")
    line = compared(folder, before)
    assert line.endswith("had another size")
    first = line.split("'")[1]
    assert first == path.name if blocks == 256 else first <= path.name


def test_other_names_and_counts(folder):
    before = stream_record(FolderSource(folder))
    (folder / "40.png").rename(folder / "00a.png")
    assert "another image stood there" in compared(folder, before)
    (folder / "00a.png").unlink()
    assert compared(folder, before) == "41 images there, 40 now"


def test_a_list_may_name_what_is_not_there(folder, tmp_path):
    (tmp_path / "list.txt").write_text("00.bmp\ngone.bmp\n")
    source = ListSource(tmp_path / "list.txt", folder)
    before = stream_record(source)
    assert difference(before, stream_record(source), source) == ""
    shutil.copy(folder / "01.bmp", folder / "gone.bmp")
    line = difference(before, stream_record(source), source)
    assert line == "image 1 is 'gone.bmp' now, it had other pixels"
