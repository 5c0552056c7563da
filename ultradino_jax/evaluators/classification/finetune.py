"""Fine-tuning of a whole backbone for classification, as the paper's Table 1 does it.

Class token -> batch norm without gain -> linear layer; mixup, CutMix, label smoothing
and augmentation; AdamW in float32. The epoch of highest validation macro F1 is kept
(the reference's rule keeps the worst: it minimises an accuracy).
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ultradino_jax.data.datasets.labelled import LabelledImages
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import (
    FOLDER,
    NORM_EPS,
    Classifier,
    load_classifier,
    save_classifier,
)
from ultradino_jax.evaluators.classification.metrics import confusion_matrix, macro_f1
from ultradino_jax.evaluators.classification.mixup import (
    mix_images,
    mix_targets,
    soft_cross_entropy,
)
from ultradino_jax.evaluators.classification.recipe import Plan, train_batches
from ultradino_jax.evaluators.features import Numbered, Preprocess, image_batches
from ultradino_jax.evaluators.training import Job, best_figure, train
from ultradino_jax.models.layers import NORM_MOMENTUM, batch_norm
from ultradino_jax.optimizer import learning_rate_table, weight_decay_table
from ultradino_jax.schedules import warmup_cosine
from ultradino_jax.sharding import row_sharding
from ultradino_jax.weights.backbone import Backbone

METRIC = "val_macro_f1"
# What the reference's config says and what its optimiser did: it builds groups with
# multipliers that AdamW does not read, and never passes the weight decay, so that
# torch's default applies to every parameter.
WEIGHT_DECAY = {"reference": 0.01, "intended": 0.0}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a backbone is fine-tuned; by default as the paper does it.

    layerwise: see `make_optimizer`. checkpoint_every: epochs.
    """

    layerwise: str = "reference"
    learning_rate: float = 1e-4
    layerwise_decay: float = 0.65
    batch_size: int = 128
    epochs: int = 200
    warmup_epochs: int = 5
    checkpoint_every: int = 10


# The order in which settings were recorded before they had names.
LISTED = ("seed", "layerwise", "learning_rate", "layerwise_decay", "batch_size",
          "epochs", "warmup_epochs", "antialias")  # fmt: skip


def named_settings(listed: list) -> dict[str, Any]:
    """{name: value} of settings that were recorded as a list."""
    return dict(zip(LISTED, listed, strict=True))


class NormStats(NamedTuple):
    """Running mean and variance [D] of the head's batch norm."""

    mean: jax.Array
    var: jax.Array


class FinetuneState(NamedTuple):
    """params {'backbone', 'head': {'kernel' [D,Y], 'bias' [Y]}}, and their training."""

    params: Any
    stats: NormStats
    opt_state: Any


def init_head(key, d: int, num_classes: int) -> dict:
    """torch's default Linear: kernel and bias from U(-1/sqrt(D), 1/sqrt(D))."""
    bound = d**-0.5
    k, b = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(k, (d, num_classes), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(b, (num_classes,), minval=-bound, maxval=bound),
    }


def apply_head(head: dict, stats: NormStats, cls, train: bool):
    """Class tokens [B,D] -> (logits [B,Y], new running statistics)."""
    x, mean, var = batch_norm(
        cls, *stats, train=train, eps=NORM_EPS, momentum=NORM_MOMENTUM
    )
    return x @ head["kernel"] + head["bias"], NormStats(mean, var)


