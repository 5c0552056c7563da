"""Two evaluations on the same test images: what is compared, and how sure it is."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from ultradino_jax.data.datasets.labelled import labelled_images
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.compare import compare, main, read_entry
from ultradino_jax.evaluators.classification.results import (
    FORMAT,
    Run,
    results_of,
    write_predictions,
)
from ultradino_jax.evaluators.evaluation import Entry
from ultradino_jax.whole import write_json

CLASSES = ("x", "y", "z")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(results.json of two entries, its content): 60 test images of 5 patients."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    rows = [
        {
            "id": f"{i:02d}",
            "label": CLASSES[i % 3],
            "patient": str(i // 12) if i < 60 else f"train{i}",
            "split": "test" if i < 60 else "train",
        }
        for i in range(66)
    ]
    read = [np.zeros((4, 4), np.uint8)] * 66
    data = labelled_images("set", "1", CLASSES, rows, read.__getitem__)
    labels = data.split("test").labels
    entries = [Entry("teacher", "linear"), Entry("raw pixels", "linear")]
    for entry, skill in zip(entries, (2.0, 0.5), strict=True):
        for seed in (0, 1):
            scores = rng.random((60, 3)) + skill * np.eye(3)[labels]
            scores /= scores.sum(axis=1, keepdims=True)
            entry.runs.append(Run(seed, {"k": 5}, 0.5, scores))
    results = {"format": FORMAT, **results_of(entries, data, None, replicates=50)}
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", entries, data.split("test"), None)
    return folder / "results.json", results


def entry_like(a, predictions):
    return {**a, "predictions": np.asarray(predictions)}


def test_compare_reads_what_was_written(written, capsys):
    path, results = written
    a = read_entry(path)
    f1 = results["entries"]["teacher/linear"]["summary"]["macro_f1"]["mean"]
    result = compare(a, read_entry(path, "raw pixels/linear"), replicates=200)
    assert result["macro F1"]["a"] == pytest.approx(f1)
    main([str(path), str(path), "--entry-b", "raw pixels/linear"])
    printed = capsys.readouterr().out
    assert "60 test images of 5 patients" in printed and "macro F1" in printed
    with pytest.raises(UserError, match="choose one entry of teacher/linear, raw pix"):
        main([str(path), str(path), "--entry-a", "student/linear"])


def test_compare_finds_no_difference_where_there_is_none(written):
    a = read_entry(written[0])
    same = compare(a, a, replicates=100)["accuracy"]
    assert same["difference"] == 0 and same["interval"] == [0, 0] and same["p"] == 1


def test_compare_agrees_with_an_exact_permutation_test():
    """8 patients of 4 images: all 2^8 swaps, one by one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=32)
    a = {
        "ids": [str(i) for i in range(32)],
        "classes": ["x", "y", "z"],
        "patients": [str(i // 4) for i in range(32)],
        "labels": labels,
        "predictions": np.where(rng.random(32) < 0.4, labels, 0)[None],
    }
    b = entry_like(a, np.where(rng.random(32) < 0.7, labels, 1)[None])
    ours = compare(a, b, replicates=20_000)["macro F1"]

    def f1(predictions):
        return f1_score(labels, predictions, average="macro", zero_division=0)

    x, y = a["predictions"][0], b["predictions"][0]
    assert ours["difference"] == pytest.approx(f1(y) - f1(x), abs=1e-12)
    differences = []
    for swaps in range(256):
        swap = np.array([(swaps >> (i // 4)) & 1 for i in range(32)], bool)
        differences.append(f1(np.where(swap, x, y)) - f1(np.where(swap, y, x)))
    exact = (np.abs(differences) >= abs(ours["difference"]) - 1e-12).mean()
    assert ours["p"] == pytest.approx(exact, abs=0.01)
    low, high = ours["interval"]
    assert low < ours["difference"] < high


def test_compare_refuses_other_images(written):
    a = read_entry(written[0])
    b = {**a, "ids": [f"{i}x" for i in a["ids"]]}
    with pytest.raises(ValueError, match="60 and 60 images, 0 in both"):
        compare(a, b)
