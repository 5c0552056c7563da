import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultradino_jax.data.masking import (
    block_mask,
    mask_buffer_length,
    random_mask,
    sample_masks,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "masking.npz")
GRID = GOLDEN["seed0_masks"].shape[1:]
# How many patches were asked of the reference; three of them are enough to compare.
WANTED = sorted(int(k.split("/")[1]) for k in GOLDEN.files if k.startswith("got/"))
WANTED = [WANTED[1], WANTED[len(WANTED) // 2], WANTED[-1]]


def test_block_masks_equal_the_reference_generator():
    rng = random.Random(0)
    for wanted, expected in zip(
        GOLDEN["seed0_requests"], GOLDEN["seed0_masks"], strict=True
    ):
        np.testing.assert_array_equal(block_mask(rng, GRID, int(wanted)), expected)


@pytest.mark.parametrize("wanted", WANTED)
def test_masks_of_one_generator_have_the_reference_counts(wanted):
    expected = GOLDEN[f"got/{wanted}"]
    rng = random.Random(1000 + wanted)
    counts = [block_mask(rng, GRID, wanted).sum() for _ in expected]
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("grid", "largest"), [((14, 14), 98), ((16, 16), 128), ((7, 7), 21), ((6, 10), 30)]
)
def test_one_block_is_at_most_half_the_grid(grid, largest):
    class Recorder(random.Random):
        limits: ClassVar[list] = []

        def uniform(self, low, high):
            if low > 0:  # an area; the log aspect starts below 0
                self.limits.append(high)
            return super().uniform(low, high)

    rng = Recorder(0)
    block_mask(rng, grid, grid[0] * grid[1])
    # ((S / 2 // P) * S) // P for a crop of S = P * grid pixels
    assert max(rng.limits) == largest


def test_sample_masks_equals_the_reference_collate():
    rows = len(GOLDEN["collate_seed3/collated_masks"])
    masks, indices, weights = sample_masks(random.Random(3), rows, GRID)
    count = int(GOLDEN["collate_seed3/n_masked_patches"][0])
    np.testing.assert_array_equal(masks, GOLDEN["collate_seed3/collated_masks"])
    np.testing.assert_array_equal(
        indices[:count], GOLDEN["collate_seed3/mask_indices_list"]
    )
    np.testing.assert_array_equal(weights[:count], GOLDEN["collate_seed3/masks_weight"])
    assert len(indices) == GOLDEN["collate_seed3/upperbound"]
    assert not weights[count:].any() and not indices[count:].any()


@pytest.mark.parametrize(("images", "expected"), [(8, 507), (128, 7503), (256, 14965)])
def test_buffer_length_is_the_reference_upperbound(images, expected):
    assert mask_buffer_length(2 * images, 196, 0.5, (0.1, 0.5)) == expected


def test_collate_statistics():
    reference = GOLDEN["collate_bs8_200draws/n_masked"]
    draws, rows = GOLDEN["collate_bs8_200draws/per_crop_sorted"].shape
    rng = random.Random(17)
    counts = [int(sample_masks(rng, rows, GRID)[0].sum()) for _ in range(draws)]
    error = 4 * reference.std() * np.sqrt(2 / draws)
    assert abs(np.mean(counts) - reference.mean()) < error
    assert min(counts) >= reference.mean() - 5 * reference.std()
    assert max(counts) <= GOLDEN["collate_bs8_200draws/upperbound"].max()


grids = st.tuples(st.integers(1, 16), st.integers(1, 16))
ratios = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple)


@settings(deadline=None, max_examples=60)
@given(grid=grids, fraction=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_never_more_than_wanted(grid, fraction, seed):
    wanted = int(grid[0] * grid[1] * fraction)
    block = block_mask(random.Random(seed), grid, wanted)
    scattered = random_mask(random.Random(seed), grid, wanted)
    assert block.shape == scattered.shape == grid
    assert block.sum() <= wanted
    assert scattered.sum() == wanted


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 24),
    grid=grids,
    probability=st.floats(0, 1),
    ratio=ratios,
    style=st.sampled_from(["block", "random"]),
    seed=st.integers(0, 2**32),
)
def test_indices_and_weights_describe_the_masks(
    rows, grid, probability, ratio, style, seed
):
    num_patches = grid[0] * grid[1]
    masks, indices, weights = sample_masks(
        random.Random(seed),
        rows,
        grid,
        probability=probability,
        ratio=ratio,
        style=style,
    )
    length = mask_buffer_length(rows, num_patches, probability, ratio)
    assert masks.shape == (rows, num_patches)
    assert indices.shape == weights.shape == (length,)
    count = int(masks.sum())
    assert count <= length
    np.testing.assert_array_equal(indices[:count], np.flatnonzero(masks))
    assert (weights[:count] > 0).all() and not weights[count:].any()
    per_row = np.zeros(rows)
    np.add.at(per_row, indices[:count] // num_patches, weights[:count])
    np.testing.assert_allclose(per_row, masks.any(axis=1), atol=1e-5)
    assert masks.any(axis=1).sum() <= int(rows * probability)


def test_random_style_spreads_over_the_grid():
    masks = sample_masks(random.Random(0), 400, GRID, style="random")[0]
    # 200 rows, 0.3 of the patches each on average: a binomial count per patch.
    counts = masks.sum(axis=0)
    assert abs(counts - 60).max() < 5 * np.sqrt(200 * 0.3 * 0.7)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"style": "patch"}, "mask style 'patch'"),
        ({"probability": 1.5}, r"probability 1\.5"),
        ({"ratio": (0.5, 0.1)}, r"\(0\.5, 0\.1\)"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        sample_masks(random.Random(0), 4, GRID, **arguments)