@functools.cache  # one object per setting, so that seeds share a compiled step
def make_optimizer(
    warmup: int,
    total: int,
    learning_rate: float,
    layerwise: str,
    *,
    layerwise_decay: float = 0.65,
    patch_embed_multiplier: float = 0.2,
) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8) with `warmup_cosine` over steps.

    layerwise: 'reference' gives every parameter one rate and a decay of 0.01;
    'intended' applies layer-wise rates and no decay. Raises UserError for another.
    """
    if layerwise not in WEIGHT_DECAY:
        raise UserError(f"layerwise={layerwise!r}: choose 'reference' or 'intended'")

    def scale_by_layer(updates, state, params=None):
        table = learning_rate_table(
            params,
            layerwise_decay=layerwise_decay,
            patch_embed_multiplier=patch_embed_multiplier,
        )
        return jax.tree.map(jnp.multiply, updates, table), state

    intended = layerwise == "intended"
    by_layer = optax.GradientTransformation(
        lambda params: optax.EmptyState(), scale_by_layer
    )
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            WEIGHT_DECAY[layerwise], mask=decayed if intended else None
        ),
        by_layer if intended else optax.identity(),
        optax.scale_by_schedule(
            lambda step: -learning_rate * warmup_cosine(step, warmup, total)
        ),
    )


def decayed(params):
    """True where weight decay is meant to apply."""
    return jax.tree.map(bool, weight_decay_table(params))


@functools.partial(
    jax.jit,
    static_argnames=("model", "preprocess", "num_classes", "optimizer"),
    donate_argnames=("state",),
)
def _step(model, preprocess, num_classes, optimizer, state: FinetuneState, batch):
    """Images uint8 [B,S,S,C], labels [B] and their mix -> (state, loss)."""
    images, labels, mix = batch
    x = mix_images(preprocess.normalise(images), mix)
    targets = mix_targets(labels, mix, num_classes)

    def loss_fn(params):
        cls = model.apply({"params": params["backbone"]}, x).cls_token
        logits, stats = apply_head(params["head"], state.stats, cls, train=True)
        return soft_cross_entropy(logits, targets).mean(), stats

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return FinetuneState(params, stats, opt_state), loss


@functools.partial(jax.jit, static_argnames=("model", "preprocess"))
def _scores(model, preprocess, params, stats, images):
    x = preprocess.normalise(images)
    cls = model.apply({"params": params["backbone"]}, x).cls_token
    return jax.nn.softmax(apply_head(params["head"], stats, cls, train=False)[0])


class FineTuned(NamedTuple):
    """The kept model and how it was found."""

    model: Any
    preprocess: Preprocess
    params: Any
    stats: NormStats
    best_epoch: int
    val_f1: float
    history: list  # one {"epoch", "loss", "val_macro_f1"} per epoch

    def scores(self, images: Iterable[np.ndarray] | Numbered, batch_size: int = 64):
        """Class probabilities [n,Y] of images."""
        by_row, everywhere = row_sharding(batch_size)
        params, stats = jax.device_put((self.params, self.stats), everywhere)
        parts = []
        for batch, valid in image_batches(self.preprocess, images, batch_size):
            batch = jax.device_put(batch, by_row)
            x = _scores(self.model, self.preprocess, params, stats, batch)
            parts.append(np.asarray(x)[:valid])
        return np.concatenate(parts)


def finetune(
    backbone: Backbone,
    images: LabelledImages,
    val: LabelledImages,
    recipe: Recipe,
    *,
    seed: int,
    workdir: str | Path,
    preprocess: Preprocess | None = None,
    name: str = "fine-tune",
) -> FineTuned:
    """Train all parameters on `images`; the epoch of highest macro F1 on `val` is kept.

    The state is kept in `workdir` while it trains, the result at the end in
    `workdir/classifier`: running it again goes on from there, or returns at once when
    it had ended. Raises UserError when the workdir belongs to another backbone, data
    set or setting.
    """
    preprocess = preprocess or Preprocess.of(backbone)
    plan = Plan(
        len(images),
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
    )
    identity = _identity(backbone, images, val, recipe, seed, preprocess)
    job = _job(plan, recipe, identity, Path(workdir), name)
    model = backbone.model.clone(dtype=jnp.float32, drop_path=0.0)
    if (job.workdir / FOLDER).is_dir():
        kept, record = load_classifier(job.workdir)
        job.check(record["identity"])
        return _tuned(model, preprocess, *_state_of(kept), record["history"])
    optimizer = make_optimizer(
        plan.warmup,
        plan.total,
        recipe.learning_rate,
        recipe.layerwise,
        layerwise_decay=recipe.layerwise_decay,
    )
    classes = images.classes
    by_row, everywhere = row_sharding(plan.batch_size)
    state = _initial_state(backbone, optimizer, len(classes), seed)

    def step(state, batch, k):
        del k
        batch = (*jax.device_put(batch[:2], by_row), batch[2])
        return _step(model, preprocess, len(classes), optimizer, state, batch)

    def validate(state):
        now = FineTuned(model, preprocess, state.params, state.stats, 0, 0.0, [])
        return validation_f1(now, val)

    def batches(k):
        return train_batches(images, preprocess, plan, seed=seed, start_step=k)

    (params, stats), history = train(
        job,
        jax.device_put(state, everywhere),
        best_of=lambda state: (state.params, state.stats),
        step=step,
        batches=batches,
        validate=validate,
    )
    history = [
        {"epoch": epoch, "loss": row["loss"], METRIC: row[METRIC]}
        for epoch, row in enumerate(history)
    ]
    head = {**params["head"], **stats._asdict()}
    trained = dataclasses.replace(backbone, params=params["backbone"])
    kept = Classifier(trained, head, 1, False, classes, preprocess.antialias)
    facts = {"identity": job.identity, "history": history}
    save_classifier(job.workdir / FOLDER, kept, **facts)
    job.clear()
    return _tuned(model, preprocess, params, stats, history)


def _identity(backbone, images, val, recipe, seed, preprocess) -> dict:
    settings = {"seed": seed, **dataclasses.asdict(recipe)}
    del settings["checkpoint_every"]  # changes no number
    return {
        "backbone": backbone.digest,
        "train": images.split_hash(),
        "val": val.split_hash(),
        "settings": {**settings, "antialias": preprocess.antialias},
    }


def _job(plan: Plan, recipe: Recipe, identity: dict, workdir: Path, name: str) -> Job:
    return Job(
        name=name,
        what="a fine-tuning",
        workdir=workdir,
        identity=identity,
        named=named_settings,
        metric=METRIC,
        steps=plan.steps,
        validate_every=plan.steps_per_epoch,
        checkpoint_every=recipe.checkpoint_every,
    )


def _tuned(model, preprocess, params, stats, history) -> FineTuned:
    f1 = best_figure(METRIC, history)
    kept = [row[METRIC] for row in history].index(f1)  # the first of equals
    return FineTuned(model, preprocess, params, stats, kept, f1, history)


def _state_of(classifier: Classifier):
    """(params, stats) as they were trained."""
    head = {k: classifier.head[k] for k in ("kernel", "bias")}
    stats = NormStats(*(jnp.asarray(classifier.head[k]) for k in ("mean", "var")))
    return {"backbone": classifier.backbone.params, "head": head}, stats


def _initial_state(backbone, optimizer, num_classes, seed) -> FinetuneState:
    d = backbone.model.embed_dim
    head = init_head(jax.random.key(seed), d, num_classes)
    params = {"backbone": jax.tree.map(jnp.copy, backbone.params), "head": head}
    stats = NormStats(jnp.zeros(d), jnp.ones(d))
    return FinetuneState(params, stats, optimizer.init(params))


def validation_f1(tuned: FineTuned, val: LabelledImages) -> float:
    """Macro F1 on labelled images."""
    predicted = tuned.scores(val).argmax(axis=1)
    return float(macro_f1(confusion_matrix(val.labels, predicted, len(val.classes))))
