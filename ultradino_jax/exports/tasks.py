"""Classifiers and segmenters leave: files, and their outputs in the target library.

A classifier leaves as a Hugging Face folder (Dinov2ForImageClassification and its
sibling with registers), ONNX or this project's own file; a segmenter as ONNX or the own
file, which holds any network. Batch norms of fine-tuning are folded into the layer.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.backbone import backbone_record, record_to_backbone
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    architecture_record,
    module_of,
)
from ultradino_jax.exports.backbones import (
    hf_config,
    hf_model,
    hf_processor,
    onnx_target,
    write_json,
    write_own,
    write_tensors,
)
from ultradino_jax.exports.onnx_backbone import import_onnx
from ultradino_jax.exports.onnx_tasks import classifier_onnx, segmenter_onnx
from ultradino_jax.models.upernet import UperNet
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights import naming
from ultradino_jax.weights.files import RECORD_KEY
from ultradino_jax.weights.load import load_backbone_file
from ultradino_jax.weights.meta import nest, vit_state
from ultradino_jax.weights.safetensors import read_safetensors

CLASSIFIER_FORMATS = ("hf", "onnx", "safetensors")
SEGMENTER_FORMATS = ("onnx", "safetensors")


def write_task(kind: str, task: Classifier | Segmenter, folder: Path) -> None:
    """Write a classifier's or segmenter's files into an existing folder.

    Raises UserError for a format that cannot hold it, ImportError naming the missing
    extra.
    """
    _check_format(kind, task)
    if kind == "onnx":
        is_classifier = isinstance(task, Classifier)
        model = classifier_onnx(task) if is_classifier else segmenter_onnx(task)
        import_onnx().save(model, folder / "model.onnx")
    elif isinstance(task, Segmenter):
        record = {"format": "ultradino_segmenter", **architecture_record(task)}
        record |= {"classes": list(task.classes), "letterbox": task.letterbox}
        write_own(folder, dict(task.variables), record)
    elif kind == "safetensors":
        kernel, bias = task.linear
        tree = {"backbone": task.backbone.params}
        tree["head"] = {"kernel": kernel, "bias": bias}
        write_own(folder, tree, _record(task))
    else:
        _write_hf(task, folder)


def _check_format(kind: str, task: Classifier | Segmenter) -> None:
    is_classifier = isinstance(task, Classifier)
    what, name = ("classifier" if is_classifier else "segmenter"), task.backbone.name
    formats = CLASSIFIER_FORMATS if is_classifier else SEGMENTER_FORMATS
    if kind not in formats:
        raise UserError(
            f"format {kind!r} has no {what}s; choose one of {', '.join(formats)}"
        )
    model = task.backbone.model if is_classifier else task.model
    if isinstance(model, UperNet):
        model = model.backbone
    if kind != "safetensors" and not isinstance(model, ViT):
        raise UserError(
            f"{name}: format {kind!r} holds DINOv2-style ViTs, alone or under UperNet; "
            "'safetensors' holds any network"
        )
    if kind == "hf" and isinstance(task, Classifier) and task.layers > 1:
        raise UserError(
            f"{name}: transformers' classifier sees the last block only, this probe "
            f"the last {task.layers}; onnx and safetensors hold it"
        )


def _record(task: Classifier) -> dict:
    return {
        "format": "ultradino_classifier",
        "classes": list(task.classes),
        "layers": task.layers,
        "patch": task.patch,
        "antialias": task.antialias,
        "backbone": backbone_record(task.backbone),
    }


def _write_hf(task: Classifier, folder: Path) -> None:
    """A folder for *ForImageClassification, whose layer sees [CLS, mean patch]."""
    backbone, (kernel, bias) = task.backbone, task.linear
    if not task.patch:
        kernel = np.concatenate([kernel, np.zeros_like(kernel)])
    config = hf_config(backbone)
    prefix, model = config["model_type"], config["architectures"][0]
    config["architectures"] = [model.replace("Model", "ForImageClassification")]
    config["id2label"] = {str(i): name for i, name in enumerate(task.classes)}
    config["label2id"] = {name: i for i, name in enumerate(task.classes)}
    state = vit_state(backbone.params, patch_size=backbone.model.patch_size)
    tensors = {f"{prefix}.{k}": x for k, x in naming.to_hf(state).items()}
    tensors |= {"classifier.weight": kernel.T, "classifier.bias": bias}
    record = {**backbone_record(backbone), "naming": "hf"}
    write_tensors(folder, tensors, record)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", hf_processor(backbone))


def load_task(folder: str | Path) -> Classifier | Segmenter:
    """Read back an export of format 'safetensors', or a classifier's of 'hf'.

    Raises FileNotFoundError or UserError, one line, for anything else.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no model.safetensors in {str(folder)!r}")
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    record = json.loads(metadata.get(RECORD_KEY, "{}"))
    if "classifier.weight" in tensors and record.get("naming") == "hf":
        names = json.loads((folder / "config.json").read_text())["id2label"]
        head = {"kernel": tensors["classifier.weight"].T}
        head["bias"] = tensors["classifier.bias"]
        backbone = load_backbone_file(folder)
        return Classifier(backbone, head, 1, True, tuple(names.values()))
    tree = jax.tree.map(jnp.asarray, nest(tensors))
    classes = tuple(record.get("classes", ()))
    if record.get("format") == "ultradino_classifier":
        backbone = record_to_backbone(record["backbone"], tree["backbone"], str(folder))
        options = {k: record[k] for k in ("layers", "patch", "antialias")}
        return Classifier(backbone, tree["head"], classes=classes, **options)
    if record.get("format") == "ultradino_segmenter":
        backbone, model = module_of(record, str(folder))
        return Segmenter(backbone, model, tree, classes, record["letterbox"])
    raise UserError(f"{str(folder)!r} holds no classifier or segmenter of this project")


def task_target(kind: str, folder: Path):
    """(library and version, function) of an export, loaded in its target library.

    The function maps normalised images, float32 [B,C,S,S], to {'logits': [B,Y] or
    [B,Y,S,S]}. Raises ImportError when the library is missing.
    """
    if kind == "onnx":
        return onnx_target(folder, ("logits",))
    import torch

    library, model = hf_model(folder)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"logits": model(torch.from_numpy(images)).logits.numpy()}

    return library, run


def task_logits(task: Classifier | Segmenter, images: np.ndarray) -> np.ndarray:
    """Normalised float32 [B,S,S,C] -> logits [B,Y], or [B,Y,S,S] of a segmenter."""
    if isinstance(task, Classifier):
        return task.logits(images)
    logits = jax.jit(task.model.apply)(task.variables, jnp.asarray(images))
    return np.moveaxis(np.asarray(logits), -1, 1)
