"""What is exported: a backbone, classifier or segmenter, and what each computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.segmentation.segmenter import Segmenter
from ultradino_jax.models.upernet import UperNet
from ultradino_jax.weights.backbone import Backbone, params_digest

Subject = Backbone | Classifier | Segmenter


def kind_of(subject: Subject) -> str:
    """'backbone', 'classifier' or 'segmenter'."""
    return type(subject).__name__.lower()


def input_of(subject: Subject):
    """The Backbone or Network that says what the input is, and has a name."""
    return subject if isinstance(subject, Backbone) else subject.backbone


def vision_model(subject: Subject):
    """The module that turns images into tokens, or a network without one."""
    if isinstance(subject, Backbone):
        return subject.model
    if isinstance(subject, Classifier):
        return subject.backbone.model
    model = subject.model
    return model.backbone if isinstance(model, UperNet) else model


def preprocess_of(subject: Subject) -> Preprocess:
    """What makes its input of an image."""
    if isinstance(subject, Backbone):
        return Preprocess.of(subject)
    return subject.preprocess


@functools.partial(jax.jit, static_argnames=("model",))
def _compiled(model, variables, images):
    return model.apply(variables, images)


def _apply(model, variables, images):
    # From the host, so that where arrays came from does not compile it again.
    return _compiled(model, jax.tree.map(np.asarray, dict(variables)), images)


def our_features(backbone: Backbone, images: np.ndarray):
    """(CLS [B,D], patches [B,N,D]) in float32; images [B,S,S,C], normalised."""
    model = backbone.model.clone(dtype=jnp.float32, drop_path=0.0)
    out = _apply(model, {"params": backbone.params}, images)
    return np.asarray(out.cls_token), np.asarray(out.patch_tokens)


def task_logits(task: Classifier | Segmenter, images: np.ndarray) -> np.ndarray:
    """Normalised float32 [B,S,S,C] -> logits [B,Y], or [B,Y,S,S] of a segmenter."""
    if isinstance(task, Classifier):
        return task.logits(images)
    logits = _apply(task.model, task.variables, images)
    return np.moveaxis(np.asarray(logits), -1, 1)


def our_outputs(subject: Subject, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared: 'cls' and 'patch' of a backbone, else 'logits'."""
    if isinstance(subject, Backbone):
        return dict(zip(("cls", "patch"), our_features(subject, images), strict=True))
    return {"logits": task_logits(subject, images)}


def digest(subject: Subject) -> str:
    """sha256 over all parameters: of the backbone, or of the whole trained model."""
    if isinstance(subject, Backbone):
        return subject.digest
    if isinstance(subject, Classifier):
        params = {"backbone": subject.backbone.params, "head": subject.head}
    else:
        params = dict(subject.variables)
    return params_digest(params)
