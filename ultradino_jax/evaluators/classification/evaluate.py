"""A classification evaluation from config to results: data, features, fits, figures."""

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone
from ultradino_jax.data.datasets.labelled import (
    LabelledImages,
    check_splits,
    few_per_class,
)
from ultradino_jax.data.datasets.open import load_dataset
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import RawPixels, raw_pixels, untrained
from ultradino_jax.evaluators.classification.classifier import FOLDER, save_classifier
from ultradino_jax.evaluators.classification.finetune import finetune
from ultradino_jax.evaluators.classification.knn import knn_votes
from ultradino_jax.evaluators.classification.linear import (
    LinearProbe,
    fit_cached,
    fit_paper,
    head_grid,
    probe_classifier,
)
from ultradino_jax.evaluators.classification.logreg import fit_logreg
from ultradino_jax.evaluators.classification.results import (
    Entry,
    Run,
    table,
    write_results,
)
from ultradino_jax.evaluators.features import Features, Preprocess, extract_features
from ultradino_jax.evaluators.load import TRAINED_ROW, backbone_of, checkpoint_record
from ultradino_jax.evaluators.overlap import check_overlap

MODES = ("linear", "finetune", "knn", "logreg", "fewshot")
ROWS = ("teacher", "random init", "raw pixels")
PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn", "opencv-python-headless")


def load_external(config: ConfigDict, data: LabelledImages) -> LabelledImages | None:
    """The external test set, or None; all of its images are tested on.

    Raises UserError when it has a class that the evaluation has not.
    """
    if not config.external.name:
        return None
    external = load_dataset(config.external)
    unknown = [name for name in external.classes if name not in data.classes]
    if unknown:
        raise UserError(
            f"external set {external.name}: class {unknown[0]!r} is not among the "
            f"{len(data.classes)} classes of the head ({', '.join(data.classes)})"
        )
    return external


def make_rows(config: ConfigDict, backbone: Backbone) -> dict[str, Backbone]:
    """The backbone and what it is measured against, by row name."""
    unknown = sorted(set(config.rows) - set(ROWS))
    if unknown:
        raise UserError(f"row {unknown[0]!r} is unknown; choose of {', '.join(ROWS)}")
    make = {
        "teacher": lambda: backbone,
        "random init": lambda: untrained(backbone, config.random_init_seed),
        "raw pixels": lambda: raw_pixels(backbone),
    }
    # There is nothing to fine-tune in pixels.
    left_out = ("raw pixels",) if config.mode == "finetune" else ()
    return {name: make[name]() for name in config.rows if name not in left_out}


def evaluate(
    config: ConfigDict, checkpoint: str | Path | None, workdir: str | Path, say=print
) -> dict:
    """Run the evaluation and write its results into `workdir`; returns them.

    checkpoint: None when all rows are untrained. Raises UserError or OSError with one
    line when the input is bad.
    """
    if config.mode not in MODES:
        raise UserError(f"mode {config.mode!r}: choose one of {', '.join(MODES)}")
    start = time.monotonic()
    data = load_dataset(config.data)
    check_splits(data)
    external = load_external(config, data)
    backbone = backbone_of(config, checkpoint)
    overlap = check_overlap(checkpoint, data, allowed=config.allow_overlap, say=say)
    rows = make_rows(config, backbone)
    counts = {name: len(data.split(name)) for name in ("train", "val", "test")}
    say(
        f"{data.name} {data.version}: {counts} images, {len(data.classes)} classes; "
        f"{backbone.name} from {checkpoint or 'scratch'}, "
        f"digest {backbone.digest[:12]}"
    )
    entries = []
    for row, row_backbone in rows.items():
        say(f"{row}: {config.mode}")
        if config.mode == "finetune":
            entries.append(
                _finetuned(config, row, row_backbone, data, external, workdir)
            )
        else:
            entries += _probed(
                config, row, row_backbone, data, external, checkpoint, workdir
            )
    facts = {
        "config": json.loads(config.to_json_best_effort()),
        "checkpoint": checkpoint_record(checkpoint, backbone),
        "overlap": overlap,
        "versions": {name: version(name) for name in PACKAGES},
        "seconds": round(time.monotonic() - start, 1),
    }
    results = write_results(
        workdir, facts, entries, data, external, replicates=config.replicates
    )
    say(table(results))
    say(f"written to {workdir}: results.json, predictions.csv, confusion.png")
    return results


def _preprocess(config: ConfigDict, backbone: Backbone) -> Preprocess:
    return Preprocess.of(backbone, antialias=config.model.antialias)


def _finetuned(config, row, backbone, data, external, workdir) -> Entry:
    c = config.finetune
    entry = Entry(row, "finetune")
    for seed in config.seeds:
        tuned = finetune(
            backbone,
            data.split("train"),
            data.split("val"),
            seed=seed,
            workdir=Path(workdir) / row.replace(" ", "_") / f"seed{seed}",
            layerwise=c.layerwise,
            learning_rate=c.learning_rate,
            layerwise_decay=c.layerwise_decay,
            batch_size=c.batch_size,
            epochs=c.epochs,
            warmup_epochs=c.warmup_epochs,
            checkpoint_every=c.checkpoint_every,
            preprocess=_preprocess(config, backbone),
            name=f"{row}, seed {seed}",
        )
        choice = {"epoch": tuned.best_epoch, "layerwise": c.layerwise}
        test = tuned.scores(data.split("test"), config.batch_size)
        outside = None
        if external is not None:
            outside = tuned.scores(external, config.batch_size)
        entry.runs.append(Run(seed, choice, tuned.val_f1, test, outside))
    return entry


