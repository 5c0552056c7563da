"""Linear probe: a grid of linear classifiers trained together on frozen features.

Heads differ in learning rate, in how many last blocks they see and in whether they see
the mean patch token. All share one feature vector, [CLS of the last L blocks, mean
patch token]: a head that sees less has zeros in the rest of its weights and in their
gradients, so all heads are columns of one matrix and one product serves them all.
Protocol: DINOv2 `eval/linear.py` as UltraDINO runs it on FETAL_PLANES_DB.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.data.datasets.labelled import LabelledImages
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.evaluators.classification.mixup import (
    mix_images,
    mix_targets,
    soft_cross_entropy,
)
from ultradino_jax.evaluators.classification.recipe import (
    Plan,
    epoch_order,
    train_batches,
)
from ultradino_jax.evaluators.features import Features, Preprocess, probe_tokens
from ultradino_jax.progress import Progress
from ultradino_jax.schedules import warmup_cosine
from ultradino_jax.sharding import row_sharding
from ultradino_jax.weights.backbone import Backbone

# fmt: off
LEARNING_RATES = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1
)
# fmt: on
NUM_LAYERS = (1, 4)
MOMENTUM = 0.9


class Head(NamedTuple):
    """One classifier of the grid."""

    num_layers: int
    avgpool: bool
    learning_rate: float


def head_grid(
    depth: int, has_patches: bool = True, learning_rates: Sequence[float] = ()
) -> list[Head]:
    """The grid in the reference's order, which decides ties: 52 heads.

    A model of fewer than 4 blocks uses those it has; one without patch tokens has no
    avgpool variant.
    """
    blocks = sorted({min(n, depth) for n in NUM_LAYERS})
    pools = (False, True) if has_patches else (False,)
    rates = tuple(learning_rates) or LEARNING_RATES
    return [Head(n, a, lr) for n in blocks for a in pools for lr in rates]


class HeadState(NamedTuple):
    """kernel [F,K,Y] and bias [K,Y] of K heads, and their momentum."""

    kernel: jax.Array
    bias: jax.Array
    kernel_momentum: jax.Array
    bias_momentum: jax.Array


def head_mask(heads: Sequence[Head], layers: int, d: int, patch_d: int) -> np.ndarray:
    """float32 [F,K]: which of the F = layers*d + patch_d features a head sees."""
    mask = np.zeros((layers * d + patch_d, len(heads)), np.float32)
    for k, head in enumerate(heads):
        mask[(layers - head.num_layers) * d : layers * d, k] = 1
        mask[layers * d :, k] = head.avgpool
    return mask


def init_heads(mask: np.ndarray, num_classes: int, seed: int) -> HeadState:
    """Weights N(0, 0.01^2), biases and momentum 0."""
    key = jax.random.key(seed)
    kernel = 0.01 * jax.random.normal(key, (*mask.shape, num_classes))
    kernel = kernel * mask[:, :, None]
    bias = jnp.zeros(kernel.shape[1:])
    return HeadState(kernel, bias, jnp.zeros_like(kernel), jnp.zeros_like(bias))


def head_logits(kernel, bias, features):
    """[F,K,Y], [K,Y], features [B,F] -> [B,K,Y]."""
    return jnp.einsum("bf,fky->bky", features, kernel, precision="highest") + bias


def heads_step(state: HeadState, features, targets, mask, learning_rates):
    """One SGD step of all heads: (state, losses [K] before it).

    features [B,F], targets [B,Y] (probabilities), mask [F,K], learning_rates [K] of
    this step. The sum of the heads' mean cross entropies is minimised with momentum:
    v <- 0.9 v + g, p <- p - lr v.
    """

    def total(kernel, bias):
        logits = head_logits(kernel, bias, features)
        losses = soft_cross_entropy(logits, targets[:, None]).mean(axis=0)
        return losses.sum(), losses

    grads, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(
        state.kernel, state.bias
    )
    vk = MOMENTUM * state.kernel_momentum + grads[0] * mask[:, :, None]
    vb = MOMENTUM * state.bias_momentum + grads[1]
    rates = learning_rates[:, None]
    return HeadState(state.kernel - rates * vk, state.bias - rates * vb, vk, vb), losses


@functools.partial(jax.jit, static_argnames=("warmup", "total"))
def _train_cached(state, features, targets, rows, mask, rates, warmup, total):
    """All steps as one program: rows int [steps,B] index features and targets."""

    def body(carry, x):
        step, index = x
        factor = warmup_cosine(step, warmup, total)
        return heads_step(carry, features[index], targets[index], mask, rates * factor)

    steps = jnp.arange(len(rows))
    return jax.lax.scan(body, state, (steps, rows))


@functools.partial(
    jax.jit, static_argnames=("model", "preprocess", "layers", "num_classes")
)
def _paper_step(
    model, params, preprocess, layers, num_classes, state, batch, mask, rates
):
    """Augmented images uint8 [B,S,S,C] -> mixed -> frozen features -> one step."""
    images, labels, mix = batch
    x = mix_images(preprocess.normalise(images), mix)
    cls, patch = probe_tokens(model, params, x, layers)
    features = jnp.concatenate([cls.reshape(len(images), -1), patch], axis=1)
    targets = mix_targets(labels, mix, num_classes)
    return heads_step(state, features, targets, mask, rates)


class LinearProbe(NamedTuple):
    """The selected head: kernel [F,Y] and bias [Y] on the last `layers` blocks."""

    kernel: np.ndarray
    bias: np.ndarray
    layers: int
    head: Head
    val_accuracy: float

    def scores(self, features: Features) -> np.ndarray:
        """Class probabilities [n,Y]."""
        x = features.assemble(self.layers, True)
        return np.asarray(jax.nn.softmax(x @ self.kernel + self.bias))


def probe_classifier(
    probe: LinearProbe, backbone: Backbone, classes: Sequence[str], antialias: bool
) -> Classifier:
    """The probe with its backbone, only the features that it sees kept."""
    n, avgpool, d = *probe.head[:2], backbone.model.embed_dim
    cls_end = probe.layers * d
    rows = slice(cls_end - n * d, None if avgpool else cls_end)
    head = {"kernel": probe.kernel[rows], "bias": probe.bias}
    return Classifier(backbone, head, n, avgpool, tuple(classes), antialias)


def select(
    state: HeadState, heads: Sequence[Head], layers: int, val: Features, labels
) -> LinearProbe:
    """The head of highest validation accuracy; the first of equals."""
    x = jnp.asarray(val.assemble(layers, True))
    predicted = np.asarray(head_logits(state.kernel, state.bias, x).argmax(axis=-1))
    accuracies = (predicted == np.asarray(labels)[:, None]).mean(axis=0)
    best = int(accuracies.argmax())
    return LinearProbe(
        np.asarray(state.kernel[:, best]),
        np.asarray(state.bias[best]),
        layers,
        heads[best],
        float(accuracies[best]),
    )


def fit_cached(
    train: Features,
    train_labels,
    val: Features,
    val_labels,
    *,
    num_classes: int,
    heads: Sequence[Head],
    seed: int,
    batch_size: int = 128,
    epochs: int = 10,
    warmup_epochs: int = 5,
) -> LinearProbe:
    """Train on features that were extracted once, with hard labels, and select.

    Raises UserError when a label is outside of the head.
    """
    check_labels(train_labels, num_classes)
    layers = max(h.num_layers for h in heads)
    n = len(train)
    plan = Plan(n, batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs)
    rows = np.concatenate([epoch_order(n, plan, seed, e) for e in range(epochs)])
    mask = head_mask(heads, layers, train.cls.shape[2], train.mean_patch.shape[1])
    state, _ = _train_cached(
        init_heads(mask, num_classes, seed),
        jnp.asarray(train.assemble(layers, True)),
        jax.nn.one_hot(train_labels, num_classes),
        rows,
        mask,
        jnp.array([h.learning_rate for h in heads]),
        plan.warmup,
        plan.total,
    )
    return select(state, heads, layers, val, val_labels)


def fit_paper(
    backbone: Backbone,
    train: LabelledImages,
    val: Features,
    val_labels,
    *,
    heads: Sequence[Head],
    seed: int,
    batch_size: int = 128,
    epochs: int = 10,
    warmup_epochs: int = 5,
    preprocess: Preprocess | None = None,
    name: str = "linear probe",
) -> LinearProbe:
    """Train as the paper does: augmented, mixed images through the frozen backbone."""
    num_classes = len(train.classes)
    layers = max(h.num_layers for h in heads)
    plan = Plan(
        len(train), batch_size=batch_size, epochs=epochs, warmup_epochs=warmup_epochs
    )
    mask = head_mask(heads, layers, val.cls.shape[2], val.mean_patch.shape[1])
    state = init_heads(mask, num_classes, seed)
    rates = np.array([h.learning_rate for h in heads], np.float32)
    preprocess = preprocess or Preprocess.of(backbone)
    model = backbone.model.clone(dtype=jnp.float32)
    by_row, everywhere = row_sharding(plan.batch_size)
    params = jax.device_put(backbone.params, everywhere)
    progress = Progress(name, plan.steps, unit="step")
    batches = train_batches(train, preprocess, plan, seed=seed)
    for step, (images, labels, mix) in enumerate(batches):
        batch = (*jax.device_put((images, labels), by_row), mix)
        state, losses = _paper_step(
            model,
            params,
            preprocess,
            layers,
            num_classes,
            state,
            batch,
            mask,
            rates * float(plan.factor(step)),
        )
        if step % 10 == 0:  # keep the host from running far ahead of the device
            jax.block_until_ready(losses)
        progress.update(step + 1)
    progress.close()
    return select(state, heads, layers, val, val_labels)


def check_labels(labels, num_classes: int) -> None:
    """Raises UserError when a label does not fit a head of `num_classes` outputs."""
    labels = np.asarray(labels)
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(
            f"labels span {labels.min()}..{labels.max()}, the head has {num_classes} "
            f"classes"
        )
