"""This project's own single file: any backbone, classifier or segmenter."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.errors import damaged
from ultradino_jax.evaluators.classification.classifier import (
    FEATURES,
    Classifier,
    check_features,
)
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    architecture_record,
    module_of,
)
from ultradino_jax.exports.format import Format, write_json, write_tensors
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.backbone import Backbone, backbone_record
from ultradino_jax.weights.files import read_safetensors
from ultradino_jax.weights.meta import nest
from ultradino_jax.weights.own import record_to_backbone

_USE = """```python
from ultradino_jax.weights.load import load_backbone

backbone = load_backbone("FOLDER")
```"""
_USE_TASK = """```python
from ultradino_jax.exports.formats import load_task
from ultradino_jax.exports.subject import task_logits

model = load_task("FOLDER")
logits = task_logits(model, images)  # float32 [B,{s},{s},{c}], normalised as below
```"""


def _write(folder: Path, tree, record: dict) -> None:
    """One flat file of a parameter tree, the record in its header and beside it."""
    record = {**record, "naming": "own"}
    flat = {name: np.asarray(x) for name, x in flat_names(tree).items()}
    write_tensors(folder, flat, record)
    write_json(folder / "record.json", record)


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """model.safetensors and record.json of a backbone."""
    _write(folder, backbone.params, backbone_record(backbone))


def write_classifier(task: Classifier, folder: Path) -> None:
    """The same of a classifier, a batch norm folded into its layer."""
    kernel, bias = task.linear
    tree = {"backbone": task.backbone.params}
    tree["head"] = {"kernel": kernel, "bias": bias}
    record = {
        "format": "ultradino_classifier",
        "classes": list(task.classes),
        "layers": task.layers,
        "patch": task.patch,
        "antialias": task.antialias,
        "features": FEATURES,
        "backbone": backbone_record(task.backbone),
    }
    _write(folder, tree, record)


def write_segmenter(task: Segmenter, folder: Path) -> None:
    """The same of a segmenter, whatever its network."""
    record = {"format": "ultradino_segmenter", **architecture_record(task)}
    record |= {"classes": list(task.classes), "letterbox": task.letterbox}
    _write(folder, dict(task.variables), record)


def load_task(folder: Path) -> Classifier | Segmenter | None:
    """Read a classifier or segmenter back; None for anything else."""
    tensors, record = read_safetensors(folder / "model.safetensors")
    kind = (record or {}).get("format")
    if record is None or kind not in ("ultradino_classifier", "ultradino_segmenter"):
        return None
    tree = jax.tree.map(jnp.asarray, nest(tensors))
    with damaged(folder):
        classes = tuple(record["classes"])
        if kind == "ultradino_segmenter":
            backbone, model = module_of(record, str(folder))
            return Segmenter(backbone, model, tree, classes, record["letterbox"])
        backbone = record_to_backbone(record["backbone"], tree["backbone"], str(folder))
        options = {k: record[k] for k in ("layers", "patch", "antialias")}
        task = Classifier(backbone, tree["head"], classes=classes, **options)
        check_features(task, record, folder)
        return task


FORMAT = Format(
    write={
        "backbone": write_backbone,
        "classifier": write_classifier,
        "segmenter": write_segmenter,
    },
    usage={"backbone": _USE, "classifier": _USE_TASK, "segmenter": _USE_TASK},
    no_target="it is this project's own",
    holds_any_model=True,
    load_task=load_task,
)
