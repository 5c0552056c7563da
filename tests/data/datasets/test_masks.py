"""Index masks, and folders of images and masks."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data.datasets.mask_files import (
    encode_png,
    read_mha,
    remap,
)
from ultradino_jax.data.datasets.masks import load_mask_folders
from ultradino_jax.data.datasets.segmented import make_splits
from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.data.phantom.layouts import write_mha


def test_index_masks_of_any_mode():
    values = np.array([[0, 1], [2, 255]], np.uint8)
    np.testing.assert_array_equal(read_labels(encode_png(values)), values)
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([9] * 768)
    assert palette.mode == "P"
    np.testing.assert_array_equal(read_labels(saved(palette)), np.asarray(palette))
    colour = np.repeat(values[:, :, None], 3, 2)
    np.testing.assert_array_equal(read_labels(saved(Image.fromarray(colour))), values)
    colour[0, 1, 0] = 7
    with pytest.raises(ValueError, match="m: a colour picture"):
        read_labels(saved(Image.fromarray(colour)), "m")
    with pytest.raises(ValueError, match="m: unknown mask value 9; known are 0, 7"):
        remap(np.array([[0, 9]], np.uint8), {0: 0, 7: 1}, "m")


def test_metaimages_of_bytes_raw_and_packed(tmp_path):
    file = tmp_path / "x.mha"
    pixels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for packed in (False, True):
        write_mha(file, pixels, packed)
        np.testing.assert_array_equal(read_mha(file.read_bytes(), "x"), pixels)
    for data, message in (
        (b"DimSize = 1", r"b: MetaImage damaged or truncated \(header\)"),
        (file.read_bytes()[:-20], r"b: MetaImage damaged or truncated \(truncated\)"),
        (file.read_bytes().replace(b"UCHAR", b"SHORT"), "b: MetaImage .*truncated"),
        (file.read_bytes().replace(b"UCHAR", b"CHAR"), "b: MetaImage of int8, not of"),
        (file.read_bytes().replace(b"DimSize", b"Size"), r"b: .* \(KeyError\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read_mha(data, "b")


def saved(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folders(root, count=6, size=(20, 24)):
    for i in range(count):
        split = ("train/all", "train/all", "val", "test")[i % 4]
        for kind, name in (("images", f"x{i}"), ("masks", f"x{i}_mask")):
            folder = root / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full(size, i % 2, np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.png")


def test_folders_of_images_and_masks(tmp_path):
    write_folders(tmp_path)
    data = load_mask_folders(tmp_path, classes=("background", "head"))
    assert list(data.ids) == [f"x{i}" for i in range(6)]
    assert list(data.splits) == ["train", "train", "val", "test", "train", "train"]
    assert data.mask(1).all() and not data.mask(2).any()
    (tmp_path / "patients.csv").write_text("id,patient\n" + "\n".join(
        f"x{i},p{i // 3}" for i in range(6)))  # fmt: skip
    grouped = load_mask_folders(tmp_path, classes=("background", "head"))
    assert list(grouped.patients) == ["p0"] * 3 + ["p1"] * 3
    with pytest.raises(ValueError, match="'p0' in train and val"):
        make_splits(grouped, "full", 0, test_fraction=0.2, val_fraction=0.2,
                    split_seed=0)  # fmt: skip


def test_unfit_masks_in_folders_are_named(tmp_path):
    write_folders(tmp_path)
    with pytest.raises(ValueError, match="name the classes"):
        load_mask_folders(tmp_path, classes=())
    mask = tmp_path / "val" / "masks" / "x2_mask.png"
    Image.fromarray(np.full((20, 24), 5, np.uint8)).save(mask)
    data = load_mask_folders(tmp_path, classes=("background", "head"))
    with pytest.raises(ValueError, match="mask of 'x2' holds the value 5"):
        data.mask(2)
    Image.fromarray(np.zeros((24, 20), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"'x2' is \[24, 20\], the image \[20, 24\]"):
        data.mask(2)
    mask.rename(mask.with_name("other_mask.png"))
    with pytest.raises(ValueError, match="image 'x2' has no mask"):
        load_mask_folders(tmp_path, classes=("background", "head"))
    shutil.rmtree(mask.parent)
    with pytest.raises(FileNotFoundError, match="no folder of masks"):
        load_mask_folders(tmp_path, classes=("background", "head"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_mask_folders(tmp_path / "nowhere", classes=("background", "head"))


def pair(root, image, mask, value=1):
    for path, pixels in ((root / image, 90), (root / mask, value)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24), pixels, np.uint8)).save(path)


def load(root):
    return load_mask_folders(root, classes=("background", "head"))


def test_names_that_pair_images_and_masks(tmp_path, capsys):
    # Folders inside, another suffix, a name that ends in _mask, and system files.
    pair(tmp_path, "images/p1/z.JPG", "masks/p1/z.png")
    pair(tmp_path, "images/scan_mask.png", "masks/scan_mask.png")
    pair(tmp_path, "images/b.bmp", "masks/b_mask.tif")
    for junk in ("images/._b.bmp", "masks/._b_mask.tif", "images/Thumbs.db"):
        (tmp_path / junk).write_bytes(b"\0\5\x16\7")
    (tmp_path / "__MACOSX" / "images").mkdir(parents=True)
    data = load(tmp_path)
    assert list(data.ids) == ["b", "p1/z", "scan_mask"]
    assert all(data.mask(i).all() for i in range(3))
    assert "images: 3 of 5 files read; 2 junk" in capsys.readouterr().err


def test_one_name_in_two_splits_makes_two_images(tmp_path):
    for split in ("train", "val", "test"):
        pair(tmp_path, f"{split}/images/000.png", f"{split}/masks/000.png")
    rows = ["id,patient", "train/000.png,t", "val/000.png,v", "test/000,t"]
    (tmp_path / "patients.csv").write_text("\n".join(rows))
    data = load(tmp_path)
    assert list(data.ids) == ["test/000", "train/000", "val/000"]
    assert list(data.patients) == ["t", "t", "v"]


def test_one_name_twice_in_a_folder_is_refused(tmp_path):
    pair(tmp_path, "images/a.png", "masks/a.png")
    pair(tmp_path, "images/a.jpg", "masks/a_mask.png")
    with pytest.raises(ValueError, match=r"images: 'a.jpg' and 'a.png' have one name"):
        load(tmp_path)
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(ValueError, match=r"masks: 'a.png' and 'a_mask.png' have one"):
        load(tmp_path)
