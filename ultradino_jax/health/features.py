"""What frozen features tell about a run: pure NumPy, no labels, no training state."""

import numpy as np

# Closer than this fraction of the median distance, two images are one image.
SAME = 0.02


def rankme(z: np.ndarray) -> float:
    """Effective rank of features [n,D]: between 1 and min(n,D).

    exp(-sum p ln p) of the normalised singular values, p = s / (sum s + 1e-7), with
    1e-7 inside the logarithm. Source: Garrido et al. 2023 (RankMe) as the reference
    computes it, without centering.
    """
    s = np.linalg.svd(np.asarray(z, np.float64), compute_uv=False)
    p = s / (s.sum() + 1e-7)
    return float(np.exp(-np.sum(p * np.log(p + 1e-7))))


def unit_rows(z: np.ndarray) -> np.ndarray:
    """[n,D] -> rows of length 1, float64."""
    z = np.asarray(z, np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def feature_std(z: np.ndarray) -> float:
    """Mean standard deviation of unit features [n,D], times sqrt(D).

    1 when the features fill the sphere, 0 when all are the same (the collapse test of
    Chen and He 2021, SimSiam, section 4.1, there without the factor).
    """
    return float(unit_rows(z).std(axis=0).mean() * np.sqrt(z.shape[1]))


def distances(z: np.ndarray) -> np.ndarray:
    """Euclidean distances [n,n] between unit features [n,D], inf on the diagonal."""
    u = unit_rows(z)
    squared = np.maximum(2 - 2 * (u @ u.T), 0)
    np.fill_diagonal(squared, np.inf)
    return np.sqrt(squared)


def duplicates(apart: np.ndarray) -> float:
    """Fraction of images [n,n] that have another one at practically their place.

    That is, nearer than SAME of the median distance. 0 when the median itself is below
    1e-3: then nothing can be told apart and another alarm has something to say.
    """
    median = np.median(apart[np.isfinite(apart)]) if len(apart) > 1 else 0.0
    if median < 1e-3:
        return 0.0
    return float((apart.min(axis=1) < SAME * median).mean())


def prototypes_used(winners: np.ndarray, num_prototypes: int) -> float:
    """Distinct winning prototypes of [n] images over what uniform use would give.

    n draws from K prototypes hit K (1 - (1 - 1/K)^n) of them on average.
    """
    k = num_prototypes
    expected = k * -np.expm1(len(winners) * np.log1p(-1 / k)) if k > 1 else 1.0
    return float(len(np.unique(winners)) / expected)


def feature_health(cls: np.ndarray, mean_patch: np.ndarray) -> dict[str, float]:
    """The numbers above of CLS tokens and mean patch tokens, both [n,D].

    neighbour_distance is the geometric mean over images, as KoLeo's logarithm.
    """
    apart = distances(cls)
    nearest = apart.min(axis=1) if len(cls) > 1 else np.zeros(1)
    return {
        "rankme_cls": rankme(cls),
        "rankme_patch": rankme(mean_patch),
        "std_cls": feature_std(cls),
        "std_patch": feature_std(mean_patch),
        "neighbour_distance": float(np.exp(np.log(nearest + 1e-8).mean())),
        "duplicates": duplicates(apart),
        "dimensions": float(min(cls.shape)),
    }
