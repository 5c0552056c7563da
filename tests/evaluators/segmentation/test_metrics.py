"""Dice, IoU and HD95 against the reference's arrays, scikit-learn and SciPy."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score, jaccard_score

from ultradino_jax.evaluators.bootstrap import interval
from ultradino_jax.evaluators.segmentation import metrics
from ultradino_jax.evaluators.segmentation.results import baseline_figures


def test_pooled_metrics_equal_reference(golden, sub):
    g = golden("seg_metric")
    for name in json.loads(str(g["meta"]))["cases"]:
        pooled_metrics_equal(sub(g, f"{name}/"))


def pooled_metrics_equal(g):
    y = int(g["num_classes"])
    pairs = zip(g["pred"], g["label"], strict=True)
    pooled = np.sum([metrics.pixel_counts(*pair, y) for pair in pairs], axis=0)
    np.testing.assert_array_equal(pooled[:, 0], g["area_intersect"])
    np.testing.assert_array_equal(pooled[:, 1], g["area_pred"])
    np.testing.assert_array_equal(pooled[:, 2], g["area_label"])
    dice, iou = metrics.dice_per_class(pooled), metrics.iou_per_class(pooled)
    np.testing.assert_allclose(dice, g["class/Dice"], rtol=1e-6)
    np.testing.assert_allclose(iou, g["class/IoU"], rtol=1e-6)
    for name, function in [
        ("mDice", metrics.mean_dice),
        ("mfDice", metrics.mean_foreground_dice),
        ("mIoU", metrics.mean_iou),
        ("mfIoU", metrics.mean_foreground_iou),
    ]:
        ours = 100 * function(pooled)
        np.testing.assert_allclose(ours, g[f"summary/{name}"], atol=0.00501)


def bootstrap(counts, patients, replicates=2000):
    statistic = metrics.mean_foreground_dice
    return interval(
        metrics.bootstrap_replicates(counts, patients, statistic, replicates=replicates)
    )


def random_masks(seed, shape=(21, 17)):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 4, (2, 7, 6))
    masks = np.kron(blocks, np.ones((3, 3), int))[:, : shape[0], : shape[1]]
    if seed % 3 == 0:
        masks[0][masks[0] == 2] = 0
    if seed % 4 == 0:
        masks[1][masks[1] == 3] = 0
    return masks.astype(np.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_dice_and_iou_equal_scikit_learn(seed):
    prediction, label = random_masks(seed)
    counts = metrics.pixel_counts(prediction, label, 4)
    options = dict(labels=range(4), average=None, zero_division=np.nan)
    pair = (label.ravel(), prediction.ravel())
    np.testing.assert_allclose(
        metrics.dice_per_class(counts), f1_score(*pair, **options)
    )
    options["zero_division"] = 0
    iou = np.nan_to_num(metrics.iou_per_class(counts))
    np.testing.assert_allclose(iou, jaccard_score(*pair, **options))


@pytest.mark.parametrize("seed", range(6))
def test_hd95_equals_all_pairs_of_surface_points(seed):
    prediction, label = random_masks(seed)
    ours = metrics.hd95_per_structure(prediction, label, 4)
    for k in (1, 2, 3):
        edges = []
        for mask in (prediction == k, label == k):
            padded = np.pad(mask, 1)
            inner = (
                padded[:-2, 1:-1] & padded[2:, 1:-1]
                & padded[1:-1, :-2] & padded[1:-1, 2:]
            )  # fmt: skip
            edges.append(np.argwhere(mask & ~inner))
        if not len(edges[0]) and not len(edges[1]):
            assert np.isnan(ours[k - 1])
        elif not len(edges[0]) or not len(edges[1]):
            assert ours[k - 1] == pytest.approx((21**2 + 17**2) ** 0.5)
        else:
            d = cdist(*edges)
            both = np.concatenate([d.min(axis=0), d.min(axis=1)])
            assert ours[k - 1] == pytest.approx(np.percentile(both, 95))


def test_figures_of_a_set_by_hand():
    """Two images of one woman, one of another; class 2 is nowhere in image 1."""
    counts = np.array(
        [
            [[4, 5, 5], [2, 4, 2], [0, 0, 0]],
            [[6, 6, 6], [1, 1, 1], [1, 2, 2]],
            [[3, 3, 3], [2, 2, 2], [0, 4, 0]],
        ]
    )
    distances = np.array([[1.0, np.nan], [3.0, 5.0], [2.0, 9.0]])
    out = metrics.segmentation_metrics(
        counts, distances, ["a", "a", "b"], ("background", "x", "y")
    )
    assert out["n"] == 3 and out["patients"] == 2
    x, y = 2 * 5 / (7 + 5), 2 * 1 / (6 + 2)
    assert out["pooled"]["foreground_dice"] == pytest.approx((x + y) / 2)
    per_image = [4 / 6, (1 + 0.5) / 2, (1 + 0) / 2]
    assert out["per_image"]["foreground_dice"] == pytest.approx(np.mean(per_image))
    assert out["per_image"]["hd95"] == pytest.approx(np.mean([1, 4, 5.5]))
    per_patient = [(2 * 3 / 8 + 2 / 4) / 2, 0.5]
    assert out["per_patient"]["foreground_dice"] == pytest.approx(np.mean(per_patient))
    assert out["per_class"]["y"]["images_labelled"] == 1
    low, high = bootstrap(counts, ["a", "a", "b"], replicates=200)
    # Two patients: all samples are of a, of b, or of both.
    assert low == pytest.approx(0.5) and high == pytest.approx(np.mean(per_patient[:1]))


def test_predictors_that_look_at_no_image():
    """Three of four training masks agree on the left half being structure 1."""
    left = np.zeros((4, 6), np.uint8)
    left[:, :3] = 1
    train = np.stack([left, left, left, np.full((4, 6), 2, np.uint8)])
    test = np.stack([left, 1 - left])
    figures = baseline_figures(train, test, 3)
    # The guess is `left`: right in one image of two.
    assert figures["mean_mask"]["foreground_dice"] == pytest.approx(0.5)
    background = 2 * 24 / (48 + 24)
    assert figures["background"]["foreground_dice"] == 0
    assert figures["background"]["dice"] == pytest.approx(background / 2)


def test_bootstrap_resamples_patients():
    rng = np.random.default_rng(0)
    counts = np.tile(rng.integers(1, 50, (12, 3, 3)), (5, 1, 1))
    counts[..., 0] = np.minimum(counts[..., 1], counts[..., 2])
    patients = np.tile(np.arange(12), 5)
    narrow = bootstrap(counts, np.arange(60))
    wide = bootstrap(counts, patients)
    assert wide[1] - wide[0] > 1.7 * (narrow[1] - narrow[0])
    mean = metrics.mean_foreground_dice(counts.sum(axis=0))
    assert wide[0] < mean < wide[1]
    runs = bootstrap(np.stack([counts, counts]), patients)
    assert runs == pytest.approx(wide)
