import numpy as np
import pytest
from scipy.optimize import check_grad, minimize
from scipy.special import logsumexp

from ultradino_jax.evaluators.classification.logreg import C_GRID, fit_logreg


def clusters(n, classes, seed, d=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centers = np.random.default_rng(5).normal(size=(classes, d))
    return centers[labels] + rng.normal(size=(n, d)), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("d", [4, 100])
def test_solution_minimises_the_penalised_loss(classes, d):
    x, y = clusters(80, classes, 0, d)
    x = 0.2 * x + 3  # far from centred
    fitted = fit_logreg(x, y, x, y, num_classes=classes, c_grid=(0.3,))
    assert fitted.converged and fitted.c == 0.3

    def loss(parameters):
        w = parameters.reshape(d + 1, classes)
        z = x @ w[:d] + w[d]
        data = (logsumexp(z, axis=1) - z[np.arange(80), y]).sum()
        # scikit-learn penalises two classes through their difference alone.
        penalised = w[:d] if classes > 2 else (w[:d, 1] - w[:d, 0])
        return 0.3 * data + 0.5 * (penalised**2).sum()

    def gradient(parameters):
        w = parameters.reshape(d + 1, classes)
        z = x @ w[:d] + w[d]
        p = np.exp(z - logsumexp(z, axis=1, keepdims=True)) - np.eye(classes)[y]
        decay = w[:d] if classes > 2 else (w[:d] - w[:d, ::-1])
        g = np.concatenate([0.3 * x.T @ p + decay, 0.3 * p.sum(axis=0)[None]])
        return g.ravel()

    start = np.zeros((d + 1) * classes)
    assert check_grad(loss, gradient, start + 0.1) < 1e-4
    exact = minimize(loss, start, jac=gradient, options={"gtol": 1e-8}).x
    w = exact.reshape(d + 1, classes)
    z = x @ w[:d] + w[d]
    expected = np.exp(z - logsumexp(z, axis=1, keepdims=True))
    np.testing.assert_allclose(fitted.scores(x), expected, atol=2e-4)


def test_the_sweep_selects_on_validation():
    x, y = clusters(60, 3, 0)
    val, val_y = clusters(200, 3, 1)
    alone = {
        c: fit_logreg(x, y, val, val_y, num_classes=3, c_grid=(c,)).val_accuracy
        for c in (1e-4, 1e-2, 1.0, 100.0)
    }
    swept = fit_logreg(x, y, val, val_y, num_classes=3, c_grid=tuple(alone))
    assert swept.val_accuracy == max(alone.values())
    assert alone[swept.c] == swept.val_accuracy
    assert len(C_GRID) == 45 and C_GRID[0] == 1e-6 and C_GRID[-1] == 1e5


def test_an_absent_class_is_never_predicted():
    x, y = clusters(60, 2, 0)
    fitted = fit_logreg(x, 3 * y, x, 3 * y, num_classes=4, c_grid=(1.0,))
    scores = fitted.scores(x)
    assert scores.shape == (60, 4) and (scores[:, 1:3] == 0).all()
    assert (scores.argmax(axis=1) == 3 * y).mean() == fitted.val_accuracy


def test_bad_input_is_named():
    x, y = clusters(20, 3, 0)
    with pytest.raises(ValueError, match="head has 2 classes"):
        fit_logreg(x, y, x, y, num_classes=2)
    with pytest.raises(ValueError, match="all of one class"):
        fit_logreg(x, 0 * y, x, y, num_classes=3)
