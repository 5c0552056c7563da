import json

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ultradino_jax.evaluators.classification.knn import knn_accuracy, knn_votes


def test_votes_equal_the_reference(golden):
    g = golden("knn")
    settings = json.loads(str(g["meta"]))
    prefixes = {key.split("/")[0] for key in g if key.startswith("k")}
    assert prefixes
    for prefix in prefixes:
        ks = tuple(map(int, prefix[1:].split("_")))
        votes = knn_votes(
            g["input/train_features"],
            g["input/train_labels"],
            g["input/test_features"],
            num_classes=settings["C"],
            ks=ks,
            temperature=settings["T"],
            chunk=16,  # the last of several chunks is padded
        )
        for k in ks:
            expected = g[f"{prefix}/votes_k{k}"], g[f"{prefix}/pred_k{k}"]
            np.testing.assert_allclose(votes[k], expected[0], atol=2e-6)
            np.testing.assert_array_equal(votes[k].argmax(axis=1), expected[1])


def test_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(120, 12)), rng.normal(size=(50, 12))
    labels, truth = rng.integers(4, size=120), rng.integers(4, size=50)
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    unit_test = test / np.linalg.norm(test, axis=1, keepdims=True)

    def weights(distance):  # |a-b|^2 = 2 - 2 cos on the unit sphere
        return np.exp((1 - distance**2 / 2) / 0.07)

    ks = (5, 30)
    ours = knn_accuracy(train, labels, test, truth, num_classes=4, ks=ks)
    for k in ks:
        model = KNeighborsClassifier(k, weights=weights, algorithm="brute")
        assert ours[k] == model.fit(unit, labels).score(unit_test, truth)


def test_k_above_the_training_set_means_all_of_it():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    votes = knn_votes(train, np.arange(6), test, num_classes=6, ks=(6, 200))
    np.testing.assert_allclose(votes[200].sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(votes[6], votes[200])


def test_bad_input_names_the_numbers():
    x = np.ones((3, 2))
    with pytest.raises(ValueError, match="3 rows, 2 labels"):
        knn_votes(x, [0, 1], x, num_classes=2)
    with pytest.raises(ValueError, match=r"span 0\.\.2, outside of 2 classes"):
        knn_votes(x, [0, 1, 2], x, num_classes=2)
