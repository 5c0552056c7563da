"""What an evaluation leaves behind: results.json, predictions.csv, figure and table."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultradino_jax.data.datasets.labelled import SPLITS, LabelledImages
from ultradino_jax.evaluators.bootstrap import mean_and_std
from ultradino_jax.evaluators.classification import metrics
from ultradino_jax.evaluators.evaluation import Entry
from ultradino_jax.whole import whole_file

FORMAT = "ultradino_classification"
INTERVALS = {
    "macro_f1": metrics.macro_f1,
    "accuracy": metrics.accuracy,
    "balanced_accuracy": metrics.balanced_accuracy,
}
MAX_GROUPS = 12


@dataclass
class Run:
    """One fit: its seed, what validation chose, and scores [n,Y] by set of images."""

    seed: int
    choice: dict
    val: float
    scores: np.ndarray
    external: np.ndarray | None = None


def group_figures(data: LabelledImages, scores, train: LabelledImages) -> dict:
    """{column: {value: metrics}} for columns of at most MAX_GROUPS values.

    `train_images` says how many training images have the value: 0 or few is a scanner
    or centre that the model did not meet. macro F1 is the mean over the classes that
    have labels there. Columns with a value that occurs in one class only are left out:
    they divide the classes, not the data.
    """
    figures = {}
    for name, values in data.groups.items():
        distinct = np.unique(values)
        one_class = any(len(set(data.labels[values == v])) < 2 for v in distinct)
        if not 2 <= len(distinct) <= MAX_GROUPS or one_class:
            continue
        figures[name] = {}
        for value in distinct.tolist():
            rows = values == value
            confusion = metrics.confusion_matrix(
                data.labels[rows], scores[rows].argmax(axis=1), len(data.classes)
            )
            seen = train.groups.get(name, np.array([])) == value
            figures[name][value] = {
                "images": int(rows.sum()),
                "train_images": int(np.sum(seen)),
                "macro_f1": float(metrics.macro_f1(confusion)),
                "accuracy": float(metrics.accuracy(confusion)),
            }
    return figures


def external_figures(data: LabelledImages, scores, external: LabelledImages) -> dict:
    """Figures on a set that has some of the classes.

    `shared`: only the classes that the set has can be predicted. `open`: all classes
    can; macro F1 is the mean over those that the set has.
    """
    columns = [data.classes.index(name) for name in external.classes]
    shared = metrics.classification_metrics(
        external.labels, scores[:, columns], external.classes
    )
    labels = np.array(columns)[external.labels]
    confusion = metrics.confusion_matrix(
        labels, scores.argmax(axis=1), len(data.classes)
    )
    f1 = metrics.f1_per_class(confusion)[columns]
    return {
        "shared": shared,
        "open": {
            "macro_f1": float(np.nanmean(f1)),
            "accuracy": float(metrics.accuracy(confusion)),
        },
    }


def run_record(run: Run, data: LabelledImages, external: LabelledImages | None) -> dict:
    """JSON of one run; `data` is the whole set with its splits."""
    test, train = data.split("test"), data.split("train")
    record = {
        "seed": run.seed,
        "choice": run.choice,
        "val": run.val,
        "test": metrics.classification_metrics(test.labels, run.scores, test.classes),
        "groups": group_figures(test, run.scores, train),
    }
    if external is not None:
        record["external"] = external_figures(test, run.external, external)
    return record


def summary(records: Sequence[dict], runs: Sequence[Run], test, replicates) -> dict:
    """Mean and standard deviation over runs, and the patient bootstrap's interval."""
    figures = {}
    for name in (*INTERVALS, "macro_auroc"):
        values = [r["test"][name] for r in records]
        if None in values:
            continue
        figures[name] = mean_and_std(values)
        if name in INTERVALS:
            interval = metrics.bootstrap_interval(
                test.labels,
                np.stack([run.scores.argmax(axis=1) for run in runs]),
                test.patients,
                len(test.classes),
                statistic=INTERVALS[name],
                replicates=replicates,
            )
            figures[name]["interval"] = list(interval)
    return figures


def dataset_record(data: LabelledImages) -> dict:
    """Name, version, split hash and what each split holds."""
    counts = {}
    for name in dict.fromkeys([*SPLITS, *data.splits.tolist()]):
        rows = data.splits == name
        if rows.any():
            per_class = np.bincount(data.labels[rows], minlength=len(data.classes))
            counts[name] = {
                "images": int(rows.sum()),
                "patients": len(np.unique(data.patients[rows])),
                "per_class": dict(zip(data.classes, per_class.tolist(), strict=True)),
            }
    return {
        "name": data.name,
        "version": data.version,
        "classes": list(data.classes),
        "split_hash": data.split_hash(),
        "splits": counts,
    }


