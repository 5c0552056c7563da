"""csv files, class folders, patient-wise splits and few-label draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ultradino_jax.data.datasets.labelled import (
    check_splits,
    few_per_class,
    held_out_patients,
    hold_out,
)
from ultradino_jax.data.datasets.table import load_class_folders, load_csv
from ultradino_jax.errors import UserError

CLASSES = ("cat", "dog", "eel")


def write_images(root, names):
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 30), value, np.uint8)
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(root / name)


def write_csv(root, rows, header="path,label,patient,split,site"):
    file = root / "table.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


@pytest.fixture
def rows(tmp_path):
    """36 images: 12 patients with one of each class, two sites."""
    names = [f"images/{p:02d}_{c}.png" for p in range(12) for c in CLASSES]
    write_images(tmp_path, names)
    return [
        f"{n},{CLASSES[i % 3]},p{i // 3},,{'AB'[i // 3 % 2]}"
        for i, n in enumerate(names)
    ]


def test_csv_with_every_column(tmp_path, rows):
    split = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    rows = [r.replace(",,", f",{split[i // 3]},") for i, r in enumerate(rows)]
    data = load_csv(write_csv(tmp_path, rows[::-1]), classes=("eel", "dog", "cat"))
    check_splits(data)
    assert data.classes == ("eel", "dog", "cat")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [18, 9, 9]
    assert list(data.ids) == sorted(data.ids)
    for i in range(36):
        assert data[i][5, 5] == i and data[i].shape == (20, 30)
        assert data.labels[i] == 2 - i % 3
        assert data.groups["site"][i] == "AB"[i // 3 % 2]
    test = data.split("test")
    assert test[0][5, 5] == 27 and test.groups["site"][0] == "B"


def test_missing_splits_are_made_by_patient(tmp_path, rows):
    rows = [r.replace(",,", ",") for r in rows]
    file = write_csv(tmp_path, rows, "path,label,patient,site")
    data = load_csv(file, val_fraction=0.3, test_fraction=0.25)
    check_splits(data)
    counts = {
        s: len(set(data.patients[data.splits == s])) for s in ("train", "val", "test")
    }
    assert counts == {"train": 6, "val": 3, "test": 3}  # ceil(12/4), ceil(0.3*9)
    again = load_csv(file, val_fraction=0.3, test_fraction=0.25)
    assert again.split_hash() == data.split_hash()
    other = load_csv(file, val_fraction=0.3, test_fraction=0.25, split_seed=1)
    assert other.split_hash() != data.split_hash()


@settings(max_examples=30, deadline=None)
@given(
    st.sets(st.text("a0é/ \n", min_size=1, max_size=4), min_size=1, max_size=30),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_held_out_patients_is_a_function_of_the_set(patients, fraction, seed):
    chosen = held_out_patients(patients, fraction, seed, "x")
    assert chosen <= patients
    assert len(chosen) == int(np.ceil(fraction * len(patients)))
    repeated = [*sorted(patients, reverse=True), *patients]
    assert held_out_patients(repeated, fraction, seed, "x") == chosen
    # A larger fraction keeps those already held out.
    assert chosen <= held_out_patients(patients, 1.0, seed, "x")


def test_bad_csv_is_named(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match="none.csv"):
        load_csv(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no column 'label'; there are 'path', 'x'"):
        load_csv(write_csv(tmp_path, ["a.png,1"], "path,x"))
    with pytest.raises(
        ValueError, match=r"1 of 37 images do not exist, first .*zz\.png"
    ):
        load_csv(write_csv(tmp_path, [*rows, "zz.png,cat,p1,,A"]))
    with pytest.raises(ValueError, match=r"'images/00_cat\.png' is listed twice"):
        load_csv(write_csv(tmp_path, [*rows, rows[0]]))
    with pytest.raises(ValueError, match="unknown class 'eel'; known are 'cat', 'dog'"):
        load_csv(write_csv(tmp_path, rows), classes=("cat", "dog"))
    with pytest.raises(ValueError, match="unknown split 'dev', expected train, val or"):
        bad = [r.replace(",,", ",dev,") for r in rows[:3]]
        good = [r.replace(",,", ",train,") for r in rows[3:]]
        check_splits(load_csv(write_csv(tmp_path, bad + good)))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff\xfep\0a\0", "no column 'path', 'label'; there are 'pa'"),
        (b"path,label\n\xe9.png,cat\n", "1 of 1 images do not exist, first .*é.png"),
        (b"path,label\na\0.png,cat\n", "not text: it holds a NUL byte"),
        (b'path,label\n"' + b"a" * 200_000 + b'",cat\n', "line 2: field larger than"),
    ],
)
def test_a_file_that_is_no_csv_is_the_user_s_error(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"table\.csv.*{message}"):
        load_csv(path)


def test_splits_that_cannot_be_scored_are_refused(tmp_path, rows):
    split = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    rows = [r.replace(",,", f",{split[i // 3]},") for i, r in enumerate(rows)]
    data = load_csv(write_csv(tmp_path, rows))
    empty = data.take(data.splits != "val")
    with pytest.raises(ValueError, match="the val split is empty"):
        check_splits(empty)
    absent = data.take((data.splits != "val") | (data.labels != 1))
    with pytest.raises(ValueError, match="val split of 6 images has none of .*'dog'"):
        check_splits(absent)


def test_class_folders(tmp_path):
    names = [f"{c}/deep/{i}.png" for c in CLASSES for i in range(10)]
    write_images(tmp_path / "plain", names)
    data = load_class_folders(tmp_path / "plain")
    check_splits(data)
    assert data.classes == CLASSES and len(data) == 30
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [19, 5, 6]
    split = {f"{s}/{n}" for n in names for s in ("train", "val", "test")}
    write_images(tmp_path / "split", sorted(split))
    data = load_class_folders(tmp_path / "split")
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [30, 30, 30]
    write_images(tmp_path / "flat", ["a.png"])
    with pytest.raises(ValueError, match=r"'a\.png' is not in a folder of a class"):
        load_class_folders(tmp_path / "flat")


def test_few_per_class(tmp_path, rows):
    data = load_csv(write_csv(tmp_path, rows))
    rows = few_per_class(data, 5, seed=0)
    assert np.bincount(data.labels[rows]).tolist() == [5, 5, 5]
    assert list(few_per_class(data, 5, seed=0)) == list(rows)
    assert list(few_per_class(data, 5, seed=1)) != list(rows)
    by_patient = data.take(few_per_class(data, 2, seed=0, by_patient=True))
    for label in range(3):
        assert len(set(by_patient.patients[by_patient.labels == label])) == 2
    with pytest.raises(ValueError, match="class 'cat' has 12 patients, 13 were asked"):
        few_per_class(data, 13, seed=0, by_patient=True)


def test_corner_mask_hides_only_the_corner(tmp_path, rows):
    from dataclasses import replace

    data = load_csv(write_csv(tmp_path, rows))
    plain, masked = data[7], replace(data, mask_corner=True)[7]
    changed = np.argwhere(plain != masked)
    assert changed.min(axis=0).tolist() == [0, 25] and (masked[:4, 25:] == 0).all()
    assert changed.max(axis=0).tolist() == [3, 29]


def test_hold_out_moves_whole_patients(tmp_path, rows):
    data = load_csv(write_csv(tmp_path, rows), test_fraction=0)
    moved = hold_out(data, "extra", source="train", fraction=0.5, seed=3)
    extra = moved.patients[moved.splits == "extra"]
    assert len(set(extra)) == 5 and len(extra) == 15  # ceil(9 / 2) patients of 3
