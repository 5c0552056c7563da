"""Sizes of the networks in golden files, read off their arrays (torch's names).

A file does not tell the number of attention heads: tests give what its maker took.
"""

import math

from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.vit import ViT


def below(arrays, prefix):
    """Entries whose key starts with the prefix, with the prefix cut off."""
    return {
        k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
    }


def depth_of(state, prefix="blocks."):
    """Number of blocks."""
    ids = [k.removeprefix(prefix) for k in state if k.startswith(prefix)]
    return 1 + max(int(k.split(".")[0]) for k in ids)


def vit_of(state, num_heads, **options):
    """The ViT of a meta-style state dict."""
    d, _, _, patch = state["patch_embed.proj.weight"].shape
    registers = state.get("register_tokens")
    return ViT(
        d,
        depth_of(state),
        num_heads,
        patch_size=patch,
        image_size=patch * math.isqrt(state["pos_embed"].shape[1] - 1),
        num_registers=0 if registers is None else registers.shape[1],
        **options,
    )


def dino_head_of(state):
    """The DINO head of a meta-style state dict; every second of mlp.N is a layer."""
    layers = sorted(k for k in state if k.startswith("mlp.") and k.endswith("weight"))
    k, e = state["last_layer.weight_v"].shape
    return DINOHead(
        hidden_dim=len(state[layers[0]]),
        bottleneck_dim=e,
        num_prototypes=k,
        num_layers=len(layers),
    )
