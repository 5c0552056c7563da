"""AdamW with per-parameter tables: layer-wise learning rates, decay mask, last layer.

The tables are arrays broadcast against the parameters (the blocks carry a depth axis),
so layer-wise decay is one multiplication, not one optimiser per layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ultradino_jax.schedules import Schedule
from ultradino_jax.tree import map_with_name

# Parameters of the backbone that sit below its first block.
EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "mask_token", "register_tokens")


def learning_rate_table(
    params, *, layerwise_decay: float, patch_embed_multiplier: float
):
    """Learning-rate multiplier of every leaf of {'backbone': .., 'dino_head': ..}.

    With `depth` blocks, layer id 0 holds the embeddings, i+1 block i and depth+1 the
    final norm and the heads; the multiplier is decay^(depth+1-id). The patch embedding
    is multiplied once more. Stacked blocks get an array [depth,1,..].
    Source: DINOv2 `utils/param_groups.py`.
    """
    blocks = jax.tree.leaves(params["backbone"]["blocks"])
    depth = blocks[0].shape[0]

    def multiplier(name, leaf):
        part, *rest = name.split("/")
        if part != "backbone" or rest[0] == "norm":
            return np.float32(1.0)
        if rest[0] == "blocks":
            ids = np.arange(1, depth + 1).reshape(-1, *[1] * (leaf.ndim - 1))
            return (layerwise_decay ** (depth + 1.0 - ids)).astype(np.float32)
        if rest[0] not in EMBEDDINGS:
            raise ValueError(f"no layer id is known for parameter {name!r}")
        value = layerwise_decay ** (depth + 1.0)
        if rest[0] == "patch_embed":
            value *= patch_embed_multiplier
        return np.float32(value)

    return map_with_name(multiplier, params)


def weight_decay_table(params):
    """1 where weight decay applies, 0 for biases, norms and LayerScale.

    Positions, tokens and the prototypes are decayed, as in the reference.
    """

    def decayed(name, leaf):
        parts = name.split("/")
        exempt = parts[-1] in ("bias", "gamma") or any("norm" in p for p in parts)
        return np.float32(not exempt)

    return map_with_name(decayed, params)


def last_layer_table(params):
    """1 for the prototypes, whose learning rate is frozen at first; else 0."""
    return map_with_name(
        lambda name, leaf: np.float32("last_layer" in name.split("/")), params
    )


def backbone_table(params):
    """1 for the backbone's parameters, 0 for the heads'."""
    return map_with_name(
        lambda name, leaf: np.float32(name.startswith("backbone/")), params
    )


def submodule_norms(grads) -> dict[str, jax.Array]:
    """L2 norm of each top-level sub-module's gradient, e.g. {'backbone': ..}."""
    return {name: optax.tree.norm(part) for name, part in grads.items()}


def clip_by_submodule(max_norm: float) -> optax.GradientTransformation:
    """Clip the gradient of each top-level sub-module to its own L2 norm.

    g <- g min(1, max_norm / (||g|| + 1e-6)), as torch's `clip_grad_norm_`.
    """

    def update(updates, state, params=None):
        del params
        clipped = {}
        for name, norm in submodule_norms(updates).items():
            scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
            clipped[name] = jax.tree.map(lambda g, s=scale: g * s, updates[name])
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class CountState(NamedTuple):
    """Step counter of the scheduled part of the optimiser."""

    # As optax names it and checkpoints store it.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def scale_and_decay(
    learning_rate: Schedule,
    last_layer_learning_rate: Schedule,
    weight_decay: Schedule,
    *,
    layerwise_decay: float,
    patch_embed_multiplier: float,
    freeze_backbone_steps: int = 0,
) -> optax.GradientTransformation:
    """u -> -lr_leaf (u + wd_leaf p): decoupled decay with every table applied.

    The backbone's rate is 0 for the first `freeze_backbone_steps`, so that fresh heads
    can settle on a pretrained backbone; its moments accumulate all the same.
    """

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("scale_and_decay needs the parameters")
        step = state.count
        lr, lr_last = learning_rate(step), last_layer_learning_rate(step)
        lr_backbone = jnp.where(step < freeze_backbone_steps, 0.0, lr)
        wd = weight_decay(step)

        def leaf(u, p, multiplier, decayed, is_last, is_backbone):
            rate = lr_last if is_last else lr_backbone if is_backbone else lr
            rate = multiplier * rate
            return -rate * (u + (wd * decayed) * p)

        tables = (
            learning_rate_table(
                params,
                layerwise_decay=layerwise_decay,
                patch_embed_multiplier=patch_embed_multiplier,
            ),
            weight_decay_table(params),
            last_layer_table(params),
            backbone_table(params),
        )
        return jax.tree.map(leaf, updates, params, *tables), CountState(step + 1)

    return optax.GradientTransformation(
        lambda params: CountState(jnp.zeros([], jnp.int32)), update
    )


def make_optimizer(
    *,
    learning_rate: Schedule,
    last_layer_learning_rate: Schedule,
    weight_decay: Schedule,
    layerwise_decay: float = 0.9,
    patch_embed_multiplier: float = 0.2,
    freeze_backbone_steps: int = 0,
    clip_norm: float = 3.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """The reference's optimiser: clip per sub-module, Adam, layer-wise lr and decay."""
    return optax.chain(
        clip_by_submodule(clip_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        scale_and_decay(
            learning_rate,
            last_layer_learning_rate,
            weight_decay,
            layerwise_decay=layerwise_decay,
            patch_embed_multiplier=patch_embed_multiplier,
            freeze_backbone_steps=freeze_backbone_steps,
        ),
    )
