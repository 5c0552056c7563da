"""The models that an evaluation trained, found from its results."""

from pathlib import Path

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.classification.classifier import RECORD as CLASSIFIER
from ultradino_jax.evaluators.classification.classifier import (
    Classifier,
    load_classifier,
)
from ultradino_jax.evaluators.evaluation import seed_folder
from ultradino_jax.evaluators.segmentation.segmenter import RECORD as SEGMENTER
from ultradino_jax.evaluators.segmentation.segmenter import Segmenter, load_segmenter
from ultradino_jax.whole import read_json

_FOLDERS = {CLASSIFIER: "classifier", SEGMENTER: "segmenter"}
# Of the test figures of a run, where the two kinds of results.json keep them.
_FIGURES = ("macro_f1", "accuracy", "balanced_accuracy")
_POOLED = ("foreground_dice", "dice", "foreground_iou")


def trained_folder(path: str | Path) -> Path | None:
    """The folder of a kept classifier or segmenter, None where there is none.

    path: that folder, the one above it, or a workdir with results.json: then, of the
    first row whose models were kept, the run of highest validation score (the first of
    equals). Raises UserError for results whose models were not kept.
    """
    path = Path(path).absolute()
    for record, folder in _FOLDERS.items():
        for place in (path, path / folder):
            if (place / record).is_file():
                return place
    results = _results(path)
    if results is None:
        return None
    with damaged(path):
        return _of_results(path, results)


def _of_results(path: Path, results: dict) -> Path:
    for entry in results["entries"].values():
        found = []
        for run in entry["runs"]:
            folder = seed_folder(path, entry["row"], run["seed"])
            if (place := trained_folder(folder)) is not None:
                found.append((run["val"], place))
        if found:
            return max(found, key=lambda pair: pair[0])[1]
    methods = sorted({entry["method"] for entry in results["entries"].values()})
    raise UserError(
        f"{str(path)!r} holds results of {', '.join(methods)} and no trained model; "
        "modes linear and finetune and segmentations keep theirs"
    )


def load_trained(path: str | Path) -> tuple[Classifier | Segmenter, dict] | None:
    """(model, facts for its model card) of what `trained_folder` finds, or None.

    facts: row, seed, dataset, validation, figures {name: value}; {} without results.
    """
    folder = trained_folder(path)
    if folder is None:
        return None
    is_classifier = (folder / CLASSIFIER).is_file()
    load = load_classifier if is_classifier else load_segmenter
    model = load(folder)[0]
    with damaged(folder.parents[2]):
        return model, _facts(folder)


def _results(workdir: Path) -> dict | None:
    """results.json with entries, or None."""
    file = workdir / "results.json"
    if not file.is_file():
        return None
    results = read_json(file)
    return results if "entries" in results else None


def _facts(folder: Path) -> dict:
    """What results.json says of the run whose model is WORKDIR/row/seedN/folder."""
    workdir = folder.parents[2]
    results = _results(workdir)
    if results is None:
        return {}
    for entry in results["entries"].values():
        for run in entry["runs"]:
            if seed_folder(workdir, entry["row"], run["seed"]) != folder.parent:
                continue
            test = run["test"]
            pooled = test.get("pooled", {})
            figures = {k: test[k] for k in _FIGURES if test.get(k) is not None}
            figures |= {k: pooled[k] for k in _POOLED if pooled.get(k) is not None}
            return {
                "row": entry["row"],
                "method": entry["method"],
                "seed": run["seed"],
                "dataset": results["dataset"]["name"],
                "validation": run["val"],
                "figures": figures,
            }
    return {}
