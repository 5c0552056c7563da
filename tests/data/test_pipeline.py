import json
import random

import numpy as np
import pytest

from ultradino_jax.data.cache import FORMAT, INDEX, VERSION, encode, write_shard
from ultradino_jax.data.crops import CropConfig, render_crops, sample_crops
from ultradino_jax.data.masking import sample_masks
from ultradino_jax.data.pipeline import MAX_BAD, build_pipeline
from ultradino_jax.data.sources import BadImage, CacheSource

CROPS = CropConfig(global_size=32, local_size=16, num_local=3)
FEW = CropConfig(global_size=16, num_local=0)  # where only the order matters
SETTINGS = {"batch_size": 8, "groups": 4, "patch_size": 8, "seed": 11}


class Records:
    """n random images of different sizes, of which `broken` cannot be read."""

    def __init__(self, count=13, broken=(), channels=1):
        self.count, self.broken, self.channels = count, broken, channels

    def __len__(self):
        return self.count

    def record_id(self, index):
        return f"record{index}"

    def __getitem__(self, index):
        if index in self.broken:
            raise BadImage("truncated", self.record_id(index))
        shape = (40 + index, 50, self.channels)
        return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


def batches(source=None, crops=CROPS, **changes):
    settings = {**SETTINGS, "num_steps": 4, "num_threads": 0, **changes}
    iterator = build_pipeline(source or Records(), crops, **settings)
    try:
        return list(iterator)
    finally:
        iterator.close()


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def reference():
    return batches()


def test_layout(reference):
    W, G, L, b, N = 4, 2, 3, 2, 16
    M = int(N * 0.3) + int(N * 0.5)  # two of the four rows, ratios up to .3 and .5
    expected = {
        "global_crops": ((W, G, b, 32, 32, 1), np.uint8),
        "local_crops": ((W, L, b, 16, 16, 1), np.uint8),
        "masks": ((W, G, b, N), np.bool_),
        "mask_indices": ((W, M), np.int32),
        "mask_weights": ((W, M), np.float32),
        "index": ((W, b), np.int64),
        "bad": ((W, b, MAX_BAD), np.int64),
    }
    for batch in reference:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected
        assert (batch["bad"] == -1).all()


def test_every_image_is_rendered_from_its_own_position(reference):
    source = Records()
    for step, batch in enumerate(reference):
        for w in range(4):
            for j in range(2):
                position = step * 8 + w * 2 + j
                image = source[batch["index"][w, j]]
                rng = np.random.default_rng([11, position])
                decisions = sample_crops(rng, *image.shape[:2], CROPS)
                views = render_crops(image, decisions, CROPS)
                np.testing.assert_array_equal(batch["global_crops"][w, :, j], views[0])
                np.testing.assert_array_equal(batch["local_crops"][w, :, j], views[1])


def test_masks_belong_to_the_group_and_the_step(reference):
    seen = set()
    for step, batch in enumerate(reference):
        for w in range(4):
            rng = random.Random(f"masks/11/{step}/{w}")
            masks, indices, weights = sample_masks(rng, 4, (4, 4))
            np.testing.assert_array_equal(batch["masks"][w].reshape(4, 16), masks)
            np.testing.assert_array_equal(batch["mask_indices"][w], indices)
            np.testing.assert_array_equal(batch["mask_weights"][w], weights)
            flat = batch["masks"][w].ravel()
            count = flat.sum()
            assert flat[batch["mask_indices"][w, :count]].all()
            seen.add(masks.tobytes())
    assert len(seen) == 16


def test_each_pass_holds_every_record_once_in_a_new_order():
    order = np.concatenate(
        [b["index"].ravel() for b in batches(crops=FEW, num_steps=13)]
    )
    passes = order.reshape(8, 13)  # 13 batches of 8 are 8 passes over 13 records
    assert (np.sort(passes, axis=1) == np.arange(13)).all()
    assert len({tuple(row) for row in passes}) == 8


def test_seeds_give_unrelated_streams():
    def order(seed):
        steps = batches(crops=FEW, num_steps=13, seed=seed)
        return np.concatenate([b["index"].ravel() for b in steps]).reshape(8, 13)

    passes = [tuple(row) for seed in (0, 1) for row in order(seed)]
    assert len(set(passes)) == 16  # also no pass of one shifted into the other


