"""Segmentation sets on phantom data in the layout of the real downloads."""

import csv
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from skimage.measure import label as components

from ultradino_jax.data.datasets import fass, jnu_ifm, psfhs
from ultradino_jax.data.datasets.mask_files import paint
from ultradino_jax.data.phantom.layouts import (
    FASS_FOLDER,
    write_fass,
    write_jnu_ifm,
    write_psfhs,
)

tfds.disable_progress_bar()


class Wanted:
    """Code that a hostile pickle asks for."""

    def __reduce__(self):
        return (Path("/nowhere").exists, ())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmented")
    write_fass(root / "fass", 4, size=40)
    write_jnu_ifm(root / "jnu", 2, size=40)
    write_psfhs(root / "psfhs", 4, size=32)
    return root


@pytest.fixture(scope="module")
def abdomens(place):
    return fass.load(place / "tfds", manual_dir=place / "fass")


def test_fass_masks_are_the_structures_in_painting_order(place, abdomens):
    root = place / "fass" / FASS_FOLDER
    files = sorted((root / "IMAGES").iterdir())
    assert len(abdomens) == len(files) == len(np.unique(abdomens.ids))
    assert {str(p) for p in abdomens.patients} == {f"P0{i}" for i in range(1, 5)}
    overlaps = 0
    for i in range(0, len(abdomens), 3):
        stem = abdomens.ids[i]
        with Image.open(root / "IMAGES" / f"{stem}.png") as image:
            np.testing.assert_array_equal(abdomens[i], image.convert("L"))
        stored = np.load(root / "ARRAY_FORMAT" / f"{stem}.npy", allow_pickle=True)
        parts = stored.item()["structures"]
        mask = abdomens.mask(i)
        assert mask.dtype == np.uint8 and mask.max() < len(fass.CLASSES)
        expected = np.zeros_like(mask)
        for name, index in [("liver", 2), ("stomach", 3), ("artery", 1), ("vein", 4)]:
            expected = np.where(parts[name], index, expected)
        np.testing.assert_array_equal(mask, expected)
        overlaps += (sum(parts.values()) > 1).sum()
    assert overlaps > 0  # the phantom draws some


@pytest.mark.parametrize("layout", ["zip", "zip in a zip", "unpacked"])
def test_fass_is_found_at_any_nesting(place, tmp_path, layout, abdomens):
    inner = tmp_path / "inner.zip"
    root = place / "fass" / FASS_FOLDER
    keep = sorted((root / "IMAGES").iterdir())[:3]
    with zipfile.ZipFile(inner, "w") as archive:
        for image in keep:
            archive.write(image, f"{FASS_FOLDER}/IMAGES/{image.name}")
            array = root / "ARRAY_FORMAT" / f"{image.stem}.npy"
            archive.write(array, f"{FASS_FOLDER}/ARRAY_FORMAT/{array.name}")
        archive.writestr("__MACOSX/IMAGES/._P01_IMG1.png", b"shadow")
    manual = tmp_path / "manual"
    manual.mkdir()
    if layout == "zip":
        shutil.copy(inner, manual)
    elif layout == "zip in a zip":
        with zipfile.ZipFile(manual / "4gcpm9dsc3-1.zip", "w") as archive:
            archive.write(inner, f"4gcpm9dsc3-1/{FASS_FOLDER}.zip")
    else:
        with zipfile.ZipFile(inner) as archive:
            archive.extractall(manual / "deeper" / "still")
    data = fass.load(tmp_path / "tfds", manual_dir=manual)
    assert list(data.ids) == [p.stem for p in keep]
    np.testing.assert_array_equal(data.mask(1), abdomens.mask(1))


