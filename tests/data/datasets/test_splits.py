"""What a segmentation run trains, validates and tests on."""

import numpy as np
import pytest

from ultradino_jax.data.datasets.segmented import (
    make_splits,
    segmented_images,
    training_subset,
)


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
