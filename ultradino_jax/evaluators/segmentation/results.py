"""What a segmentation evaluation leaves: results.json, splits, index PNGs, overlays."""

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ultradino_jax.data.datasets.labelled import SPLITS
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.evaluators.bootstrap import interval, mean_and_std
from ultradino_jax.evaluators.evaluation import Entry
from ultradino_jax.evaluators.segmentation import metrics
from ultradino_jax.whole import whole_file

FORMAT = "ultradino_segmentation"
# Colours of the structures in overlays, in index order; reused past the last.
COLOURS = ((255, 80, 80), (80, 220, 80), (90, 150, 255), (255, 210, 60))
SHOWN = 8


@dataclass
class Run:
    """One training: its seed, what validation chose, and figures of the test images.

    counts: [n,Y,3] pixels; distances: [n,Y-1] HD95; ids, patients: [n].
    """

    seed: int
    choice: dict
    val: float
    ids: np.ndarray
    patients: np.ndarray
    counts: np.ndarray
    distances: np.ndarray
    baselines: dict
    splits: dict


def scored(predictions, masks, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixel counts [n,Y,3], HD95 [n,Y-1]) of masks [n,S,S].

    Pixels to be ignored are background for the distances.
    """
    counts, distances = [], []
    for prediction, mask in zip(predictions, masks, strict=True):
        counts.append(metrics.pixel_counts(prediction, mask, num_classes))
        distances.append(metrics.hd95_per_structure(prediction, mask, num_classes))
    return np.stack(counts), np.stack(distances)


def baseline_figures(train_masks, test_masks, num_classes: int) -> dict:
    """Dice of two predictors that look at no image.

    'background': every pixel is background; 'mean_mask': every pixel is what it is
    most often in the training masks.
    """
    share = np.stack([(train_masks == k).mean(axis=0) for k in range(num_classes)])
    guesses = {
        "background": np.zeros(test_masks.shape[1:], np.uint8),
        "mean_mask": share.argmax(axis=0).astype(np.uint8),
    }
    figures = {}
    for name, guess in guesses.items():
        counts = sum(metrics.pixel_counts(guess, m, num_classes) for m in test_masks)
        figures[name] = {
            "dice": metrics.number(metrics.mean_dice(counts)),
            "foreground_dice": metrics.number(metrics.mean_foreground_dice(counts)),
        }
    return figures


def split_record(data: SegmentedImages) -> dict:
    """Hash of a split, and images and patients of its parts."""
    counts = {
        name: {
            "images": int((data.splits == name).sum()),
            "patients": len(np.unique(data.patients[data.splits == name])),
        }
        for name in SPLITS
    }
    return {"split_hash": data.split_hash(), **counts}


def write_split(path: Path, data: SegmentedImages) -> None:
    """A csv of id, patient and split; it can be given back as `split_file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as fresh,
        open(fresh, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "patient", "split"])
        writer.writerows(zip(data.ids, data.patients, data.splits, strict=True))


def write_masks(folder: Path, ids, masks) -> None:
    """Masks [n,S,S] as PNGs of class indices, one per image; '/' becomes '__'."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(ids, masks, strict=True):
        Image.fromarray(mask).save(folder / f"{str(name).replace('/', '__')}.png")


def same_test_set(runs: list[Run]) -> bool:
    """Whether all runs were tested on the same images."""
    return all(np.array_equal(run.ids, runs[0].ids) for run in runs)


def stacked(runs: list[Run]) -> np.ndarray:
    """[runs,n,Y,3]."""
    return np.stack([run.counts for run in runs])


def summary(runs: list[Run], records: list[dict], replicates: int) -> dict:
    """Mean and standard deviation over runs, and the patient bootstrap's interval.

    The figures are the pooled ones; intervals need one test set for all runs.
    """
    figures = {}
    for name, statistic in metrics.STATISTICS.items():
        values = [record["test"]["pooled"][name] for record in records]
        if None in values:
            continue
        figures[name] = mean_and_std(values)
        if same_test_set(runs):
            sampled = metrics.bootstrap_replicates(
                stacked(runs), runs[0].patients, statistic, replicates=replicates
            )
            figures[name]["interval"] = list(interval(sampled))
    distances = [record["test"]["per_image"]["hd95"] for record in records]
    if None not in distances:
        figures["hd95"] = mean_and_std(distances)
    return figures


def difference(first: Entry, other: Entry, replicates: int) -> dict:
    """Foreground Dice of `first` minus that of `other`, the same patients resampled."""
    statistic = metrics.mean_foreground_dice
    gaps = [
        float(statistic(a.counts.sum(axis=0)) - statistic(b.counts.sum(axis=0)))
        for a, b in zip(first.runs, other.runs, strict=True)
    ]
    record = {"foreground_dice": float(np.mean(gaps)), "by_run": gaps}
    if same_test_set([*first.runs, *other.runs]):
        sampled = [
            metrics.bootstrap_replicates(
                stacked(entry.runs),
                entry.runs[0].patients,
                statistic,
                replicates=replicates,
            )
            for entry in (first, other)
        ]
        record["interval"] = list(interval(sampled[0] - sampled[1]))
    return record


def entry_records(entries: list[Entry], classes, replicates: int) -> dict:
    """JSON of all entries by row name; the later ones are compared with the first."""
    records = {}
    for entry in entries:
        runs = [
            {
                "seed": run.seed,
                "choice": run.choice,
                "val": run.val,
                "splits": run.splits,
                "baselines": run.baselines,
                "test": metrics.segmentation_metrics(
                    run.counts, run.distances, run.patients, classes
                ),
            }
            for run in entry.runs
        ]
        records[entry.row] = {
            "row": entry.row,
            "method": entry.method,
            "summary": summary(entry.runs, runs, replicates),
            "runs": runs,
        }
        if entry is not entries[0]:
            records[entry.row]["first_minus_this"] = difference(
                entries[0], entry, replicates
            )
    return records


def results_of(entries: list[Entry], data: SegmentedImages, replicates: int) -> dict:
    """'dataset' and 'entries' of results.json."""
    return {
        "dataset": {
            "name": data.name,
            "version": data.version,
            "classes": list(data.classes),
            "images": len(data),
        },
        "entries": entry_records(entries, data.classes, replicates),
    }


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 [S,S] and class indices -> RGB with outlined, tinted structures."""
    picture = np.repeat(image[:, :, None], 3, axis=2).astype(np.float32)
    for k in np.unique(mask):
        if k in (0, 255):
            continue
        colour = np.array(COLOURS[(int(k) - 1) % len(COLOURS)], np.float32)
        inside = mask == k
        picture[inside] = 0.75 * picture[inside] + 0.25 * colour
        picture[metrics.surface(inside)] = colour
    return picture.astype(np.uint8)


def contact_sheet(images, masks, predictions: dict, path: Path) -> None:
    """PNG: a column per image; rows: image, truth, then each row's prediction.

    images [n,S,S], masks [n,S,S], predictions {row: [n,S,S]}; at most 8 evenly spread
    images are shown.
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, SHOWN).round().astype(int))
    rows = {"image": None, "truth": masks, **predictions}
    side = images.shape[1]
    label = 18
    sheet = np.full(
        (len(rows) * (side + label), len(chosen) * (side + 2), 3), 24, np.uint8
    )
    for (r, (name, values)), (c, i) in itertools.product(
        enumerate(rows.items()), enumerate(chosen)
    ):
        blank = np.zeros_like(images[i])
        picture = overlay(images[i], blank if values is None else values[i])
        y, x = r * (side + label), c * (side + 2)
        sheet[y + label : y + label + side, x : x + side] = picture
        if c == 0:
            cv2.putText(
                sheet, name, (2, y + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4,
                (230, 230, 230), 1, cv2.LINE_AA,
            )  # fmt: skip
    Image.fromarray(sheet).save(path)


def table(results: dict) -> str:
    """The results as text: a line per entry, its structures, and the comparison."""
    lines = [
        f"{'Dice in percent':22}{'structures':>11}{'+-':>7}{'95 % interval':>18}"
        f"{'with background':>17}{'IoU':>8}{'HD95 px':>9}"
    ]
    for label, entry in results["entries"].items():
        s = entry["summary"]
        d = s["foreground_dice"]
        std = "" if d["std"] is None else f"{100 * d['std']:.2f}"
        low, high = (100 * x for x in d.get("interval", (np.nan, np.nan)))
        hd = s["hd95"]["mean"] if "hd95" in s else np.nan
        lines.append(
            f"{label:22}{100 * d['mean']:11.2f}{std:>7}{f'[{low:.2f}, {high:.2f}]':>18}"
            f"{100 * s['dice']['mean']:17.2f}{100 * s['foreground_iou']['mean']:8.2f}"
            f"{hd:9.2f}"
        )
    for label, entry in results["entries"].items():
        parts = []
        for name in list(entry["runs"][0]["test"]["per_class"])[1:]:
            dice = [r["test"]["per_class"][name]["dice"] for r in entry["runs"]]
            known = [100 * x for x in dice if x is not None]
            parts.append(f"{name} {np.mean(known):.2f}" if known else f"{name} -")
        lines.append(f"{label}: {', '.join(parts)}")
        if "first_minus_this" in entry:
            gap = entry["first_minus_this"]
            low, high = (100 * x for x in gap.get("interval", (np.nan, np.nan)))
            first = next(iter(results["entries"]))
            lines.append(
                f"{first} minus {label}: {100 * gap['foreground_dice']:+.2f}, paired "
                f"95 % interval [{low:+.2f}, {high:+.2f}]"
            )
    guesses = [r["baselines"] for r in next(iter(results["entries"].values()))["runs"]]
    for name in guesses[0]:
        both = [
            100 * np.mean([g[name][key] for g in guesses])
            for key in ("foreground_dice", "dice")
        ]
        lines.append(f"{name}: {both[0]:.2f} structures, {both[1]:.2f} with background")
    return "\n".join(lines)
