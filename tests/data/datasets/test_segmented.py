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

from ultradino_jax.data.datasets.fass import (
    CLASSES,
    PAINTED,
    load_fass,
    read_structures,
)
from ultradino_jax.data.datasets.jnu_ifm import load_jnu_ifm, patient_of
from ultradino_jax.data.datasets.masks import (
    decode_index,
    encode_png,
    load_mask_folders,
    paint,
    read_mha,
    remap,
)
from ultradino_jax.data.datasets.psfhs import load_psfhs
from ultradino_jax.data.datasets.segmented import (
    make_splits,
    segmented_images,
    training_subset,
)
from ultradino_jax.data.phantom.layouts import (
    FASS_FOLDER,
    write_fass,
    write_jnu_ifm,
    write_mha,
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
    write_fass(root / "fass", 9, size=40)
    write_jnu_ifm(root / "jnu", 4, size=40)
    write_psfhs(root / "psfhs", 4, size=32)
    return root


@pytest.fixture(scope="module")
def fass(place):
    return load_fass(place / "tfds", manual_dir=place / "fass")


def test_fass_masks_are_the_structures_in_painting_order(place, fass):
    root = place / "fass" / FASS_FOLDER
    files = sorted((root / "IMAGES").iterdir())
    assert len(fass) == len(files) == len(np.unique(fass.ids))
    assert {str(p) for p in fass.patients} == {f"P0{i}" for i in range(1, 10)}
    overlaps = 0
    for i in range(0, len(fass), 3):
        stem = fass.ids[i]
        with Image.open(root / "IMAGES" / f"{stem}.png") as image:
            np.testing.assert_array_equal(fass[i], image.convert("L"))
        stored = np.load(root / "ARRAY_FORMAT" / f"{stem}.npy", allow_pickle=True)
        parts = stored.item()["structures"]
        mask = fass.mask(i)
        assert mask.dtype == np.uint8 and mask.max() < len(CLASSES)
        expected = np.zeros_like(mask)
        for name, index in [("liver", 2), ("stomach", 3), ("artery", 1), ("vein", 4)]:
            expected = np.where(parts[name], index, expected)
        np.testing.assert_array_equal(mask, expected)
        overlaps += (sum(parts.values()) > 1).sum()
    assert overlaps > 0  # the phantom draws some


@pytest.mark.parametrize("layout", ["zip", "zip in a zip", "unpacked"])
def test_fass_is_found_at_any_nesting(place, tmp_path, layout, fass):
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
    data = load_fass(tmp_path / "tfds", manual_dir=manual)
    assert list(data.ids) == [p.stem for p in keep]
    np.testing.assert_array_equal(data.mask(1), fass.mask(1))


def test_hostile_and_unfit_arrays_are_refused_in_a_line(tmp_path):
    def stored(content):
        np.save(tmp_path / "x.npy", np.array(content, object))
        return (tmp_path / "x.npy").read_bytes()

    fine = np.zeros((4, 5), np.uint8)
    with pytest.raises(ValueError, match=r"a\.npy: pickle names"):
        read_structures(stored({"structures": Wanted()}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match="no dict of structures"):
        read_structures(stored({"image": fine}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match="unknown structure 'kidney'"):
        read_structures(stored({"structures": {"kidney": fine}}), (4, 5), "a.npy")
    with pytest.raises(ValueError, match=r"'vein' is \[4, 5\], the image \[5, 5\]"):
        read_structures(stored({"structures": {"vein": fine}}), (5, 5), "a.npy")
    with pytest.raises(ValueError, match="values beyond 0 and 1"):
        paint({"vein": fine + 2}, PAINTED, (4, 5), "a.npy")


def test_fass_without_its_partner_is_refused(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place / "fass", copy)
    (copy / FASS_FOLDER / "ARRAY_FORMAT" / "P02_IMG1.npy").unlink()
    with pytest.raises(ValueError, match="image 'P02_IMG1' has no mask"):
        load_fass(tmp_path / "tfds", manual_dir=copy)


def test_jnu_ifm_keeps_frames_with_both_structures(place, capsys):
    data = load_jnu_ifm(place / "tfds_jnu", manual_dir=place / "jnu")
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
    assert patient_of("20190909T155747__B_产科_0") == "20190909T155747"
    assert patient_of("other") == "other"
    days = load_jnu_ifm(place / "tfds_jnu", group_by="day")
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
    ours = load_jnu_ifm(tmp_path / "tfds", manual_dir=tmp_path / "download")
    known = load_jnu_ifm(place / "tfds_jnu", manual_dir=place / "jnu")
    assert len(known) > 3
    np.testing.assert_array_equal(ours.ids, known.ids)
    np.testing.assert_array_equal(ours.patients, known.patients)
    np.testing.assert_array_equal(ours.mask(3), known.mask(3))


def test_psfhs_reads_raw_and_packed_files(place):
    data = load_psfhs(place / "tfds_psfhs", manual_dir=place / "psfhs")
    assert list(data.ids) == ["03744", "03745", "03746", "03747"]
    for i in range(4):
        image, mask = data[i], data.mask(i)
        assert image.shape == (32, 32) and image.std() > 5
        assert mask.shape == (32, 32) and mask.max() <= 2
        # Structures are bodies, not the scatter a wrong axis order would give.
        assert components(mask == 2).max() <= 1
    assert {0, 1, 2} == set(np.concatenate([np.unique(data.mask(i)) for i in range(4)]))
    pixels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for packed in (False, True):
        write_mha(place / "x.mha", pixels, packed)
        ours = read_mha((place / "x.mha").read_bytes(), "x")
        np.testing.assert_array_equal(ours, pixels)
    with pytest.raises(ValueError, match="b: no header of a MetaImage"):
        read_mha(b"DimSize = 1", "b")
    cut = (place / "psfhs" / "PSFHS" / "image_mha" / "03745.mha").read_bytes()[:-20]
    with pytest.raises(ValueError, match="b: damaged MetaImage"):
        read_mha(cut, "b")


def test_index_masks_of_any_mode():
    values = np.array([[0, 1], [2, 255]], np.uint8)
    np.testing.assert_array_equal(decode_index(encode_png(values)), values)
    palette = Image.fromarray(values).convert("P")
    palette.putpalette([9] * 768)
    assert palette.mode == "P"
    np.testing.assert_array_equal(decode_index(saved(palette)), np.asarray(palette))
    colour = np.repeat(values[:, :, None], 3, 2)
    np.testing.assert_array_equal(decode_index(saved(Image.fromarray(colour))), values)
    colour[0, 1, 0] = 7
    with pytest.raises(ValueError, match="m: a colour picture"):
        decode_index(saved(Image.fromarray(colour)), "m")
    with pytest.raises(ValueError, match="m: unknown mask value 9; known are 0, 7"):
        remap(np.array([[0, 9]], np.uint8), {0: 0, 7: 1}, "m")


def saved(image):
    import io

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


def many(patients=40, seed=0):
    """Patients of 3 to 16 images, in an order that means nothing."""
    rng = np.random.default_rng(seed)
    rows = [
        {"id": f"p{p}_{k}", "patient": f"p{p}", "split": "train"}
        for p in range(patients)
        for k in range(rng.integers(3, 17))
    ]
    rng.shuffle(rows)
    return segmented_images("many", "1", ("background", "x"), rows, None, None)


def splits_of(data, subset, seed, **options):
    defaults = dict(test_fraction=0.2, val_fraction=0.2, split_seed=0)
    return make_splits(data, subset, seed, **{**defaults, **options})


@pytest.mark.parametrize("subset", ["full", "n20", "p4", "10pct", "25pct", "50pct"])
def test_subsets_share_no_patient_and_keep_the_test_set(subset):
    data = many()
    full = splits_of(data, "full", 0)
    drawn = []
    for seed in range(5):
        out = splits_of(data, subset, seed)
        assert out.split_hash() == splits_of(data, subset, seed).split_hash()
        sides = [set(out.split(s).patients) for s in ("train", "val", "test")]
        assert sum(map(len, sides)) == len(set.union(*sides))
        np.testing.assert_array_equal(out.split("test").ids, full.split("test").ids)
        drawn.append(tuple(out.split("train").ids))
        if subset == "n20":
            assert len(drawn[-1]) == 20
            # Validation is every image of the women who are not drawn.
            assert len(sides[0]) + len(sides[1]) == 32
        if subset == "p4":
            counts = np.unique(out.split("train").patients, return_counts=True)[1]
            own = [
                sum(data.patients == p) for p in np.unique(out.split("train").patients)
            ]
            assert list(counts) == [min(n, 10) for n in own] and len(counts) == 4
        if subset.endswith("pct"):
            share = int(subset[:-3]) / 100
            assert len(sides[0]) == int(np.ceil(share * 25))
            np.testing.assert_array_equal(out.split("val").ids, full.split("val").ids)
    assert len(set(drawn)) == (1 if subset == "full" else 5)


def test_shares_are_nested_and_new_patients_move_nobody():
    data = many()
    sets = [set(splits_of(data, f"{p}pct", 1).split("train").ids) for p in (10, 25, 50)]
    assert sets[0] < sets[1] < sets[2]
    reordered = data.take(np.random.default_rng(1).permutation(len(data)))
    assert (
        splits_of(reordered, "n20", 3).split_hash()
        == splits_of(data, "n20", 3).split_hash()
    )


def test_empty_and_unknown_draws_are_refused():
    data = many(4)
    with pytest.raises(ValueError, match="subset 'k20': expected full, n20, p4"):
        training_subset(data, "k20", 0)
    for subset in ("n0", "p0", "0pct"):
        with pytest.raises(ValueError, match="draws nothing to train on"):
            training_subset(data, subset, 0)
    with pytest.raises(ValueError, match="3 patients outside the test set, p4 needs 4"):
        splits_of(data, "p4", 0)
    with pytest.raises(ValueError, match="the val split is empty"):
        splits_of(data, "p3", 0)


def test_split_files(tmp_path):
    data = many(4)
    names = ["train", "val", "test"]
    lines = [f"{data.ids[i]},{names[i % 3]}" for i in range(9)]
    path = tmp_path / "split_2.csv"

    def read(text):
        path.write_text("id,split\n" + text)
        return splits_of(data, "n20", 2, split_file=str(tmp_path / "split_{seed}.csv"))

    with pytest.raises(ValueError, match="patients are in more than one split"):
        read("\n".join(lines))
    first = [np.flatnonzero(data.patients == p)[0] for p in np.unique(data.patients)]
    lines = [f"{data.ids[i]},{s}" for i, s in zip(first[:3], names, strict=True)]
    out = read("\n".join(lines))
    assert dict(zip(out.ids, out.splits, strict=True)) == dict(
        line.split(",") for line in lines
    )
    for bad, text in [
        ("zz,train", "image 'zz' is not in many"),
        (lines[0], "is listed twice"),
        (f"{data.ids[5]},dev", "split 'dev'"),
    ]:
        with pytest.raises(ValueError, match=text):
            read("\n".join([*lines, bad]))
    with pytest.raises(FileNotFoundError, match=r"split_3\.csv' does not exist"):
        splits_of(data, "full", 3, split_file=str(tmp_path / "split_{seed}.csv"))
