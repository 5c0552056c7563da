"""Exports that were checked: loaded back, and run in the library they are for."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np

from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.sources import open_source
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.trained import load_trained
from ultradino_jax.exports.card import model_card, task_card
from ultradino_jax.exports.format import Format
from ultradino_jax.exports.formats import FORMATS, load_task, write
from ultradino_jax.exports.heads import run_facts, run_heads
from ultradino_jax.exports.onnx_backbone import to_channels_first
from ultradino_jax.exports.subject import (
    Subject,
    digest,
    input_of,
    kind_of,
    our_outputs,
    preprocess_of,
)
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import load_backbone, with_channels
from ultradino_jax.whole import whole_folder, write_json

TOLERANCE = 1e-4  # of the largest feature, or absolute where features are below one
BATCHES = (1, 5, 2)  # sizes in which the target library sees the images
REPORT = "export_report.json"


class ExportRefused(UserError):
    """An export did not compute what the checkpoint computes; nothing was written."""


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

    checkpoint: what `load_backbone` reads, or results of an evaluation with kept models
    (`evaluators.trained`). kind: one of FORMATS. images: folder for the check, None
    renders phantoms. image_size: as for `load_backbone`. rgb: three input channels, the
    patch kernel repeated and divided by three. heads: the projection heads too ('meta',
    from a run). licence: SPDX id for the model card.

    The files are loaded back here and, when it is installed, run in the target library;
    `out` appears only when the outputs agree. Raises ExportRefused when they do not,
    FileExistsError when `out` is there and no earlier export, MissingPackage or
    UserError for what cannot be written.
    """
    if not re.fullmatch(r"[\w.+() -]*", licence, re.ASCII):
        raise UserError(f"licence {licence!r}: an SPDX id has letters, digits and .+-")
    out = Path(out).absolute()
    if out.exists() and not (out / REPORT).is_file():
        raise FileExistsError(f"{str(out)!r} exists and is not an earlier export")
    subject, facts = _subject(checkpoint, image_size, rgb)
    is_backbone = isinstance(subject, Backbone)
    if heads and not is_backbone:
        raise UserError("--heads is for the projection heads of a pretraining run")
    with whole_folder(out) as fresh:
        write(kind, subject, fresh, run_heads(checkpoint) if heads else None)
        form, batch = FORMATS[kind], check_images(subject, images)
        ours = our_outputs(subject, batch)
        report = {
            "format": kind,
            "kind": kind_of(subject),
            "name": input_of(subject).name,
            "parameters_sha256": digest(subject),
            "images": f"{len(batch)} of {'a folder' if images else 'the phantom'}",
            "image_size": input_of(subject).image_size,
            "tolerance": TOLERANCE,
            "reload": _check_reload(kind, fresh, subject, ours, batch),
            "target": _check_target(form, fresh, subject, ours, batch),
            "heads": heads,
        }
        if is_backbone:
            card = model_card(form, subject, run_facts(checkpoint), report, licence)
        else:
            report |= {"classes": list(subject.classes), "evaluation": facts}
            card = task_card(form, subject, facts, report, licence)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        write_json(fresh / REPORT, report)
    return report


def _subject(checkpoint, image_size: int | None, rgb: bool) -> tuple[Subject, dict]:
    """(what is exported, facts of the evaluation that trained it)."""
    trained = load_trained(checkpoint)
    if trained is None:
        channels = 3 if rgb else None
        backbone = load_backbone(checkpoint, image_size=image_size, channels=channels)
        params = jax.tree.map(np.asarray, backbone.params)
        return dataclasses.replace(backbone, params=params), {}
    task, facts = trained
    if image_size:
        raise UserError("--image-size is for backbones: a head knows one size only")
    if rgb:
        if not isinstance(task, Classifier):
            raise UserError("--rgb is for backbones and classifiers")
        backbone = with_channels(task.backbone, 3)
        task = dataclasses.replace(task, backbone=backbone)
    return task, facts


def check_images(subject: Subject, folder: str | Path | None) -> np.ndarray:
    """Float32 [8,S,S,C], normalised: the first images of a folder, or phantoms."""
    count, preprocess = sum(BATCHES), preprocess_of(subject)
    channels = preprocess.channels
    source = (
        open_source(folder, channels=channels)
        if folder
        else PhantomSource(count, channels=channels)
    )
    rows = [preprocess.resize(source[i % len(source)]) for i in range(count)]
    return preprocess.normalise(np.stack(rows))


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
    if not FORMATS[kind].loads_back:
        return {"verdict": f"not possible from {kind.upper()}"}
    load = load_backbone if isinstance(subject, Backbone) else load_task
    again = our_outputs(load(folder), images)
    difference = _differences(ours, again, "loaded back here")
    equal = not any(difference.values())
    verdict = "bit-equal" if equal else f"within {max(difference.values()):.1e}"
    return {"verdict": verdict, "bit_equal": equal, "difference": difference}


def _check_target(
    form: Format, folder: Path, subject, ours, images: np.ndarray
) -> dict:
    if form.target is None:
        return {"reason": form.no_target}
    try:
        library, run = form.target(folder, kind_of(subject))
    except ImportError as error:
        return {"reason": f"{form.library} is not usable here ({error})"}
    batches = np.split(to_channels_first(images), np.cumsum(BATCHES)[:-1])
    parts = [run(batch) for batch in batches]
    theirs = {name: np.concatenate([part[name] for part in parts]) for name in ours}
    difference = _differences(ours, theirs, library)
    return {"library": library, "difference": difference, "batches": list(BATCHES)}