def _probed(config, row, backbone, data, external, checkpoint, workdir) -> list[Entry]:
    """Every frozen-feature evaluation of one backbone.

    Linear probes of the checkpoint are kept, without its backbone, for export.
    """
    grid = head_grid(backbone.model.depth, not isinstance(backbone.model, RawPixels))
    sets = {name: data.split(name) for name in ("train", "val", "test")}
    if external is not None:
        sets["external"] = external
    few = config.mode == "fewshot"
    paper = config.mode == "linear" and config.linear.recipe == "paper"
    methods = config.fewshot.methods if few else (config.mode,)
    features = {
        name: extract_features(
            backbone,
            images,
            num_layers=max(h.num_layers for h in grid) if "linear" in methods else 1,
            batch_size=config.batch_size,
            preprocess=_preprocess(config, backbone),
            name=f"{row}, features of {name}",
        )
        for name, images in sets.items()
        if not (paper and name == "train")
    }
    if few:
        return _few_labels(config, row, sets, features, grid)
    entry = Entry(row, config.mode)
    # k nearest neighbours and the logistic regression have nothing random in them.
    for seed in config.seeds if config.mode == "linear" else config.seeds[:1]:
        if paper:
            fitted = _linear_paper(config, row, backbone, sets, features, grid, seed)
        else:
            train, val = ((features[s], sets[s].labels) for s in ("train", "val"))
            fitted = _fit(config, config.mode, train, val, data.classes, grid, seed)
        if fitted.probe is not None and row == TRAINED_ROW:
            antialias = config.model.antialias
            kept = probe_classifier(fitted.probe, backbone, data.classes, antialias)
            folder = Path(workdir) / row / f"seed{seed}" / FOLDER
            save_classifier(folder, kept, checkpoint=checkpoint)
        entry.runs.append(_run(seed, fitted, features))
    return [entry]


def _few_labels(config, row, sets, features, grid) -> list[Entry]:
    """The methods with `shots` labels per class for training and as many to choose."""
    c = config.fewshot
    entries = []
    for method in c.methods:
        for shots in c.shots:
            entry = Entry(row, method, shots)
            for seed in c.seeds:
                drawn = []
                for name in ("train", "val"):
                    rows = few_per_class(
                        sets[name], shots, seed, by_patient=c.unit == "patients"
                    )
                    drawn.append((features[name][rows], sets[name].labels[rows]))
                fitted = _fit(config, method, *drawn, sets["train"].classes, grid, seed)
                entry.runs.append(_run(seed, fitted, features))
            entries.append(entry)
    return entries


class _Fitted(NamedTuple):
    """scores(Features) -> [n,Y], what was chosen, validation accuracy."""

    scores: Callable[[Features], np.ndarray]
    choice: dict
    val: float
    probe: LinearProbe | None = None


def _choice(probe: LinearProbe) -> _Fitted:
    return _Fitted(probe.scores, probe.head._asdict(), probe.val_accuracy, probe)


def _run(seed, fitted: _Fitted, features) -> Run:
    scores = fitted.scores
    outside = scores(features["external"]) if "external" in features else None
    return Run(seed, fitted.choice, fitted.val, scores(features["test"]), outside)


def _linear_paper(config, row, backbone, sets, features, grid, seed):
    c = config.linear
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
        preprocess=_preprocess(config, backbone),
        name=f"{row}, linear probe, seed {seed}",
    )
    return _choice(probe)


def _fit(config, method, train, val, classes, grid, seed) -> _Fitted:
    """Train and select; train and val are (Features, labels)."""
    (x, y), (val_x, val_y) = train, val
    num_classes = len(classes)
    if method == "linear":
        c = config.linear
        steps = max(len(x) // c.batch_size, 1)
        # A few labels make few steps per epoch: the number of steps is kept instead.
        few = config.mode == "fewshot"
        epochs = config.fewshot.linear_steps // steps if few else c.epochs
        probe = fit_cached(
            x,
            y,
            val_x,
            val_y,
            num_classes=num_classes,
            heads=grid,
            seed=seed,
            batch_size=c.batch_size,
            epochs=epochs,
            warmup_epochs=epochs // 2 if few else c.warmup_epochs,
        )
        return _choice(probe)
    if method == "logreg":
        c = config.logreg
        fitted = fit_logreg(
            x.cls[:, -1],
            y,
            val_x.cls[:, -1],
            val_y,
            num_classes=num_classes,
            c_grid=tuple(10.0 ** np.linspace(*c.log10_c)),
            max_iter=c.max_iter,
        )
        choice = {"C": fitted.c, "converged": fitted.converged}
        return _Fitted(
            lambda features: fitted.scores(features.cls[:, -1]),
            choice,
            fitted.val_accuracy,
        )
    if method == "knn":
        return _nearest(config.knn, x, y, val_x, val_y, num_classes)
    raise UserError(f"method {method!r}: choose one of linear, knn, logreg")


def _nearest(c, x, y, val_x, val_y, num_classes):
    settings = dict(num_classes=num_classes, ks=tuple(c.ks), temperature=c.temperature)

    def votes(features: Features):
        return knn_votes(x.cls[:, -1], y, features.cls[:, -1], **settings)

    accuracy = {
        k: float((v.argmax(axis=1) == val_y).mean()) for k, v in votes(val_x).items()
    }
    best = max(accuracy, key=accuracy.get)  # the first of equals
    return _Fitted(lambda features: votes(features)[best], {"k": best}, accuracy[best])
