"""A segmentation evaluation from config to results: data, trainings, figures."""

import dataclasses
import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone
from ultradino_jax.data.datasets.labelled import SPLITS
from ultradino_jax.data.datasets.open import open_segmented as load_dataset
from ultradino_jax.data.datasets.segmented import SegmentedImages, make_splits
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import untrained
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.load import backbone_of, checkpoint_record
from ultradino_jax.evaluators.overlap import check_overlap
from ultradino_jax.evaluators.segmentation.loss import IGNORE
from ultradino_jax.evaluators.segmentation.networks import (
    NETWORKS,
    Network,
    make_network,
)
from ultradino_jax.evaluators.segmentation.results import (
    Entry,
    Run,
    baseline_figures,
    contact_sheet,
    entry_records,
    scored,
    split_record,
    table,
    write_masks,
    write_split,
)
from ultradino_jax.evaluators.segmentation.segmenter import usable_backbone
from ultradino_jax.evaluators.segmentation.train import Pairs, train_segmenter

FORMAT = "ultradino_segmentation"
ROWS = ("teacher", "random init", *NETWORKS)
BUDGETS = ("paper", "equal")
RESIZES = ("stretch", "letterbox")
PACKAGES = ("jax", "flax", "optax", "numpy", "scipy", "opencv-python-headless")


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
    config: ConfigDict, backbone: Backbone | None
) -> dict[str, Backbone | Network]:
    """The backbone, the same from scratch, and supervised networks, by row name.

    backbone: None where all rows are networks; otherwise they get its input.
    From scratch LayerScale starts at 1, as in the reference: at the 1e-5 of
    pretraining the blocks would do nothing for most of so short a training.
    """

    def scratch():
        assert backbone is not None  # start_of made it
        model = backbone.model
        if model.layerscale is not None:
            model = model.clone(layerscale=1.0)
        return untrained(
            dataclasses.replace(backbone, model=model), config.random_init_seed
        )

    make = {"teacher": lambda: backbone, "random init": scratch}
    make |= {
        name: functools.partial(make_network, config, name, backbone)
        for name in NETWORKS
    }
    return {name: make[name]() for name in config.rows}


def check_rows(config: ConfigDict) -> None:
    """Raises UserError for an unknown row, or when there is none."""
    unknown = sorted(set(config.rows) - set(ROWS))
    if unknown or not config.rows:
        what = f"row {unknown[0]!r} is unknown" if unknown else "config.rows is empty"
        raise UserError(f"{what}; choose of {', '.join(ROWS)}")


def start_of(config: ConfigDict, checkpoint: str | Path | None) -> Backbone | None:
    """The backbone of a call; None without checkpoint when no row is a backbone."""
    if checkpoint is None and set(config.rows) <= set(NETWORKS):
        return None
    return usable_backbone(backbone_of(config, checkpoint), config.model.registers)


def steps_of(config: ConfigDict, row: str) -> int:
    """Training steps of a row. Raises UserError for an unknown budget."""
    if config.train.budget not in BUDGETS:
        raise UserError(
            f"budget {config.train.budget!r}: choose one of {', '.join(BUDGETS)}"
        )
    if config.train.budget == "equal" or row == "teacher":
        return config.train.steps
    return config[row].steps if row in NETWORKS else config.train.scratch_steps


def letterbox_of(config: ConfigDict) -> bool:
    """Whether images keep their aspect. Raises UserError for an unknown word."""
    if config.model.resize not in RESIZES:
        raise UserError(
            f"model.resize={config.model.resize!r}: choose one of {', '.join(RESIZES)}"
        )
    return config.model.resize == "letterbox"


def split_of(config: ConfigDict, data: SegmentedImages, seed: int) -> SegmentedImages:
    """The data as run `seed` trains, validates and tests on them."""
    d = config.data
    return make_splits(
        data,
        config.subset,
        seed,
        test_fraction=d.test_fraction,
        val_fraction=d.val_fraction,
        split_seed=d.split_seed,
        split_file=d.split_file,
        max_images=d.max_images,
    )