def results_of(
    entries: Sequence[Entry],
    data: LabelledImages,
    external: LabelledImages | None,
    *,
    replicates: int = 2000,
) -> dict:
    """'dataset', 'external' and 'entries' of results.json."""
    test = data.split("test")
    records = {}
    for entry in entries:
        runs = [run_record(run, data, external) for run in entry.runs]
        records[entry.label] = {
            "row": entry.row,
            "method": entry.method,
            "shots": entry.shots,
            "summary": summary(runs, entry.runs, test, replicates),
            "runs": runs,
        }
    return {
        "dataset": dataset_record(data),
        "external": None if external is None else dataset_record(external),
        "entries": records,
    }


def write_predictions(
    path: str | Path,
    entries: Sequence[Entry],
    test: LabelledImages,
    external: LabelledImages | None,
) -> None:
    """One line per image and run: entry, seed, set, id, patient, label, prediction.

    Probabilities follow, except for few-label entries, which have many runs.
    """
    header = ["entry", "seed", "set", "id", "patient", "label", "prediction"]
    with (
        whole_file(path) as fresh,
        open(fresh, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header, *test.classes])
        for entry in entries:
            for run in entry.runs:
                sets = [("test", test, run.scores)]
                if external is not None:
                    sets.append(("external", external, run.external))
                for name, images, scores in sets:
                    rows = _predictions(images, scores, test.classes, entry.shots)
                    writer.writerows([entry.label, run.seed, name, *r] for r in rows)


def _predictions(images: LabelledImages, scores, classes, shots) -> Iterator[list]:
    predicted = scores.argmax(axis=1)
    for i in range(len(images)):
        line = [images.ids[i], images.patients[i]]
        line += [images.classes[images.labels[i]], classes[predicted[i]]]
        yield line if shots is not None else line + [f"{p:.6f}" for p in scores[i]]


def write_confusion(path: str | Path, entry: Entry, test: LabelledImages) -> None:
    """PNG of the confusions of an entry, summed over its runs."""
    counts = [
        metrics.confusion_matrix(
            test.labels, run.scores.argmax(axis=1), len(test.classes)
        )
        for run in entry.runs
    ]
    title = f"{test.name}, {entry.label}, {len(entry.runs)} runs"
    draw_confusion(path, np.sum(counts, axis=0), test.classes, title)


def draw_confusion(path, confusion: np.ndarray, classes, title: str) -> None:
    """PNG of a confusion matrix: row shares as shade, counts as text."""
    from matplotlib.figure import Figure

    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    size = 1.6 + 0.7 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right")
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=9)
    for i in ticks:
        for j in ticks:
            color = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, confusion[i, j], ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)


def table(results: dict) -> str:
    """The results as text: one line per entry, then the first entry's parts.

    The parts are the groups (scanner, ..) and the external set, means over runs.
    """
    lines = [
        f"{'':24}{'macro F1':>10}{'+-':>7}{'95 % interval':>18}{'accuracy':>10}"
        f"{'balanced':>10}{'AUROC':>8}  chosen on validation"
    ]
    for label, entry in results["entries"].items():
        s = entry["summary"]
        f1 = s["macro_f1"]
        low, high = (100 * x for x in f1["interval"])
        std = "" if f1["std"] is None else f"{100 * f1['std']:.2f}"
        auroc = s["macro_auroc"]["mean"] if "macro_auroc" in s else float("nan")
        chosen = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in entry["runs"][0]["choice"].items()
        )
        lines.append(
            f"{label:24}{100 * f1['mean']:10.2f}{std:>7}"
            f"{f'[{low:.2f}, {high:.2f}]':>18}{100 * s['accuracy']['mean']:10.2f}"
            f"{100 * s['balanced_accuracy']['mean']:10.2f}{100 * auroc:8.2f}  {chosen}"
        )
    label, entry = next(iter(results["entries"].items()))
    for name, values in entry["runs"][0]["groups"].items():
        for value, part in values.items():
            f1 = [r["groups"][name][value]["macro_f1"] for r in entry["runs"]]
            lines.append(
                f"{label}, {name} {value}: macro F1 {100 * np.mean(f1):.2f} on "
                f"{part['images']} images ({part['train_images']} in training)"
            )
    if results["external"]:
        f1 = [r["external"]["shared"]["macro_f1"] for r in entry["runs"]]
        lines.append(
            f"{label}, {results['external']['name']}: macro F1 "
            f"{100 * np.mean(f1):.2f} among its {len(results['external']['classes'])} "
            f"classes"
        )
    return "\n".join(lines)
