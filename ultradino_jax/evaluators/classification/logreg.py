"""L2-regularised logistic regression on frozen features (scikit-learn)."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.linear import check_labels
from ultradino_jax.progress import Progress

# DINOv2's sweep, `eval/log_regression.py`.
C_GRID = tuple(10.0 ** np.linspace(-6, 5, 45))


class LogReg(NamedTuple):
    """kernel [D,Y] and bias [Y] of the selected C, and its validation accuracy."""

    kernel: np.ndarray
    bias: np.ndarray
    c: float
    val_accuracy: float
    converged: bool

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities [n,Y] of features [n,D]."""
        z = np.asarray(features, np.float64) @ self.kernel + self.bias
        z = np.exp(z - z.max(axis=1, keepdims=True))
        return z / z.sum(axis=1, keepdims=True)


def fit_logreg(
    train,
    train_labels,
    val,
    val_labels,
    *,
    num_classes: int,
    c_grid: Sequence[float] = C_GRID,
    max_iter: int = 1000,
    name: str = "logistic regression",
) -> LogReg:
    """The C of highest validation accuracy, the strongest penalty among equals.

    train [n,D], val [m,D]. The sweep goes from strong to weak penalty, each solution
    starting the next. A class without a training image is never predicted.
    Raises UserError when a label does not fit or only one class is there.
    """
    check_labels(train_labels, num_classes)
    x, val = np.asarray(train, np.float64), np.asarray(val, np.float64)
    if len(np.unique(train_labels)) < 2:
        raise UserError(f"{name}: the training images are all of one class")
    # Centred, brought to unit size and turned into the span of the training rows the
    # solver is much faster, and nothing changes: the intercept is free, C is scaled
    # along, the penalty does not see a rotation and weights never leave the span.
    center = x.mean(axis=0)
    scale = max(float((x - center).std()), 1e-12)
    x, val = (x - center) / scale, (val - center) / scale
    basis = np.eye(x.shape[1])
    if x.shape[1] > len(x):
        basis = np.linalg.svd(x, full_matrices=False)[2].T
        x, val = x @ basis, val @ basis
    model = LogisticRegression(max_iter=max_iter, tol=1e-6, warm_start=True)
    progress = Progress(name, len(c_grid), unit="fit")
    best = None
    for done, c in enumerate(sorted(c_grid), start=1):
        model.set_params(C=c * scale**2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(x, train_labels)
        accuracy = float((model.predict(val) == val_labels).mean())
        if best is None or accuracy > best.val_accuracy:
            kernel, bias = _full_size(model, x.shape[1], num_classes)
            kernel = basis @ kernel / scale
            bias = bias - center @ kernel
            best = LogReg(kernel, bias, float(c), accuracy, not caught)
        progress.update(done)
    progress.close()
    assert best is not None, "c_grid is empty"
    return best


def _full_size(model, d, num_classes):
    """The model's weights as [D,Y] and [Y]; absent classes get probability 0."""
    coefficients, intercept = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row: the logit of the second class
        coefficients = np.concatenate([0 * coefficients, coefficients])
        intercept = np.concatenate([0 * intercept, intercept])
    kernel = np.zeros((d, num_classes))
    bias = np.full(num_classes, -1e9)
    kernel[:, model.classes_] = coefficients.T
    bias[model.classes_] = intercept
    return kernel, bias
