"""A trained classifier with everything needed to feed it, and its folder."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.features import Numbered, Preprocess, probe_tokens
from ultradino_jax.models.usfm import USFM
from ultradino_jax.weights.backbone import Backbone, save_backbone
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.whole import read_json, whole_folder, write_json

RECORD = "classifier.json"
FOLDER = "classifier"
# What `probe_tokens` gives; 1, which was not recorded, differed for USFM.
FEATURES = 2
CHECKED, TOLERANCE = 16, 1e-2  # images, and their probabilities in float32
NORM_EPS = 1e-6  # of the batch norm between a fine-tuned backbone and its head


@functools.partial(jax.jit, static_argnames=("model", "layers", "patch"))
def _logits(model, params, kernel, bias, images, layers, patch):
    cls, mean_patch = probe_tokens(model, params, images, layers)
    x = cls.reshape(len(images), -1)
    x = jnp.concatenate([x, mean_patch], axis=1) if patch else x
    return jnp.matmul(x, kernel, precision="highest") + bias


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A backbone and a linear layer on its final-normed tokens.

    head: 'kernel' [F,Y] and 'bias' [Y] of the layer and, of a fine-tuned model, 'mean'
    and 'var' [F] of the batch norm without gain in front of it. layers: class tokens of
    how many last blocks it sees, oldest first; patch: whether the mean patch token
    follows them. classes: Y names. antialias: as in `Preprocess`.
    """

    backbone: Backbone
    head: dict[str, np.ndarray]
    layers: int
    patch: bool
    classes: tuple[str, ...]
    antialias: bool = False

    @property
    def preprocess(self) -> Preprocess:
        """What it was trained and tested with."""
        return Preprocess.of(self.backbone, antialias=self.antialias)

    @property
    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """(kernel [F,Y], bias [Y]), the batch norm folded in: W/s and b - mean W/s."""
        kernel, bias = (np.asarray(self.head[k]) for k in ("kernel", "bias"))
        if "mean" not in self.head:
            return kernel, bias
        scale = np.sqrt(np.asarray(self.head["var"], np.float64) + NORM_EPS)
        folded = kernel / scale[:, None]
        shifted = bias - np.asarray(self.head["mean"], np.float64) @ folded
        return folded.astype(np.float32), shifted.astype(np.float32)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Normalised float32 [B,S,S,C] -> [B,Y]."""
        model = self.backbone.model.clone(dtype=jnp.float32)
        params = self.backbone.params
        args = (model, params, *self.linear, jnp.asarray(images))
        return np.asarray(_logits(*args, layers=self.layers, patch=self.patch))


def check_scores(classifier: Classifier, images: Numbered, scores: np.ndarray) -> None:
    """Compare with the scores that were reported, on the first images of the test set.

    images: those that gave the probabilities `scores` [n,Y]. Raises UserError when
    the classifier, as it will be kept, gives others.
    """
    count = min(CHECKED, len(images))
    preprocess = classifier.preprocess
    batch = np.stack([preprocess.resize(images[i]) for i in range(count)])
    found = np.asarray(jax.nn.softmax(classifier.logits(preprocess.normalise(batch))))
    apart = float(np.abs(found - scores[:count]).max())
    if not apart < TOLERANCE:  # also when it is NaN
        raise UserError(
            f"{classifier.backbone.name}: the classifier to keep gives other "
            f"probabilities than were scored, by up to {apart:.3f}; it is not kept"
        )


def save_classifier(
    folder: str | Path,
    classifier: Classifier,
    *,
    checkpoint: str | Path | None = None,
    **facts,
) -> None:
    """Write head.npz, classifier.json and, without `checkpoint`, the backbone.

    checkpoint: where a frozen backbone was read from; it is named, not copied, and read
    again from there. facts: JSON values kept in the record. The folder appears once it
    is complete.
    """
    backbone = classifier.backbone
    record = {
        "format": "ultradino_classifier",
        "classes": list(classifier.classes),
        "layers": classifier.layers,
        "patch": classifier.patch,
        "antialias": classifier.antialias,
        "features": FEATURES,
        "backbone": {
            "checkpoint": checkpoint and str(Path(checkpoint).absolute()),
            "digest": backbone.digest,
            "image_size": backbone.image_size,
            "channels": backbone.channels,
        },
        **facts,
    }
    with whole_folder(folder) as fresh:
        if checkpoint is None:
            save_backbone(fresh / "backbone", backbone)
        np.savez(fresh / "head.npz", allow_pickle=False, **classifier.head)
        write_json(fresh / RECORD, record)


def load_classifier(path: str | Path) -> tuple[Classifier, dict]:
    """(classifier, its record) from its folder, or the run's folder above it.

    Raises FileNotFoundError when there is none or its backbone is gone, and UserError
    when the backbone is no longer the one it was trained on.
    """
    path = Path(path).absolute()
    for folder in (path, path / FOLDER):
        if (folder / RECORD).is_file():
            break
    else:
        raise FileNotFoundError(f"no {RECORD} in {str(path)!r} or its folder {FOLDER}")
    record = read_json(folder / RECORD)
    with damaged(folder):
        wanted = record["backbone"]
        sizes: dict[str, Any] = {k: int(wanted[k]) for k in ("image_size", "channels")}
        options = {k: record[k] for k in ("layers", "patch", "antialias")}
        classes, digest = tuple(record["classes"]), str(wanted["digest"])
        named = wanted["checkpoint"] is not None
        place = Path(wanted["checkpoint"]) if named else folder / "backbone"
        with np.load(folder / "head.npz") as arrays:
            head = dict(arrays)
    if named and not place.exists():
        raise FileNotFoundError(
            f"the backbone of {str(folder)!r} is no longer at {str(place)!r}: correct "
            f"the path in {RECORD}"
        )
    backbone = load_backbone(place, **sizes)
    if backbone.digest != digest:
        raise UserError(
            f"{str(folder)!r} was trained on a backbone of digest {digest[:12]}; "
            f"{str(place)!r} now holds {backbone.digest[:12]}"
        )
    classifier = Classifier(backbone, head, classes=classes, **options)
    check_features(classifier, record, folder)
    return classifier, record


def check_features(classifier: Classifier, record: dict, place: str | Path) -> None:
    """Raises UserError for a probe of USFM from when its features had two meanings."""
    fine_tuned = "mean" in classifier.head
    usfm = isinstance(classifier.backbone.model, USFM)
    if usfm and not fine_tuned and record.get("features") != FEATURES:
        raise UserError(
            f"{str(place)!r} holds a probe of a USFM as it was once kept, which does "
            "not give the scores that were reported; run the evaluation again"
        )
