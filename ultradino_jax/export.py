"""Export a model to another library, checked there before it is kept.

    python -m ultradino_jax.export --checkpoint runs/vitb --format hf --out exports/hf

Formats: hf (a Hugging Face folder), timm, meta (DINOv2's and UltraDINO's
teacher_checkpoint.pth, with --heads also the projection heads), onnx, safetensors (this
project's own single file). `--checkpoint` takes a run or any file that
`interop.load.load_backbone_file` reads, or the results of eval.py: a fine-tuned or
probing classifier (hf, onnx, safetensors), a segmenter (onnx, safetensors).
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.backbone import Backbone, params_digest
from ultradino_jax.cli import boundary
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.sources import open_source
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.trained import load_trained
from ultradino_jax.exports.backbones import FORMATS, TARGETS, target_model, write
from ultradino_jax.exports.card import model_card, task_card
from ultradino_jax.exports.heads import run_facts, run_heads
from ultradino_jax.exports.onnx_backbone import to_channels_first
from ultradino_jax.exports.tasks import (
    load_task,
    task_logits,
    task_target,
    write_task,
)
from ultradino_jax.weights.load import load_backbone_file, with_channels

TOLERANCE = 1e-4  # of the largest feature, or absolute where features are below one
BATCHES = (1, 5, 2)  # sizes in which the target library sees the images
NO_TARGET = {
    "meta": "its code is not a Python package",
    "safetensors": "it is this project's own",
}


class ExportRefused(UserError):
    """An export did not compute what the checkpoint computes; nothing was written."""


def check_images(subject, folder: str | Path | None) -> np.ndarray:
    """Float32 [8,S,S,C], normalised: the first images of a folder, or phantoms.

    subject: a Backbone, Classifier or Segmenter.
    """
    count = sum(BATCHES)
    is_backbone = isinstance(subject, Backbone)
    preprocess = Preprocess.of(subject) if is_backbone else subject.preprocess
    channels = preprocess.channels
    source = (
        open_source(folder, channels=channels)
        if folder
        else PhantomSource(count, channels=channels)
    )
    rows = [preprocess.resize(source[i % len(source)]) for i in range(count)]
    return preprocess.normalise(np.stack(rows))


def our_features(backbone: Backbone, images: np.ndarray):
    """(CLS [B,D], patches [B,N,D]) in float32; images [B,S,S,C], normalised."""
    model = backbone.model.clone(dtype=jnp.float32)
    out = jax.jit(model.apply)({"params": backbone.params}, jnp.asarray(images))
    return np.asarray(out.cls_token), np.asarray(out.patch_tokens)


def our_outputs(subject, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared: 'cls' and 'patch' of a backbone, else 'logits'."""
    if isinstance(subject, Backbone):
        return dict(zip(("cls", "patch"), our_features(subject, images), strict=True))
    return {"logits": task_logits(subject, images)}


def _differences(ours: dict, theirs: dict, where: str) -> dict[str, float]:
    """Largest differences, by output. Raises ExportRefused above the tolerance."""
    found = {}
    for name, a in ours.items():
        b = theirs[name]
        if a.shape != b.shape:
            raise ExportRefused(f"{where}: {name} is {b.shape}, ours is {a.shape}")
        found[name] = float(np.abs(a - b).max())
        limit = TOLERANCE * max(1.0, float(np.abs(a).max()))
        if not found[name] <= limit:  # also when it is NaN
            what = name if name == "logits" else f"{name} features"
            raise ExportRefused(
                f"{where}: {what} differ by {found[name]:.2e}, more than "
                f"{limit:.1e}; nothing was written"
            )
    return found


def _check_reload(kind: str, folder: Path, subject, ours, images: np.ndarray) -> dict:
    if kind == "onnx":
        return {"verdict": "not possible from ONNX"}
    load = load_backbone_file if isinstance(subject, Backbone) else load_task
    again = our_outputs(load(folder), images)
    difference = _differences(ours, again, "loaded back here")
    equal = not any(difference.values())
    verdict = "bit-equal" if equal else f"within {max(difference.values()):.1e}"
    return {"verdict": verdict, "bit_equal": equal, "difference": difference}


def _check_target(kind: str, folder: Path, subject, ours, images: np.ndarray) -> dict:
    if kind not in TARGETS:
        return {"reason": NO_TARGET.get(kind, "")}
    target = target_model if isinstance(subject, Backbone) else task_target
    try:
        library, run = target(kind, folder)
    except ImportError as error:
        return {"reason": f"{TARGETS[kind]} is not usable here ({error})"}
    batches = np.split(to_channels_first(images), np.cumsum(BATCHES)[:-1])
    parts = [run(batch) for batch in batches]
    theirs = {name: np.concatenate([part[name] for part in parts]) for name in ours}
    difference = _differences(ours, theirs, library)
    return {"library": library, "difference": difference, "batches": list(BATCHES)}


