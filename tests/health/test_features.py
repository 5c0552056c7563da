"""Numbers of the probe against the reference's arrays, SciPy and closed formulas."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ultradino_jax.health import features as health

NAMES = (
    "gauss_tall",
    "gauss_wide",
    "offset_large_mean",
    "small_scale_1e-4",
    "rank1",
    "low_rank3_plus_noise",
    "decay",
    "zeros",
)


@pytest.mark.parametrize("name", NAMES)
def test_rankme_equals_the_reference(golden, name):
    g = golden("rankme")
    ours = health.rankme(g[f"{name}/z"])
    np.testing.assert_allclose(ours, g[f"{name}/rankme_f64"], rtol=1e-6)


def test_distances_and_duplicates():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 12))
    apart = health.distances(z)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    off = ~np.eye(40, dtype=bool)
    np.testing.assert_allclose(apart[off], cdist(unit, unit)[off], atol=1e-7)
    assert health.duplicates(apart) == 0
    twins = z.copy()
    twins[:5] = 3 * z[5:10] + 1e-4  # 5 pairs, whatever their length
    assert health.duplicates(health.distances(twins)) == 10 / 40
    # When all features agree nobody can tell a duplicate.
    assert health.duplicates(health.distances(np.ones((8, 3)) + 1e-6 * z[:8, :3])) == 0


def test_feature_std_is_one_on_the_sphere_and_zero_on_a_point():
    z = np.random.default_rng(1).normal(size=(20000, 8))
    assert health.feature_std(z) == pytest.approx(1, abs=0.01)
    assert health.feature_std(np.ones((9, 8))) == pytest.approx(0, abs=1e-12)


def test_even_use_of_prototypes_scores_one():
    rng = np.random.default_rng(2)
    scores = [health.prototypes_used(rng.integers(0, 500, 800), 500) for _ in range(40)]
    assert np.mean(scores) == pytest.approx(1, abs=0.01)
    assert health.prototypes_used(np.full(800, 7), 500) < 0.01


def test_feature_health_of_a_collapse():
    rng = np.random.default_rng(3)
    good = health.feature_health(rng.normal(size=(64, 16)), rng.normal(size=(64, 16)))
    line = rng.normal(size=(64, 1)) * np.ones((1, 16))
    bad = health.feature_health(line, line)
    assert good["rankme_cls"] > 14 and bad["rankme_cls"] < 1.1
    assert good["dimensions"] == 16
    nearest = health.distances(rng.normal(size=(64, 16))).min(axis=1)
    assert nearest.min() < good["neighbour_distance"] < 1.4
