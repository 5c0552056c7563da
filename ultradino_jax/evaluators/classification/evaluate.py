"""A classification evaluation from config to results: data, features, fits, figures."""

import json
import time
from pathlib import Path

from ml_collections import ConfigDict

from ultradino_jax.data.datasets.labelled import SPLITS, LabelledImages, check_splits
from ultradino_jax.data.datasets.open import open_labelled
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import raw_pixels, untrained
from ultradino_jax.evaluators.classification.classifier import (
    check_scores,
    load_classifier,
)
from ultradino_jax.evaluators.classification.finetune import finetune
from ultradino_jax.evaluators.classification.frozen import frozen_entries
from ultradino_jax.evaluators.classification.results import (
    FORMAT,
    Run,
    results_of,
    table,
    write_confusion,
    write_predictions,
)
from ultradino_jax.evaluators.classification.settings import Settings, read_settings
from ultradino_jax.evaluators.evaluation import Entry, begin, seed_folder
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.load import backbone_of
from ultradino_jax.weights.backbone import Backbone

PACKAGES = ("scikit-learn", "opencv-python-headless")
FILES = ("predictions.csv", "confusion.png")


def check_external(external: LabelledImages, data: LabelledImages) -> None:
    """Raises UserError when the external set has a class that the head has not."""
    unknown = [name for name in external.classes if name not in data.classes]
    if unknown:
        raise UserError(
            f"external set {external.name}: class {unknown[0]!r} is not among the "
            f"{len(data.classes)} classes of the head ({', '.join(data.classes)})"
        )


def make_rows(settings: Settings, backbone: Backbone) -> dict[str, Backbone]:
    """The backbone and what it is measured against, by row name."""
    make = {
        "teacher": lambda: backbone,
        "random init": lambda: untrained(backbone, settings.wanted.seed),
        "raw pixels": lambda: raw_pixels(backbone),
    }
    # There is nothing to fine-tune in pixels.
    left_out = ("raw pixels",) if settings.mode == "finetune" else ()
    rows = {name: make[name]() for name in settings.rows if name not in left_out}
    if not rows:
        raise UserError("raw pixels cannot be fine-tuned; choose another row")
    return rows


def evaluate(
    config: ConfigDict, checkpoint: str | Path | None, workdir: str | Path, say=print
) -> dict:
    """Run the evaluation and write its results into `workdir`; returns them.

    checkpoint: None when all rows are untrained. Raises UserError or OSError with one
    line when the input is bad.
    """
    start = time.monotonic()
    settings = read_settings(config)
    data = open_labelled(config.data)
    check_splits(data)
    external = open_labelled(config.external) if config.external.name else None
    sets = {name: data.split(name) for name in SPLITS}
    if external is not None:
        check_external(external, data)
        sets["external"] = external
    backbone = backbone_of(checkpoint, settings.rows, settings.wanted)
    counts = {name: len(sets[name]) for name in SPLITS}
    call = begin(
        json.loads(config.to_json_best_effort()),
        checkpoint,
        workdir,
        backbone,
        data,
        [data],
        what=f": {counts} images, {len(data.classes)} classes",
        packages=PACKAGES,
        say=say,
    )
    entries = []
    for row, own in make_rows(settings, backbone).items():
        say(f"{row}: {settings.mode}")
        if settings.mode == "finetune":
            entries.append(_finetuned(settings, row, own, sets, workdir))
        else:
            entries += frozen_entries(settings, row, own, sets, checkpoint, workdir)
    seconds = round(time.monotonic() - start, 1)
    call.workdir.mkdir(parents=True, exist_ok=True)
    write_predictions(call.workdir / FILES[0], entries, sets["test"], external)
    write_confusion(call.workdir / FILES[1], entries[0], sets["test"])
    figures = results_of(entries, data, external, replicates=settings.replicates)
    results = {"seconds": seconds, **figures}
    return call.finish(FORMAT, results, table=table, files=FILES)


def _finetuned(settings, row, backbone, sets, workdir) -> Entry:
    entry = Entry(row, "finetune")
    recipe = settings.finetune
    for seed in settings.seeds:
        tuned = finetune(
            backbone,
            sets["train"],
            sets["val"],
            recipe,
            seed=seed,
            workdir=seed_folder(workdir, row, seed),
            preprocess=Preprocess.of(backbone, antialias=settings.antialias),
            name=f"{row}, seed {seed}",
        )
        choice = {"epoch": tuned.best_epoch, "layerwise": recipe.layerwise}
        test = tuned.scores(sets["test"], settings.batch_size)
        folder = seed_folder(workdir, row, seed)
        check_scores(load_classifier(folder)[0], sets["test"], test)
        outside = None
        if "external" in sets:
            outside = tuned.scores(sets["external"], settings.batch_size)
        entry.runs.append(Run(seed, choice, tuned.val_f1, test, outside))
    return entry
