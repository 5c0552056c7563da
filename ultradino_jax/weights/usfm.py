"""USFM checkpoints (BEiT naming) -> models/usfm.py and its parameters."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ultradino_jax.errors import UserError
from ultradino_jax.models.usfm import USFM, resize_table
from ultradino_jax.weights.family import Family, Found
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.meta import (
    BLOCK_NAMES,
    StateDict,
    block_count,
    check_placement,
    nest,
    stack_blocks,
)

# Held by the files, without a place in the model: the norm of the pretraining decoder's
# input, a fine-tuned classifier, and indices that are recomputed.
IGNORED = re.compile(
    r"norm\.(weight|bias)|fc_norm\..*|head\..*|mask_token|.*relative_position_index"
)
_SHARED = "rel_pos_bias.relative_position_bias_table"
_OWN = "attn.relative_position_bias_table"


def _expected(state: StateDict) -> dict[str, tuple[int, ...]]:
    anchors = ("cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if absent := [name for name in anchors if name not in state]:
        there = ", ".join(sorted(state)[:3]) or "none"
        raise UserError(f"missing: {', '.join(absent)}; there are {there} ..")
    d, f = state["cls_token"].shape[-1], state["blocks.0.mlp.fc1.weight"].shape[0]
    table = state.get(_SHARED, state.get(f"blocks.0.{_OWN}"))
    matrices = {
        "attn.qkv.weight": (3 * d, d),
        "attn.proj.weight": (d, d),
        "mlp.fc1.weight": (f, d),
        "mlp.fc1.bias": (f,),
        "mlp.fc2.weight": (d, f),
    }
    names = [name.replace("ls1.gamma", "gamma_1") for name in BLOCK_NAMES]
    names = [name.replace("ls2.gamma", "gamma_2") for name in names]
    names.remove("attn.qkv.bias")
    names += ["attn.q_bias", "attn.v_bias"]
    if table is not None and _SHARED not in state:
        matrices[_OWN] = table.shape
        names.append(_OWN)
    depth = block_count(state)
    # 768 wide is the published USFM: a file that ends early must not pass for a
    # shallower model.
    depth = max(depth, 12) if d == 768 else depth
    expected = {
        f"blocks.{i}.{name}": matrices.get(name, (d,))
        for i in range(depth)
        for name in names
    }
    kernel = state["patch_embed.proj.weight"].shape
    expected["cls_token"] = (1, 1, d)
    expected["patch_embed.proj.weight"] = (d, *kernel[1:])
    expected["patch_embed.proj.bias"] = (d,)
    if _SHARED in state or table is None:
        expected[_SHARED] = (0, 0) if table is None else table.shape
    return expected


def usfm_params(state: StateDict) -> tuple[dict, dict[str, Any], list[str]]:
    """USFM state dict -> (parameters, what `USFM(..)` takes, names left out).

    Both layouts are read: one shared bias table, and one per block. The number of heads
    is the table's width. Raises UserError listing missing and unexpected tensors or
    wrong shapes, or when the table is not that of a square window.
    """
    ignored = sorted(name for name in state if IGNORED.fullmatch(name))
    state = {name: x for name, x in state.items() if name not in ignored}
    expected = _expected(state)
    check_placement(state, expected)
    depth = block_count(expected)
    kernel = state["patch_embed.proj.weight"]
    flat = {
        "cls_token": state["cls_token"],
        "patch_embed/kernel": rearrange(kernel, "d c p q -> (p q c) d"),
        "patch_embed/bias": state["patch_embed.proj.bias"],
    }
    for i in range(depth):
        q, v = state[f"blocks.{i}.attn.q_bias"], state[f"blocks.{i}.attn.v_bias"]
        state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
        for which in (1, 2):
            gamma = state[f"blocks.{i}.gamma_{which}"]
            state[f"blocks.{i}.ls{which}.gamma"] = gamma
        if _SHARED in state:
            state[f"blocks.{i}.{_OWN}"] = state[_SHARED]
    places: Mapping[str, tuple[str, bool]] = {
        **BLOCK_NAMES,
        _OWN: ("attn/rel_pos_table", False),
    }
    for name, (path, is_matrix) in places.items():
        stack = [state[f"blocks.{i}.{name}"] for i in range(depth)]
        flat[f"blocks/{path}"] = stack_blocks(stack, is_matrix)
    entries, num_heads = state[f"blocks.0.{_OWN}"].shape
    window = (round(max(entries - 3, 0) ** 0.5) + 1) // 2
    if (2 * window - 1) ** 2 + 3 != entries:
        raise UserError(f"bias table of {entries} rows is not that of a square window")
    d, channels, patch_size, _ = kernel.shape
    sizes = {
        "embed_dim": d,
        "depth": depth,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "image_size": window * patch_size,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // d,
        "channels": channels,
    }
    return nest(flat), sizes, ignored


def _read(file: WeightFile, num_heads: int | None = None) -> Found:
    """`Family.read`; the tensors tell the number of heads, too."""
    params, sizes, ignored = usfm_params(file.tensors)
    channels = sizes.pop("channels")
    return Found("usfm", USFM(**sizes), params, channels, ignored)


def _resize(model: USFM, params: dict, grid: tuple[int, int]) -> dict:
    """`Family.resize`: each block's bias table, cubic."""
    side = model.image_size // model.patch_size
    blocks = params["blocks"]
    tables = jnp.asarray(blocks["attn"]["rel_pos_table"])
    tables = jax.vmap(lambda table: resize_table(table, (side, side), grid))(tables)
    attn = {**blocks["attn"], "rel_pos_table": tables}
    return {**params, "blocks": {**blocks, "attn": attn}}


FAMILY = Family(
    marks=(r"relative_position_bias_table|attn\.q_bias",),
    read=_read,
    model=USFM,
    resize=_resize,
)
