"""Mixup and CutMix of whole batches, as timm's `Mixup` in batch mode.

The draw happens on the host, the mixing on the device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mix(NamedTuple):
    """How a batch is mixed with its reverse.

    lam: weight of the batch itself in the targets. cutmix: whether a box is pasted
    instead of blending. box: (top, bottom, left, right) in pixels.
    """

    lam: np.float32
    cutmix: np.bool_
    box: np.ndarray


def draw_mix(
    rng: np.random.RandomState,
    height: int,
    width: int,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
) -> Mix:
    """One draw, in the order and from the generator timm uses.

    CutMix's lambda is corrected for the part of the box that is clipped at the border.
    Source: timm 1.0.31 `data/mixup.py` (Zhang et al. 2018, Yun et al. 2019).
    """
    rng.rand()  # timm's draw against prob, which is 1
    cutmix = rng.rand() < switch_prob
    alpha = cutmix_alpha if cutmix else mixup_alpha
    lam = rng.beta(alpha, alpha)
    box = np.zeros(4, np.int32)
    if cutmix:
        ratio = np.sqrt(1 - lam)
        cut_h, cut_w = int(height * ratio), int(width * ratio)
        top = rng.randint(0, height) - cut_h // 2
        left = rng.randint(0, width) - cut_w // 2
        rows = np.clip([top, top + cut_h], 0, height)
        columns = np.clip([left, left + cut_w], 0, width)
        box = np.array([*rows, *columns], np.int32)
        area = (rows[1] - rows[0]) * (columns[1] - columns[0])
        lam = 1.0 - area / (height * width)
    return Mix(np.float32(lam), np.bool_(cutmix), box)


def no_mix() -> Mix:
    """The draw that changes nothing."""
    return Mix(np.float32(1.0), np.bool_(False), np.zeros(4, np.int32))


def mix_images(images: jax.Array, mix: Mix) -> jax.Array:
    """[B,H,W,C] mixed with its reverse along B."""
    height, width = images.shape[1:3]
    row = jnp.arange(height)[:, None, None]
    column = jnp.arange(width)[None, :, None]
    top, bottom, left, right = mix.box
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    other = images[::-1]
    blended = mix.lam * images + (1 - mix.lam) * other
    return jnp.where(mix.cutmix, jnp.where(inside, other, images), blended)


def mix_targets(labels, mix: Mix, num_classes: int, smoothing: float = 0.1):
    """int [B] -> float32 [B,Y]: smoothed one-hot rows, mixed with their reverse.

    A label's own class gets 1 - smoothing + smoothing/Y, any other smoothing/Y.
    """
    off = smoothing / num_classes
    targets = jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + off
    return mix.lam * targets + (1 - mix.lam) * targets[::-1]


def soft_cross_entropy(logits, targets):
    """-sum_y t_y log softmax(z)_y over the last axis: [..,Y] -> [..]."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)