def write_results(
    workdir: Path,
    facts: dict,
    entries: list[Entry],
    data: SegmentedImages,
    replicates: int,
) -> dict:
    """results.json of all entries; `facts` say how they were made. Returns it."""
    results = {
        "format": FORMAT,
        **facts,
        "versions": {name: version(name) for name in PACKAGES},
        "dataset": {
            "name": data.name,
            "version": data.version,
            "classes": list(data.classes),
            "images": len(data),
        },
        "entries": entry_records(entries, data.classes, replicates),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (workdir / "results.json").write_text(text, encoding="utf-8")
    return results


def evaluate(
    config: ConfigDict, checkpoint: str | Path | None, workdir: str | Path, say=print
) -> dict:
    """Train and test every row on every seed's split; returns the results.

    checkpoint: None when all rows are trained from scratch. What had ended before an
    interruption is not trained again. Raises UserError or OSError with one line when
    the input is bad.
    """
    workdir = Path(workdir)
    check_rows(config)
    letterbox_of(config)
    data = load_dataset(config.data)
    backbone = start_of(config, checkpoint)
    rows = make_rows(config, backbone)
    # Rows share their input, so any of them says how it is made.
    shown_as = backbone or next(iter(rows.values()))
    splits = {seed: split_of(config, data, seed) for seed in config.seeds}
    for seed, split in splits.items():
        write_split(workdir / "splits" / f"seed{seed}.csv", split)
    first = splits[config.seeds[0]]
    overlap = check_overlap(
        checkpoint, *splits.values(), allowed=config.allow_overlap, say=say
    )
    say(
        f"{data.name} {data.version}, {config.subset}: {split_record(first)}, "
        f"{len(data.classes) - 1} structures; {shown_as.name} from "
        f"{checkpoint or 'scratch'}, digest {shown_as.digest[:12]}"
    )
    pairs = read_pairs(data, Preprocess.of(shown_as, letterbox=letterbox_of(config)))
    entries = [Entry(row, row if row in NETWORKS else "upernet") for row in rows]
    shown = {}
    for seed, split in splits.items():
        parts = {name: _rows_of(pairs, data, split.split(name)) for name in SPLITS}
        check_structures(data, parts)
        for entry in entries:
            run, predicted = _run(
                config, entry.row, rows[entry.row], split, parts, seed, workdir
            )
            entry.runs.append(run)
            figures = run.counts.sum(axis=0)
            say(f"{entry.row}, seed {seed}: {run.choice}, {_percent(figures)}")
            if seed == config.seeds[0]:
                shown[entry.row] = predicted
    test = _rows_of(pairs, data, first.split("test"))
    grey = test.images[..., 0]
    contact_sheet(grey, test.masks, shown, workdir / "overlays.png")
    facts = {
        "config": json.loads(config.to_json_best_effort()),
        "checkpoint": checkpoint_record(checkpoint, shown_as),
        "overlap": overlap,
    }
    results = write_results(workdir, facts, entries, data, config.replicates)
    say(table(results))
    say(f"written to {workdir}: results.json, splits, predictions, overlays.png")
    return results


def _percent(counts) -> str:
    from ultradino_jax.evaluators.segmentation.metrics import mean_foreground_dice

    return f"test Dice of the structures {100 * mean_foreground_dice(counts):.2f}"


def _rows_of(pairs: Pairs, data: SegmentedImages, part: SegmentedImages) -> Pairs:
    rows = np.searchsorted(data.ids, part.ids)  # both are sorted by id
    return Pairs(pairs.images[rows], pairs.masks[rows])


def _run(config, row, backbone, split, parts, seed, workdir) -> tuple[Run, np.ndarray]:
    """(one training and its figures on the test set, the test predictions)."""
    c = config.train
    folder = Path(workdir) / row.replace(" ", "_") / f"seed{seed}"
    if row in NETWORKS:
        recipe = {k: config[row][k] for k in ("learning_rate", "weight_decay")}
    else:
        recipe = {
            "learning_rate": c.learning_rate,
            "drop_path": c.drop_path,
            "norm": config.model.norm,
            "head_channels": config.model.head_channels,
        }
    segmenter, history = train_segmenter(
        backbone,
        parts["train"],
        parts["val"],
        split.classes,
        seed=seed,
        workdir=folder,
        split_hash=split.split_hash(),
        steps=steps_of(config, row),
        warmup_steps=c.warmup_steps,
        batch_size=c.batch_size,
        dice=c.dice,
        translation=c.translation,
        validate_every=c.validate_every,
        checkpoint_every=c.checkpoint_every,
        letterbox=letterbox_of(config),
        name=f"{row}, seed {seed}",
        **recipe,
    )
    test = split.split("test")
    predicted = segmenter.predict(parts["test"].images, c.batch_size)
    write_masks(folder / "predictions", test.ids, predicted)
    y = len(split.classes)
    counts, distances = scored(predicted, parts["test"].masks, y)
    best = max(history, key=lambda h: h["val_dice"])  # the first of equals
    run = Run(
        seed=seed,
        choice={"step": best["step"], "of": steps_of(config, row)},
        val=best["val_dice"],
        ids=test.ids,
        patients=test.patients,
        counts=counts,
        distances=distances,
        baselines=baseline_figures(parts["train"].masks, parts["test"].masks, y),
        splits=split_record(split),
    )
    return run, predicted
