"""Dice, IoU and HD95 of index masks: plain NumPy and SciPy."""

import numpy as np
from scipy import ndimage

from ultradino_jax.evaluators.bootstrap import replicate_figures
from ultradino_jax.evaluators.segmentation.loss import IGNORE

# Columns of the pixel counts.
INTERSECTION, PREDICTED, LABELLED = range(3)


def pixel_counts(prediction, label, num_classes: int) -> np.ndarray:
    """int64 [Y,3] of one image: pixels in both, in the prediction, in the label.

    Pixels whose label is IGNORE count nowhere. A predicted value that is no class
    leaves the predicted count and stays in the label's, as in the reference.
    """
    valid = label != IGNORE
    prediction, label = prediction[valid], label[valid]
    parts = (prediction[prediction == label], prediction, label)
    counts = [np.bincount(p[p < num_classes], minlength=num_classes) for p in parts]
    return np.stack(counts, axis=1).astype(np.int64)


def dice_per_class(counts) -> np.ndarray:
    """2I/(P+L) of [..,Y,3] -> [..,Y]; NaN where a class is in neither."""
    total = counts[..., PREDICTED] + counts[..., LABELLED]
    return _ratio(2 * counts[..., INTERSECTION], total)


def iou_per_class(counts) -> np.ndarray:
    """I/(P+L-I) of [..,Y,3] -> [..,Y]; NaN where a class is in neither."""
    both = counts[..., INTERSECTION]
    return _ratio(both, counts[..., PREDICTED] + counts[..., LABELLED] - both)


def _ratio(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.nan)


def mean_defined(values, axis=-1) -> np.ndarray:
    """Mean over the entries that are not NaN; NaN where there is none."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis))


def mean_dice(counts) -> np.ndarray:
    """mDice, the reference's selection metric: all classes, background included."""
    return mean_defined(dice_per_class(counts))


def mean_foreground_dice(counts) -> np.ndarray:
    """mfDice: the structures alone."""
    return mean_defined(dice_per_class(counts)[..., 1:])


def mean_iou(counts) -> np.ndarray:
    """mIoU over all classes, background included."""
    return mean_defined(iou_per_class(counts))


def mean_foreground_iou(counts) -> np.ndarray:
    """mfIoU: the structures alone."""
    return mean_defined(iou_per_class(counts)[..., 1:])


STATISTICS = {
    "dice": mean_dice,
    "foreground_dice": mean_foreground_dice,
    "iou": mean_iou,
    "foreground_iou": mean_foreground_iou,
}


def surface(mask: np.ndarray) -> np.ndarray:
    """Pixels of a structure with a side on its outside; the picture's edge is one."""
    return mask & ~ndimage.binary_erosion(mask)


def hd95(prediction: np.ndarray, label: np.ndarray) -> float:
    """95th percentile of surface distances in both directions together, in pixels.

    bool [H,W] each. A structure in neither gives NaN (not counted); one in only one of
    them gives the picture's diagonal, the largest distance there can be. The
    percentile interpolates linearly.
    """
    if not prediction.any() and not label.any():
        return float("nan")
    if not prediction.any() or not label.any():
        return float(np.hypot(*label.shape))
    a, b = surface(prediction), surface(label)
    to_b = np.asarray(ndimage.distance_transform_edt(~b))[a]
    to_a = np.asarray(ndimage.distance_transform_edt(~a))[b]
    return float(np.percentile(np.concatenate([to_a, to_b]), 95))


def hd95_per_structure(prediction, label, num_classes: int) -> np.ndarray:
    """[Y-1]: HD95 of every class but the background, in one image [H,W]."""
    return np.array([hd95(prediction == k, label == k) for k in range(1, num_classes)])


def counts_by_patient(counts, patients) -> np.ndarray:
    """[n,Y,3] of images -> [patients,Y,3], patients in sorted order."""
    distinct, index = np.unique(np.asarray(patients), return_inverse=True)
    summed = np.zeros((len(distinct), *counts.shape[1:]), np.int64)
    np.add.at(summed, index, counts)
    return summed


def bootstrap_replicates(
    counts, patients, statistic, *, replicates: int = 2000, seed: int = 0
) -> np.ndarray:
    """[replicates]: a pooled figure, patients resampled with replacement.

    counts: [n,Y,3], or [runs,n,Y,3] for the mean over runs.
    """
    runs = counts if counts.ndim == 4 else counts[None]
    parts = [counts_by_patient(run, patients) for run in runs]
    return replicate_figures(parts, statistic, replicates=replicates, seed=seed)


def segmentation_metrics(counts, distances, patients, classes) -> dict:
    """Everything reported about a set of images; JSON values.

    counts: [n,Y,3]; distances: HD95 [n,Y-1]; patients: [n]; classes: Y names,
    background first. `pooled` sums pixels over the set first, the reference's figure;
    `per_image` and `per_patient` average the figures of images and of patients.
    """
    pooled = counts.sum(axis=0)
    by_patient = counts_by_patient(counts, patients)
    dice, iou = dice_per_class(pooled), iou_per_class(pooled)
    hd_per_class = mean_defined(distances, axis=0)

    def means(parts):
        return {
            name: number(mean_defined(statistic(parts), axis=0))
            for name, statistic in STATISTICS.items()
        }

    per_class = {
        name: {
            "dice": number(dice[k]),
            "iou": number(iou[k]),
            "hd95": number(hd_per_class[k - 1]) if k else None,
            "images_labelled": int((counts[:, k, LABELLED] > 0).sum()),
        }
        for k, name in enumerate(classes)
    }
    return {
        "n": len(counts),
        "patients": len(by_patient),
        "pooled": {name: number(f(pooled)) for name, f in STATISTICS.items()},
        "per_image": {
            **means(counts),
            "hd95": number(mean_defined(mean_defined(distances), axis=0)),
        },
        "per_patient": means(by_patient),
        "per_class": per_class,
    }


def number(x) -> float | None:
    """A JSON number, None for NaN."""
    return None if np.isnan(x) else float(x)
