import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics as sk

from ultradino_jax.evaluators.bootstrap import resampled_weights
from ultradino_jax.evaluators.classification import metrics


def random_case(seed, n=200, classes=5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    scores = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[labels]
    return labels, np.round(scores, 1)  # rounded, so that there are ties


@pytest.mark.parametrize("seed", range(4))
def test_metrics_agree_with_scikit_learn(seed):
    labels, scores = random_case(seed)
    scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    predictions = scores.argmax(axis=1)
    names = list("abcde")
    ours = metrics.classification_metrics(labels, scores, names)
    f1 = sk.f1_score(labels, predictions, average=None)
    assert ours["macro_f1"] == pytest.approx(f1.mean(), abs=1e-12)
    assert ours["accuracy"] == sk.accuracy_score(labels, predictions)
    assert ours["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(labels, predictions), abs=1e-12
    )
    assert ours["macro_auroc"] == pytest.approx(
        sk.roc_auc_score(labels, scores, multi_class="ovr"), abs=1e-12
    )
    np.testing.assert_array_equal(
        ours["confusion"], sk.confusion_matrix(labels, predictions)
    )
    for k, name in enumerate(names):
        assert ours["per_class"][name]["f1"] == pytest.approx(f1[k], abs=1e-12)
        assert ours["per_class"][name]["auroc"] == pytest.approx(
            sk.roc_auc_score(labels == k, scores[:, k]), abs=1e-12
        )


def test_classes_that_do_not_occur_are_left_out():
    labels = np.array([0, 0, 1, 1])
    scores = np.eye(4)[[0, 1, 1, 2]]  # class 2 is only predicted, class 3 never occurs
    ours = metrics.classification_metrics(labels, scores, list("abcd"))
    # scikit-learn averages over the labels that occur on either side.
    assert ours["macro_f1"] == sk.f1_score(labels, [0, 1, 1, 2], average="macro")
    assert ours["balanced_accuracy"] == 0.5
    assert ours["per_class"]["d"] == {"f1": None, "auroc": None}
    areas = [ours["per_class"][c]["auroc"] for c in "ab"]
    assert ours["macro_auroc"] == np.mean(areas)


def test_bootstrap_agrees_with_scipy():
    """With one image per patient and accuracy it is the bootstrap of a mean."""
    labels, scores = random_case(7)
    hit = (scores.argmax(axis=1) == labels).astype(float)
    ours = metrics.bootstrap_interval(
        labels,
        scores.argmax(axis=1),
        np.arange(len(labels)),
        5,
        statistic=metrics.accuracy,
        replicates=20_000,
    )
    theirs = bootstrap(
        (hit,), np.mean, n_resamples=20_000, method="percentile", rng=0
    ).confidence_interval
    # Monte Carlo error of a 2.5 % quantile of 20,000 draws is about 0.0005 here.
    np.testing.assert_allclose(ours, theirs, atol=0.003)


def test_bootstrap_resamples_patients():
    """Copies of an image within its patient bring no certainty."""
    labels, scores = random_case(8, n=80)
    predictions, patients = scores.argmax(axis=1), np.arange(80)
    once = metrics.bootstrap_interval(labels, predictions, patients, 5)
    copies = [np.repeat(x, 9) for x in (labels, predictions, patients)]
    assert metrics.bootstrap_interval(*copies, 5) == pytest.approx(once)
    as_images = metrics.bootstrap_interval(*copies[:2], np.arange(720), 5)
    assert np.diff(as_images) < 0.5 * np.diff(once)


def test_bootstrap_of_macro_f1_equals_a_plain_loop():
    labels, scores = random_case(9, n=60)
    predictions = scores.argmax(axis=1)
    patients = np.random.default_rng(0).integers(12, size=60)
    ours = metrics.bootstrap_interval(labels, predictions, patients, 5, replicates=50)
    names = np.unique(patients)
    values = []
    for counts in resampled_weights(len(names), 50, 0):
        rows = [np.flatnonzero(patients == p) for p in np.repeat(names, counts)]
        rows = np.concatenate(rows)
        values.append(sk.f1_score(labels[rows], predictions[rows], average="macro"))
    np.testing.assert_allclose(ours, np.quantile(values, [0.025, 0.975]), atol=1e-12)


def test_rankme_equals_the_reference(golden):
    g = golden("rankme")
    names = {key.split("/")[0] for key in g if key.endswith("/z")}
    assert names
    for name in names:
        expected = g[f"{name}/rankme_f64"]
        assert metrics.rankme(g[f"{name}/z"]) == pytest.approx(expected, rel=1e-6)
