"""Fine-tuning of a whole backbone for classification, as the paper's Table 1 does it.

Class token -> batch norm without gain -> linear layer; mixup, CutMix, label smoothing
and augmentation; AdamW in float32. The epoch of highest validation macro F1 is kept
(the reference's rule keeps the worst: it minimises an accuracy).
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ultradino_jax.backbone import Backbone
from ultradino_jax.checkpoint import RunCheckpoints
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
from ultradino_jax.evaluators.classification.recipe import (
    Plan,
    check_same_run,
    train_batches,
)
from ultradino_jax.evaluators.features import Preprocess, image_batches
from ultradino_jax.evaluators.progress import Progress
from ultradino_jax.optimizer import learning_rate_table, weight_decay_table
from ultradino_jax.schedules import warmup_cosine
from ultradino_jax.sharding import row_sharding

NORM_MOMENTUM = 0.1
# What the reference's config says and what its optimiser did: it builds groups with
# multipliers that AdamW does not read, and never passes the weight decay, so that
# torch's default applies to every parameter.
WEIGHT_DECAY = {"reference": 0.01, "intended": 0.0}


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


def normalise_batch(stats: NormStats, x, train: bool):
    """BatchNorm1d without gain on [B,D]: (normalised, new running statistics).

    A batch is normalised by its biased variance; the running variance is updated with
    the unbiased one, as torch does.
    """
    if train:
        mean, var = x.mean(axis=0), x.var(axis=0)
        unbiased = var * len(x) / (len(x) - 1)
        keep = 1 - NORM_MOMENTUM
        stats = NormStats(
            keep * stats.mean + NORM_MOMENTUM * mean,
            keep * stats.var + NORM_MOMENTUM * unbiased,
        )
    else:
        mean, var = stats
    return (x - mean) / jnp.sqrt(var + NORM_EPS), stats


def apply_head(head: dict, stats: NormStats, cls, train: bool):
    """Class tokens [B,D] -> (logits [B,Y], new running statistics)."""
    x, stats = normalise_batch(stats, cls, train)
    return x @ head["kernel"] + head["bias"], stats


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

    def scores(self, images: Iterable[np.ndarray], batch_size: int = 64):
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
    train: LabelledImages,
    val: LabelledImages,
    *,
    seed: int,
    workdir: str | Path,
    layerwise: str = "reference",
    learning_rate: float = 1e-4,
    layerwise_decay: float = 0.65,
    batch_size: int = 128,
    epochs: int = 200,
    warmup_epochs: int = 5,
    checkpoint_every: int = 10,
    preprocess: Preprocess | None = None,
    name: str = "fine-tune",
) -> FineTuned:
    """Train all parameters; the epoch of highest validation macro F1 is returned.

    The state is kept in `workdir` every `checkpoint_every` epochs, the result at the
    end in `workdir/classifier`: running it again goes on from there, or returns at once
    when it had ended. Raises UserError when the workdir belongs to another backbone,
    data set or setting.
    """
    model = backbone.model.clone(dtype=jnp.float32, drop_path=0.0)
    preprocess = preprocess or Preprocess.of(backbone)
    identity = {
        "backbone": backbone.digest,
        "train": train.split_hash(),
        "val": val.split_hash(),
        "settings": [seed, layerwise, learning_rate, layerwise_decay, batch_size,
                     epochs, warmup_epochs, preprocess.antialias],
    }  # fmt: skip
    workdir = Path(workdir)
    if (workdir / FOLDER).is_dir():
        kept, record = load_classifier(workdir)
        check_same_run(record["identity"], identity, workdir, "fine-tuning")
        return _tuned(model, preprocess, *_state_of(kept), record["history"])
    plan = Plan(
        len(train), batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs
    )
    optimizer = make_optimizer(
        plan.warmup,
        plan.total,
        learning_rate,
        layerwise,
        layerwise_decay=layerwise_decay,
    )
    num_classes = len(train.classes)
    by_row, everywhere = row_sharding(plan.batch_size)
    state = _initial_state(backbone, optimizer, num_classes, seed)
    state = jax.device_put(state, everywhere)
    best = jax.tree.map(jnp.copy, state[:2])
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=1)
    try:
        state, best, history = _restore(checkpoints, state, best, identity)
        progress = Progress(name, plan.steps, unit="step")
        step = len(history) * plan.steps_per_epoch
        batches = train_batches(train, preprocess, plan, seed=seed, start_step=step)
        losses = []
        for batch in batches:
            batch = (*jax.device_put(batch[:2], by_row), batch[2])
            state, loss = _step(model, preprocess, num_classes, optimizer, state, batch)
            losses.append(loss)
            step += 1
            if len(losses) % 10 == 0:  # the host must not run far ahead of the device
                jax.block_until_ready(loss)
            progress.update(step)
            if step % plan.steps_per_epoch:
                continue
            tuned = FineTuned(model, preprocess, *state[:2], 0, 0.0, history)
            f1 = validation_f1(tuned, val)
            mean_loss = float(np.mean(jax.device_get(losses)))
            losses = []
            epoch = len(history)
            if not np.isfinite(mean_loss):
                raise UserError(f"{name}: the loss is not finite in epoch {epoch}")
            if not history or f1 > max(h["val_macro_f1"] for h in history):
                best = jax.tree.map(jnp.copy, state[:2])
            history.append({"epoch": epoch, "loss": mean_loss, "val_macro_f1": f1})
            if len(history) % checkpoint_every == 0 and len(history) < epochs:
                tree = {"state": state, "best": best}
                meta = {"identity": identity, "history": history}
                checkpoints.save(len(history), tree, meta)
        progress.close()
        checkpoints.wait()
    finally:
        checkpoints.close()
    params, stats = jax.device_get(best)
    facts = {"identity": identity, "history": history}
    _keep(workdir, backbone, params, stats, train.classes, preprocess, facts)
    return _tuned(model, preprocess, params, stats, history)


def _keep(workdir, backbone, params, stats, classes, preprocess, facts) -> None:
    """The trained model in place of the training state, which was for resuming."""
    head = {**params["head"], **stats._asdict()}
    trained = dataclasses.replace(backbone, params=params["backbone"])
    classifier = Classifier(
        trained, head, 1, False, tuple(classes), preprocess.antialias
    )
    save_classifier(workdir / FOLDER, classifier, **facts)
    shutil.rmtree(workdir / "checkpoints")


def _tuned(model, preprocess, params, stats, history) -> FineTuned:
    scores = [h["val_macro_f1"] for h in history]
    kept = int(np.argmax(scores))  # the first of equals
    return FineTuned(model, preprocess, params, stats, kept, scores[kept], history)


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


def _restore(checkpoints, state, best, identity):
    """(state, best, history) of the newest checkpoint, or those given and []."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"state": state, "best": best},
    )
    restored = checkpoints.restore(abstract)
    if restored is None:
        return state, best, []
    tree, meta = restored
    check_same_run(meta["identity"], identity, checkpoints.directory, "fine-tuning")
    return tree["state"], tree["best"], list(meta["history"])


def validation_f1(tuned: FineTuned, val: LabelledImages) -> float:
    """Macro F1 on labelled images."""
    predicted = tuned.scores(val).argmax(axis=1)
    return float(macro_f1(confusion_matrix(val.labels, predicted, len(val.classes))))
