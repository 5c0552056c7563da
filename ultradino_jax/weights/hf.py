"""transformers' naming of a DINOv2-style ViT <-> the reference naming of meta.py."""

import functools
import re
from collections.abc import Mapping

import numpy as np

from ultradino_jax.errors import UserError
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.family import Family
from ultradino_jax.weights.meta import StateDict
from ultradino_jax.weights.vit import Naming, read_vit, resize_vit

# Renamings transformers -> reference, in the names of its saved files (those of version
# 4, which version 5 still writes).
_HF_RULES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
# Names that only live in the memory of transformers 5.
_HF_V5_RULES = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_QKV = ("query", "key", "value")


def _apply(rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def hf_file_names(state: StateDict) -> dict[str, np.ndarray]:
    """Names as transformers saves them: heads' prefix cut, version 5 names undone."""
    prefix = r"^(dinov2|dinov2_with_registers)\."
    return {
        _apply(_HF_V5_RULES, re.sub(prefix, "", name)): x for name, x in state.items()
    }


def hf_to_reference_name(name: str) -> str:
    """One saved name of transformers -> reference name (q, k, v stay apart)."""
    return _apply(_HF_RULES, name)


def from_hf(state: StateDict) -> dict[str, np.ndarray]:
    """transformers' Dinov2Model or Dinov2WithRegistersModel -> reference naming."""
    out, split = {}, {}
    for name, x in state.items():
        match = re.match(
            r"encoder\.layer\.(\d+)\.attention\.attention\.(\w+)\.(\w+)$", name
        )
        if match:
            i, which, kind = match.groups()
            split.setdefault(f"blocks.{i}.attn.qkv.{kind}", {})[which] = x
        else:
            out[hf_to_reference_name(name)] = x
    for name, parts in split.items():
        out[name] = np.concatenate([parts[which] for which in _QKV])
    return out


def to_hf(state: StateDict) -> dict[str, np.ndarray]:
    """Reference naming -> the names of transformers' saved DINOv2 files.

    transformers always has LayerScale: a model without it gets gains of one.
    """
    out = {}
    d = state["cls_token"].shape[-1]
    for name, x in state.items():
        match name.split("."):
            case ["blocks", i, *rest]:
                layer, rest = f"encoder.layer.{i}", ".".join(rest)
                if rest.startswith("attn.qkv."):
                    kind = rest.removeprefix("attn.qkv.")
                    for which, part in zip(_QKV, np.split(x, 3), strict=True):
                        out[f"{layer}.attention.attention.{which}.{kind}"] = part
                    continue
                rest = rest.replace("attn.proj", "attention.output.dense")
                rest = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", rest)
                out[f"{layer}.{rest}"] = x
                for which in (1, 2):
                    gain = f"{layer}.layer_scale{which}.lambda1"
                    if f"blocks.{i}.ls{which}.gamma" not in state:
                        out[gain] = np.ones(d, np.float32)
            case ["patch_embed", "proj", kind]:
                out[f"embeddings.patch_embeddings.projection.{kind}"] = x
            case ["pos_embed"]:
                out["embeddings.position_embeddings"] = x
            case ["norm", kind]:
                out[f"layernorm.{kind}"] = x
            case _:
                out[f"embeddings.{name}"] = x
    return out


def _reference_shapes(shapes: Mapping) -> dict:
    return {hf_to_reference_name(name): shape for name, shape in shapes.items()}


def _expected(reference: StateDict, shapes: Mapping) -> dict[str, np.ndarray]:
    return to_hf(reference)


def _sizes(config: dict) -> dict[str, int]:
    if config.get("use_swiglu_ffn"):
        raise UserError("a SwiGLU feed-forward (ViT-g) is not supported")
    names = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
    if absent := [name for name in names.values() if name not in config]:
        raise UserError(f"its config.json lacks {' and '.join(absent)}")
    return {ours: config[theirs] for ours, theirs in names.items()}


_NAMING = Naming(
    "dinov2",
    {False: (0.0, False), True: (0.0, True)},
    tidy=hf_file_names,
    shapes=_reference_shapes,
    expected=_expected,
    to_reference=from_hf,
    sizes=_sizes,
)
FAMILY = Family(
    marks=(r"(^|\.)embeddings\.",),
    read=functools.partial(read_vit, _NAMING),
    model=ViT,
    resize=resize_vit,
)
