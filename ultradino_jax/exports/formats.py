"""The export formats: `write` fills a folder, `load_task` reads one."""

from pathlib import Path

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.segmentation.segmenter import Segmenter
from ultradino_jax.exports import hf, meta, onnx_file, own, timm_folder
from ultradino_jax.exports.format import Format
from ultradino_jax.exports.subject import Subject, input_of, kind_of, vision_model
from ultradino_jax.models.vit import ViT

FORMATS: dict[str, Format] = {
    "hf": hf.FORMAT,
    "timm": timm_folder.FORMAT,
    "meta": meta.FORMAT,
    "onnx": onnx_file.FORMAT,
    "safetensors": own.FORMAT,
}


def write(name: str, subject: Subject, folder: Path, heads: dict | None = None) -> None:
    """Write a backbone's, classifier's or segmenter's files into an existing folder.

    name: one of FORMATS. heads: {'dino_head': params, ..} to keep beside a backbone,
    where the format has a place for them. Raises UserError for an unknown format, for
    heads elsewhere and for a model that the format cannot hold; MissingPackage naming
    the missing extra.
    """
    if name not in FORMATS:
        raise UserError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    form, kind = FORMATS[name], kind_of(subject)
    if kind not in form.write:
        able = [other for other, f in FORMATS.items() if kind in f.write]
        raise UserError(
            f"format {name!r} has no {kind}s; choose one of {', '.join(able)}"
        )
    if heads and not form.holds_heads:
        able = [other for other, f in FORMATS.items() if f.holds_heads]
        raise UserError(
            f"format {name!r} has no place for projection heads; use {', '.join(able)}"
        )
    if not form.holds_any_model and not isinstance(vision_model(subject), ViT):
        able = [other for other, f in FORMATS.items() if f.holds_any_model]
        raise UserError(
            f"{input_of(subject).name}: format {name!r} holds DINOv2-style ViTs, alone "
            f"or under UperNet; {', '.join(able)} holds any network"
        )
    options = {"heads": heads} if heads else {}
    form.write[kind](subject, Path(folder), **options)


def load_task(folder: str | Path) -> Classifier | Segmenter:
    """Read back an export of format 'safetensors', or a classifier's of 'hf'.

    Raises FileNotFoundError or UserError, one line, for anything else.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no model.safetensors in {str(folder)!r}")
    for form in FORMATS.values():
        task = form.load_task(folder)
        if task is not None:
            return task
    raise UserError(f"{str(folder)!r} holds no classifier or segmenter of this project")
