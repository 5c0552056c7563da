"""Classifiers on the frozen features of one backbone."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ultradino_jax.data.datasets.labelled import LabelledImages, few_per_class
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import RawPixels
from ultradino_jax.evaluators.classification.classifier import (
    FOLDER,
    check_scores,
    save_classifier,
)
from ultradino_jax.evaluators.classification.knn import knn_votes
from ultradino_jax.evaluators.classification.linear import (
    Head,
    LinearProbe,
    fit_cached,
    fit_paper,
    head_grid,
    probe_classifier,
)
from ultradino_jax.evaluators.classification.logreg import fit_logreg
from ultradino_jax.evaluators.classification.results import Run
from ultradino_jax.evaluators.classification.settings import Settings
from ultradino_jax.evaluators.evaluation import Entry, seed_folder
from ultradino_jax.evaluators.features import Features, Preprocess, extract_features
from ultradino_jax.evaluators.load import TRAINED_ROW
from ultradino_jax.weights.backbone import Backbone

Labelled = tuple[Features, np.ndarray]


class _Fitted(NamedTuple):
    """scores(Features) -> [n,Y], what was chosen, validation accuracy."""

    scores: Callable[[Features], np.ndarray]
    choice: dict
    val: float
    probe: LinearProbe | None = None


def frozen_entries(
    settings: Settings,
    row: str,
    backbone: Backbone,
    sets: dict[str, LabelledImages],
    checkpoint: str | Path | None,
    workdir: str | Path,
) -> list[Entry]:
    """Every frozen-feature evaluation of one backbone.

    sets: 'train', 'val', 'test' and, where there is one, 'external'. Linear probes of
    the checkpoint are kept, without its backbone, for export.
    """
    grid = head_grid(backbone.model.depth, not isinstance(backbone.model, RawPixels))
    methods = settings.fewshot.methods if settings.few else (settings.mode,)
    features = {
        name: extract_features(
            backbone,
            images,
            num_layers=max(h.num_layers for h in grid) if "linear" in methods else 1,
            batch_size=settings.batch_size,
            preprocess=Preprocess.of(backbone, antialias=settings.antialias),
            name=f"{row}, features of {name}",
        )
        for name, images in sets.items()
        if not (settings.augmented and name == "train")
    }
    if settings.few:
        return _few_labels(settings, row, sets, features, grid)
    classes = sets["train"].classes
    entry = Entry(row, settings.mode)
    # k nearest neighbours and the logistic regression have nothing random in them.
    for seed in settings.seeds if settings.mode == "linear" else settings.seeds[:1]:
        if settings.augmented:
            fitted = _linear_paper(settings, row, backbone, sets, features, grid, seed)
        else:
            train, val = ((features[s], sets[s].labels) for s in ("train", "val"))
            fitted = _fit(settings, settings.mode, train, val, len(classes), grid, seed)
        run = _run(seed, fitted, features)
        if fitted.probe is not None and row == TRAINED_ROW:
            probe = probe_classifier(
                fitted.probe, backbone, classes, settings.antialias
            )
            check_scores(probe, sets["test"], run.scores)
            folder = seed_folder(workdir, row, seed) / FOLDER
            save_classifier(folder, probe, checkpoint=checkpoint)
        entry.runs.append(run)
    return [entry]


def _few_labels(settings, row, sets, features, grid) -> list[Entry]:
    """The methods with `shots` labels per class for training and as many to choose."""
    few = settings.fewshot
    num_classes = len(sets["train"].classes)
    entries = []
    for method in few.methods:
        for shots in few.shots:
            entry = Entry(row, method, shots)
            for seed in few.seeds:
                drawn = []
                for name in ("train", "val"):
                    rows = few_per_class(
                        sets[name], shots, seed, by_patient=few.unit == "patients"
                    )
                    drawn.append((features[name][rows], sets[name].labels[rows]))
                train, val = drawn
                fitted = _fit(settings, method, train, val, num_classes, grid, seed)
                entry.runs.append(_run(seed, fitted, features))
            entries.append(entry)
    return entries


def _run(seed: int, fitted: _Fitted, features: dict[str, Features]) -> Run:
    scores = fitted.scores
    outside = scores(features["external"]) if "external" in features else None
    return Run(seed, fitted.choice, fitted.val, scores(features["test"]), outside)


def _fit(
    settings: Settings,
    method: str,
    train: Labelled,
    val: Labelled,
    num_classes: int,
    grid: list[Head],
    seed: int,
) -> _Fitted:
    """Train and select. Raises UserError for an unknown method."""
    if method == "linear":
        return _linear_cached(settings, train, val, num_classes, grid, seed)
    if method == "logreg":
        return _logreg(settings.logreg, train, val, num_classes)
    if method == "knn":
        return _nearest(settings.knn, train, val, num_classes)
    raise UserError(f"method {method!r}: choose one of linear, knn, logreg")


def _of_probe(probe: LinearProbe) -> _Fitted:
    return _Fitted(probe.scores, probe.head._asdict(), probe.val_accuracy, probe)


def _linear_paper(settings, row, backbone, sets, features, grid, seed) -> _Fitted:
    c = settings.linear
    probe = fit_paper(
        backbone,
        sets["train"],
        features["val"],
        sets["val"].labels,
        heads=grid,
        seed=seed,
        batch_size=c.batch_size,
        epochs=c.epochs,
        warmup_epochs=c.warmup_epochs,
        preprocess=Preprocess.of(backbone, antialias=settings.antialias),
        name=f"{row}, linear probe, seed {seed}",
    )
    return _of_probe(probe)


def _linear_cached(settings, train, val, num_classes, grid, seed) -> _Fitted:
    c = settings.linear
    epochs, warmup_epochs = c.epochs, c.warmup_epochs
    if settings.few:
        # A few labels make few steps per epoch: the number of steps is kept instead.
        steps = max(len(train[0]) // c.batch_size, 1)
        epochs = settings.fewshot.linear_steps // steps
        warmup_epochs = epochs // 2
    probe = fit_cached(
        *train,
        *val,
        num_classes=num_classes,
        heads=grid,
        seed=seed,
        batch_size=c.batch_size,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
    )
    return _of_probe(probe)


def _logreg(c, train, val, num_classes) -> _Fitted:
    (x, y), (val_x, val_y) = train, val
    fitted = fit_logreg(
        x.cls[:, -1],
        y,
        val_x.cls[:, -1],
        val_y,
        num_classes=num_classes,
        c_grid=tuple(10.0 ** np.linspace(*c.log10_c)),
        max_iter=c.max_iter,
    )

    def scores(features: Features):
        return fitted.scores(features.cls[:, -1])

    choice = {"C": fitted.c, "converged": fitted.converged}
    return _Fitted(scores, choice, fitted.val_accuracy)


def _nearest(c, train, val, num_classes) -> _Fitted:
    (x, y), (val_x, val_y) = train, val

    def votes(features: Features):
        return knn_votes(
            x.cls[:, -1],
            y,
            features.cls[:, -1],
            num_classes=num_classes,
            ks=c.ks,
            temperature=c.temperature,
        )

    accuracy = {
        k: float((v.argmax(axis=1) == val_y).mean()) for k, v in votes(val_x).items()
    }
    best = max(accuracy, key=accuracy.__getitem__)  # the first of equals
    return _Fitted(lambda features: votes(features)[best], {"k": best}, accuracy[best])