def test_a_source_smaller_than_the_batch_repeats():
    (batch,) = batches(Records(3), num_steps=1)
    counts = np.bincount(batch["index"].ravel(), minlength=3)
    assert counts.sum() == 8 and counts.min() >= 2
    crops = batch["global_crops"].reshape(-1, 32 * 32)
    assert len(np.unique(crops, axis=0)) == len(crops)  # repeats are cropped anew


@pytest.mark.parametrize("start", [1, 3])
def test_resuming_at_a_step_continues_the_stream(reference, start):
    assert_same(batches(start_step=start, num_steps=4 - start), reference[start:])


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 2), (3, 5)])
def test_threads_change_nothing(reference, threads, prefetch):
    assert_same(batches(num_threads=threads, prefetch=prefetch), reference)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_groups(reference, count):
    parts = [batches(process_index=p, process_count=count) for p in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, reference)


def test_workers_change_nothing(tmp_path):
    """From a cache: its readers are opened anew in each process."""
    payloads = [encode(Records()[k][..., 0], "png") for k in range(5)]
    payloads[2] = b"broken"
    shard = write_shard(tmp_path / "shard-00000", payloads, np.zeros(5, INDEX))
    manifest = {"format": FORMAT, "version": VERSION, "shards": [shard]}
    manifest |= {"mean": [0.5], "std": [0.25]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    source = CacheSource(tmp_path)
    expected = batches(source)
    assert any((batch["bad"] == 2).any() for batch in expected)
    assert_same(batches(source, num_workers=2, num_threads=1), expected)


def test_colour_images(reference):
    (batch,) = batches(Records(channels=3), num_steps=1)
    assert batch["global_crops"].shape == (4, 2, 2, 32, 32, 3)
    np.testing.assert_array_equal(batch["index"], reference[0]["index"])


def test_bad_images_are_replaced_and_reported():
    broken = (2, 5, 7)
    settings = {"crops": FEW, "num_steps": 13}
    clean = np.concatenate([b["index"].ravel() for b in batches(**settings)])
    got = batches(Records(broken=broken), **settings)
    assert_same(got, batches(Records(broken=broken), **settings, num_threads=2))
    index = np.concatenate([b["index"].ravel() for b in got])
    bad = np.concatenate([b["bad"].reshape(-1, MAX_BAD) for b in got])
    assert not np.isin(index, broken).any()
    hit = np.isin(clean, broken)
    np.testing.assert_array_equal(bad[hit, 0], clean[hit])
    assert (bad[~hit] == -1).all()
    np.testing.assert_array_equal(index[~hit], clean[~hit])
    for row in bad[hit]:
        tried = row[row >= 0]
        assert np.isin(tried, broken).all() and len(set(tried)) == len(tried)
    assert (bad[:, 1] >= 0).any()  # a stand-in that was broken itself


def test_four_bad_images_in_a_row_are_survived():
    got = batches(Records(5, broken=(0, 1, 3, 4)), num_steps=2)
    assert all((batch["index"] == 2).all() for batch in got)
    bad = np.concatenate([b["bad"].reshape(-1, MAX_BAD) for b in got])
    assert sorted(bad[(bad >= 0).all(axis=1)][0]) == [0, 1, 3, 4]


@pytest.mark.parametrize("threads", [0, 2])
def test_five_bad_images_in_a_row_end_the_run(threads):
    iterator = build_pipeline(
        Records(broken=range(13)), CROPS, **SETTINGS, num_steps=1, num_threads=threads
    )
    with pytest.raises(
        RuntimeError,
        match=r"5 unreadable images in a row at position 0: record\d+ \(truncated\), ",
    ):
        next(iterator)
    iterator.close()


def test_closing_early_ends_the_iterator():
    iterator = build_pipeline(Records(), CROPS, **SETTINGS, num_steps=10**6)
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "batch_size 8 is not divisible by groups 3"),
        ({"process_count": 3}, "groups 4 is not divisible by process_count 3"),
        ({"patch_size": 7}, "global crop size 32 is not divisible by patch_size 7"),
        ({"patch_size": 32}, "local crop size 16 is not divisible by patch_size 32"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 of 2 processes"),
        ({"mask_style": "stripes"}, "mask style 'stripes' is none of"),
        ({"mask_probability": 2.0}, "mask probability 2.0"),
        ({"start_step": -1}, "start_step must not be negative, got -1"),
        ({"num_workers": -1}, "num_workers must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError) as caught:
        build_pipeline(Records(), CROPS, **{**SETTINGS, "num_steps": 1, **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, 1])
def test_no_step_left_is_an_empty_stream(threads):
    assert batches(start_step=4, num_steps=0, num_threads=threads) == []