def _subject(checkpoint, image_size: int | None, rgb: bool):
    """(Backbone, Classifier or Segmenter; facts of the evaluation that trained it)."""
    trained = load_trained(checkpoint)
    if trained is None:
        backbone = load_backbone_file(checkpoint, image_size=image_size)
        backbone = with_channels(backbone, 3 if rgb else backbone.channels)
        params = jax.tree.map(np.asarray, backbone.params)
        return dataclasses.replace(backbone, params=params), {}
    task, facts = trained
    if image_size is not None:
        raise UserError("--image-size is for backbones: a head knows one size only")
    if rgb:
        if not isinstance(task, Classifier):
            raise UserError("--rgb is for backbones and classifiers")
        backbone = with_channels(task.backbone, 3)
        task = dataclasses.replace(task, backbone=backbone)
    return task, facts


def export(
    checkpoint: str | Path,
    kind: str,
    out: str | Path,
    *,
    images: str | Path | None = None,
    image_size: int | None = None,
    rgb: bool = False,
    heads: bool = False,
    licence: str = "",
) -> dict:
    """Write a checkpoint in another library's format; returns export_report.json.

    checkpoint: what `load_backbone_file` reads, or results of an evaluation with kept
    models (`evaluators.trained`). kind: one of FORMATS. images: folder for the check,
    None renders phantoms. image_size: as for `load_backbone_file`. rgb: three input
    channels, the patch kernel repeated and divided by three. heads: the projection
    heads too ('meta', from a run). licence: SPDX id for the model card.

    The files are loaded back here and, when it is installed, run in the target library;
    `out` appears only when the outputs agree. Raises ExportRefused when they do not,
    FileExistsError when `out` is there and no earlier export, ImportError or UserError
    for what cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / "export_report.json").is_file():
        raise FileExistsError(f"{str(out)!r} exists and is not an earlier export")
    subject, facts = _subject(checkpoint, image_size, rgb)
    backbone = subject if isinstance(subject, Backbone) else subject.backbone
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        if isinstance(subject, Backbone):
            write(kind, subject, fresh, run_heads(checkpoint) if heads else None)
        elif heads:
            raise UserError("--heads is for the projection heads of a pretraining run")
        else:
            write_task(kind, subject, fresh)
        batch = check_images(subject, images)
        ours = our_outputs(subject, batch)
        report = {
            "format": kind,
            "kind": type(subject).__name__.lower(),
            "name": backbone.name,
            "parameters_sha256": digest(subject),
            "images": f"{len(batch)} of {'a folder' if images else 'the phantom'}",
            "image_size": backbone.image_size,
            "tolerance": TOLERANCE,
            "reload": _check_reload(kind, fresh, subject, ours, batch),
            "target": _check_target(kind, fresh, subject, ours, batch),
            "heads": heads,
        }
        if isinstance(subject, Backbone):
            card = model_card(kind, subject, run_facts(checkpoint), report, licence)
        else:
            report |= {"classes": list(subject.classes), "evaluation": facts}
            card = task_card(kind, subject, facts, report, licence)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (fresh / "export_report.json").write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return report


def digest(subject) -> str:
    """sha256 over all parameters: of the backbone, or of the whole trained model."""
    if isinstance(subject, Backbone):
        return subject.digest
    if isinstance(subject, Classifier):
        params = {"backbone": subject.backbone.params, "head": subject.head}
    else:
        params = dict(subject.variables)
    return params_digest(params)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("ultradino_jax.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run, results or file")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--images", help="folder of images for the check")
    parser.add_argument("--image-size", type=int, help="side in pixels; native if left")
    parser.add_argument("--rgb", action="store_true", help="three input channels")
    parser.add_argument("--heads", action="store_true", help="projection heads too")
    parser.add_argument("--license", default="", help="SPDX id for the model card")
    flags = parser.parse_args(argv)
    with boundary():
        report = export(
            flags.checkpoint,
            flags.format,
            flags.out,
            images=flags.images,
            image_size=flags.image_size,
            rgb=flags.rgb,
            heads=flags.heads,
            licence=flags.license,
        )
    target = report["target"]
    if "difference" in target:
        worst = max(target["difference"].values())
        what = "features" if report["kind"] == "backbone" else "logits"
        print(f"{target['library']} computes the same {what} within {worst:.1e}")
    else:
        print(f"NOT checked in its target library: {target['reason']}")
    if run := report.get("evaluation"):
        print(f"{run['row']}, seed {run['seed']}: validation {run['validation']:.4f}")
    print(f"{report['name']} written to {flags.out} ({report['reload']['verdict']})")


if __name__ == "__main__":
    main()
