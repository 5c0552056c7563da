"""Classification metrics and RankMe: plain NumPy and SciPy."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from ultradino_jax.evaluators.bootstrap import interval, replicate_figures


def confusion_matrix(labels, predictions, num_classes: int) -> np.ndarray:
    """int64 [Y,Y]: rows are true classes, columns predicted ones."""
    cells = np.asarray(labels) * num_classes + np.asarray(predictions)
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def f1_per_class(confusion: np.ndarray) -> np.ndarray:
    """[..,Y,Y] -> [..,Y]; NaN for a class that is neither labelled nor predicted."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    with np.errstate(invalid="ignore"):
        return 2 * hits / total


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """[..,Y,Y] -> [..]: mean F1 over the classes that occur, the paper's metric."""
    f1 = f1_per_class(confusion)
    occurs = ~np.isnan(f1)
    return np.where(occurs, f1, 0).sum(axis=-1) / occurs.sum(axis=-1)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """[..,Y,Y] -> [..]: share of hits."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    return hits / confusion.sum(axis=(-2, -1))


def balanced_accuracy(confusion: np.ndarray) -> np.ndarray:
    """[..,Y,Y] -> [..]: mean recall over the classes that have labels."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1)
    labelled = total > 0
    recall = np.where(labelled, hits / np.maximum(total, 1), 0)
    return recall.sum(axis=-1) / labelled.sum(axis=-1)


def auroc_per_class(labels, scores) -> np.ndarray:
    """One-against-rest area under the ROC curve [Y] of scores [n,Y].

    (sum of the positives' ranks - P(P+1)/2) / (P N), ties sharing their mean rank; NaN
    where a class has no positive or no negative (Hanley and McNeil 1982).
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    areas = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        positive = labels == k
        p, n = positive.sum(), (~positive).sum()
        if p and n:
            ranks = rankdata(scores[:, k])
            areas[k] = (ranks[positive].sum() - p * (p + 1) / 2) / (p * n)
    return areas


def classification_metrics(labels, scores, classes: Sequence[str]) -> dict:
    """Everything that is reported about scores [n,Y] for labels [n]; JSON values.

    `macro_auroc` is the mean over the classes for which it is defined.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    confusion = confusion_matrix(labels, scores.argmax(axis=1), len(classes))
    areas = auroc_per_class(labels, scores)
    defined = areas[~np.isnan(areas)]
    per_class = zip(classes, f1_per_class(confusion), areas, strict=True)
    return {
        "n": len(labels),
        "macro_f1": float(macro_f1(confusion)),
        "accuracy": float(accuracy(confusion)),
        "balanced_accuracy": float(balanced_accuracy(confusion)),
        "macro_auroc": float(defined.mean()) if len(defined) else None,
        "per_class": {
            name: {"f1": _number(f1), "auroc": _number(area)}
            for name, f1, area in per_class
        },
        "confusion": confusion.tolist(),
    }


def _number(x) -> float | None:
    return None if np.isnan(x) else float(x)


def patient_confusions(labels, predictions, patients, num_classes: int) -> np.ndarray:
    """int64 [patients,Y,Y], patients in sorted order."""
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    cells = np.asarray(labels) * num_classes + np.asarray(predictions)
    size = num_classes**2
    counts = np.bincount(index * size + cells, minlength=(index.max() + 1) * size)
    return counts.reshape(-1, num_classes, num_classes)


def bootstrap_interval(
    labels,
    predictions,
    patients,
    num_classes: int,
    *,
    statistic=macro_f1,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Patient bootstrap's interval of a function of the confusion matrix.

    predictions: [n], or [runs,n] for the interval of the mean over runs.
    """
    runs = [
        patient_confusions(labels, run, patients, num_classes)
        for run in np.atleast_2d(predictions)
    ]
    values = replicate_figures(runs, statistic, replicates=replicates, seed=seed)
    return interval(values, level)


def rankme(features) -> float:
    """Effective rank exp(entropy of the normalised singular values) of [n,D].

    p = s / (sum s + 1e-7), exp(-sum p ln(p + 1e-7)) in float64: Garrido et al. 2023,
    eq. 3, with the constants of the reference.
    """
    s = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
    p = s / (s.sum() + 1e-7)
    return float(np.exp(-(p * np.log(p + 1e-7)).sum()))