def test_hostile_and_unfit_arrays_are_refused_in_a_line(tmp_path):
    def stored(content):
        np.save(tmp_path / "x.npy", np.array(content, object))
        return (tmp_path / "x.npy").read_bytes()

    fine = np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"a\.npy: pickle names"):
        fass.read_structures(stored({"structures": Wanted()}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match="no dict of structures"):
        fass.read_structures(stored({"image": fine}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match="unknown structure 'kidney'"):
        fass.read_structures(stored({"structures": {"kidney": fine}}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match=r"'vein' is \[4, 5\], the image \[5, 5\]"):
        fass.read_structures(stored({"structures": {"vein": fine}}), (5, 5), "a.npy")
    with pytest.raises(ValueError, match="values beyond 0 and 1"):
        paint({"vein": fine + 2}, fass.PAINTED, (4, 5), "a.npy")


def test_fass_without_its_partner_is_refused(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "fass", copy)
    (copy / FASS_FOLDER / "ARRAY_FORMAT" / "P02_IMG1.npy").unlink()
    with pytest.raises(ValueError, match="image 'P02_IMG1' has no mask"):
        fass.load(tmp_path / "tfds", manual_dir=copy)


def test_jnu_ifm_keeps_frames_with_both_structures(place, capsys):
    data = jnu_ifm.load(place / "tfds_jnu", manual_dir=place / "jnu")
    root = place / "jnu" / "JNU-IFM" / "us_data"
    expected = set()
    for mask in root.glob("*/mask/*.png"):
        with Image.open(mask) as image:
            if {7, 8} <= set(np.unique(image)):
                expected.add(mask.stem.removesuffix("_mask"))
    assert set(data.ids) == expected
    assert any("产科" in name for name in data.ids)
    assert "without a mask left out" in capsys.readouterr().err
    for i in (0, len(data) - 1):
        name = data.ids[i]
        video = name.rsplit("_", 1)[0]
        with Image.open(root / video / "mask" / f"{name}_mask.png") as image:
            stored = np.asarray(image)
        mask = data.mask(i)
        np.testing.assert_array_equal(mask == 1, stored == 7)
        np.testing.assert_array_equal(mask == 2, stored == 8)
    # Both videos of an examination are one group.
    assert set(data.patients) == {name[:15] for name in expected}
    videos = {name.rsplit("_", 1)[0] for name in data.ids}
    assert len(videos) == 2 * len(np.unique(data.patients))
    assert jnu_ifm.patient_of("20190909T155747__B_产科_0") == "20190909T155747"
    assert jnu_ifm.patient_of("other") == "other"
    days = jnu_ifm.load(place / "tfds_jnu", group_by="day")
    assert {p[:8] for p in data.patients} == set(days.patients)


@pytest.mark.parametrize("table", ["framelabel.csv", "above"])
def test_jnu_ifm_in_one_flat_folder_is_the_same_data(place, tmp_path, table):
    """A re-upload: image/, mask/ and one table with a column video_name."""
    root = place / "jnu" / "JNU-IFM" / "us_data"
    flat = tmp_path / "download" / "JNU-IFM"
    for kind in ("image", "mask"):
        (flat / kind).mkdir(parents=True)
        for path in root.glob(f"*/{kind}/*.png"):
            shutil.copy(path, flat / kind / path.name)
    lines = ["video_name,frame_id,frame_label"]
    for path in sorted(root.glob("*/frame_label.csv")):
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                cells = path.parent.name, row["frame_id"], row["frame_label"]
                lines.append(",".join(cells))
    where = flat.parent if table == "above" else flat
    (where / "framelabel.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    ours = jnu_ifm.load(tmp_path / "tfds", manual_dir=tmp_path / "download")
    known = jnu_ifm.load(place / "tfds_jnu", manual_dir=place / "jnu")
    assert len(known) > 3
    np.testing.assert_array_equal(ours.ids, known.ids)
    np.testing.assert_array_equal(ours.patients, known.patients)
    np.testing.assert_array_equal(ours.mask(3), known.mask(3))


def test_psfhs_reads_raw_and_packed_files(place):
    data = psfhs.load(place / "tfds_psfhs", manual_dir=place / "psfhs")
    assert list(data.ids) == ["03744", "03745", "03746", "03747"]
    for i in range(4):
        image, mask = data[i], data.mask(i)
        assert image.shape == (32, 32) and image.std() > 5
        assert mask.shape == (32, 32) and mask.max() <= 2
        # Structures are bodies, not the scatter a wrong axis order would give.
        assert components(mask == 2).max() <= 1
    assert {0, 1, 2} == set(np.concatenate([np.unique(data.mask(i)) for i in range(4)]))
