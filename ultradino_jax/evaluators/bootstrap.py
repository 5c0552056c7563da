"""The patient bootstrap of every evaluation: intervals of figures of a test set.

Patients are resampled, not images: the many images of a patient are no independent
evidence (Efron and Tibshirani 1993, chapter 13). Plain NumPy.
"""

from collections.abc import Callable, Sequence

import numpy as np


def resampled_weights(num_patients: int, replicates: int, seed: int) -> np.ndarray:
    """int64 [replicates,patients]: how often a patient is drawn, with replacement."""
    rng = np.random.default_rng([seed, num_patients])
    share = np.full(num_patients, 1 / num_patients)
    return rng.multinomial(num_patients, share, size=replicates)


def weighted(weights, parts) -> np.ndarray:
    """weights [R,patients], counts of patients [patients,..] -> float64 [R,..]."""
    flat = np.asarray(weights, np.float64) @ parts.reshape(len(parts), -1)
    return flat.reshape(-1, *parts.shape[1:])


def replicate_figures(
    runs: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    replicates: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """[replicates]: the mean over runs of a figure of resampled patients.

    runs: of each run the counts of its patients [patients,..]; statistic: [R,..] of
    summed counts -> [R]. Equal patients and seed give equal samples, so the difference
    of two calls is a paired comparison.
    """
    values = np.zeros(replicates)
    for parts in runs:
        weights = resampled_weights(len(parts), replicates, seed)
        values += statistic(weighted(weights, parts))
    return values / len(runs)


def interval(values, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap replicates; NaN ones are left out."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """{'mean', 'std'} over runs; the standard deviation of one run is None."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}
