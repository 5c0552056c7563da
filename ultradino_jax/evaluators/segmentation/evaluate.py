"""A segmentation evaluation from config to results: data, trainings, figures."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict

from ultradino_jax.data.datasets.labelled import SPLITS
from ultradino_jax.data.datasets.open import open_segmented
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import untrained
from ultradino_jax.evaluators.evaluation import Entry, begin, seed_folder
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.load import backbone_of
from ultradino_jax.evaluators.segmentation.loss import IGNORE
from ultradino_jax.evaluators.segmentation.metrics import mean_foreground_dice
from ultradino_jax.evaluators.segmentation.networks import (
    NETWORKS,
    Network,
    make_network,
)
from ultradino_jax.evaluators.segmentation.results import (
    FORMAT,
    Run,
    baseline_figures,
    contact_sheet,
    results_of,
    scored,
    split_record,
    table,
    write_masks,
    write_split,
)
from ultradino_jax.evaluators.segmentation.segmenter import usable_backbone
from ultradino_jax.evaluators.segmentation.settings import Settings, read_settings
from ultradino_jax.evaluators.segmentation.train import METRIC, Pairs, train_segmenter
from ultradino_jax.evaluators.training import best_figure
from ultradino_jax.weights.backbone import Backbone

PACKAGES = ("scipy", "opencv-python-headless")
FILES = ("splits", "predictions", "overlays.png")


def read_pairs(data: SegmentedImages, preprocess: Preprocess) -> Pairs:
    """All images and masks at the network's size, in memory.

    Images as `preprocess` makes them, masks to the nearest pixel of the same place.
    What a letterbox leaves empty is 255 in the mask: it is neither trained nor scored.
    """
    side = preprocess.image_size

    def read(i):
        mask = data.mask(i)
        y, x, height, width = preprocess.box(mask.shape)
        square = np.full((side, side), IGNORE, np.uint8)
        square[y : y + height, x : x + width] = cv2.resize(
            mask, (width, height), interpolation=cv2.INTER_NEAREST
        )
        return preprocess.resize(data[i]), square

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images, masks = zip(*pool.map(read, range(len(data))), strict=True)
    return Pairs(np.stack(images), np.stack(masks))


def check_structures(data: SegmentedImages, parts: dict[str, Pairs]) -> None:
    """Raises UserError when a split has no pixel of a structure."""
    for name, pairs in parts.items():
        present = np.bincount(pairs.masks.ravel(), minlength=256)
        for k, structure in enumerate(data.classes):
            if not present[k]:
                raise UserError(
                    f"{data.name}: none of the {len(pairs.masks)} images of the {name} "
                    f"split has {structure!r}; draw with another seed or split"
                )


def make_rows(
    settings: Settings, backbone: Backbone | None
) -> dict[str, Backbone | Network]:
    """The backbone, the same from scratch, and supervised networks, by row name.

    backbone: None where all rows are networks; otherwise they get its input.
    From scratch LayerScale starts at 1, as in the reference: at the 1e-5 of
    pretraining the blocks would do nothing for most of so short a training.
    """
    wanted = settings.wanted

    def make(row):
        if row in NETWORKS:
            size = dict(image_size=wanted.image_size, channels=wanted.channels)
            return make_network(row, settings.networks[row], backbone, **size)
        assert backbone is not None  # start_of made it
        if row == "teacher":
            return backbone
        model = backbone.model
        if model.layerscale is not None:
            model = model.clone(layerscale=1.0)
        return untrained(dataclasses.replace(backbone, model=model), wanted.seed)

    return {row: make(row) for row in settings.rows}


def start_of(settings: Settings, checkpoint: str | Path | None) -> Backbone | None:
    """The backbone of a call; None without checkpoint when no row is a backbone."""
    if checkpoint is None and set(settings.rows) <= set(NETWORKS):
        return None
    backbone = backbone_of(checkpoint, settings.rows, settings.wanted)
    return usable_backbone(backbone, settings.registers)


def evaluate(
    config: ConfigDict, checkpoint: str | Path | None, workdir: str | Path, say=print
) -> dict:
    """Train and test every row on every seed's split; returns the results.

    checkpoint: None when all rows are trained from scratch. What had ended before an
    interruption is not trained again. Raises UserError or OSError with one line when
    the input is bad.
    """
    settings = read_settings(config)
    data = open_segmented(config.data)
    backbone = start_of(settings, checkpoint)
    rows = make_rows(settings, backbone)
    # Rows share their input, so any of them says how it is made.
    shown_as = backbone or next(iter(rows.values()))
    splits = {seed: settings.split(data, seed) for seed in settings.seeds}
    first = splits[settings.seeds[0]]
    call = begin(
        json.loads(config.to_json_best_effort()),
        checkpoint,
        workdir,
        shown_as,
        data,
        [*splits.values()],
        what=f", {settings.subset}: {split_record(first)}, "
        f"{len(data.classes) - 1} structures",
        packages=PACKAGES,
        say=say,
    )
    for seed, split in splits.items():
        write_split(Path(workdir) / "splits" / f"seed{seed}.csv", split)
    preprocess = Preprocess.of(shown_as, letterbox=settings.letterbox)
    pairs = read_pairs(data, preprocess)
    entries = [Entry(row, row if row in NETWORKS else "upernet") for row in rows]
    shown = {}
    for seed, split in splits.items():
        parts = parts_of(pairs, data, split)
        for entry in entries:
            run, predicted = _run(
                settings, entry.row, rows[entry.row], split, parts, seed, workdir
            )
            entry.runs.append(run)
            dice = 100 * mean_foreground_dice(run.counts.sum(axis=0))
            what = f"{run.choice}, test Dice of the structures {dice:.2f}"
            say(f"{entry.row}, seed {seed}: {what}")
            if split is first:
                shown[entry.row] = predicted
    test = parts_of(pairs, data, first)["test"]
    contact_sheet(test.images[..., 0], test.masks, shown, call.workdir / FILES[2])
    results = results_of(entries, data, settings.replicates)
    return call.finish(FORMAT, results, table=table, files=FILES)


def parts_of(
    pairs: Pairs, data: SegmentedImages, split: SegmentedImages
) -> dict[str, Pairs]:
    """The pairs of a split's train, val and test images.

    pairs: of all images of `data`. Raises UserError as `check_structures`.
    """
    parts = {}
    for name in SPLITS:
        rows = rows_of(data, split.split(name))
        parts[name] = Pairs(pairs.images[rows], pairs.masks[rows])
    check_structures(data, parts)
    return parts


def rows_of(data: SegmentedImages, part: SegmentedImages) -> np.ndarray:
    """Where the images of a part are in the whole data set."""
    return np.searchsorted(data.ids, part.ids)  # both are sorted by id


def _run(
    settings, row, backbone, split, parts, seed, workdir
) -> tuple[Run, np.ndarray]:
    """(one training and its figures on the test set, the test predictions)."""
    recipe, folder = settings.recipes[row], seed_folder(workdir, row, seed)
    segmenter, history = train_segmenter(
        backbone,
        parts["train"],
        parts["val"],
        split.classes,
        recipe,
        seed=seed,
        workdir=folder,
        split_hash=split.split_hash(),
        name=f"{row}, seed {seed}",
    )
    predicted = segmenter.predict(parts["test"].images, recipe.batch_size)
    best = best_figure(METRIC, history)
    step = next(h["step"] for h in history if h[METRIC] == best)  # the first of equals
    choice = {"step": step, "of": recipe.steps}
    run = tested(seed, choice, best, split, parts, predicted)
    write_masks(folder / "predictions", run.ids, predicted)
    return run, predicted


def tested(
    seed: int,
    choice: dict,
    val: float,
    split: SegmentedImages,
    parts: dict[str, Pairs],
    predicted: np.ndarray,
) -> Run:
    """The figures of predicted test masks [n,S,S]."""
    test, y = split.split("test"), len(split.classes)
    counts, distances = scored(predicted, parts["test"].masks, y)
    return Run(
        seed=seed,
        choice=choice,
        val=val,
        ids=test.ids,
        patients=test.patients,
        counts=counts,
        distances=distances,
        baselines=baseline_figures(parts["train"].masks, parts["test"].masks, y),
        splits=split_record(split),
    )
