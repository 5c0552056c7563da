"""Other libraries' names for a DINOv2-style ViT <-> the naming of meta.py.

Each family has `to_` (from the reference naming, what an export writes) and `from_`.
Strictness comes from running `to_` on the expected shapes: what it yields is exactly
the list of tensors that a file of that family must hold.
"""

import re

import numpy as np

from ultradino_jax.errors import UserError
from ultradino_jax.weights.meta import StateDict

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


def from_timm(state: StateDict) -> dict[str, np.ndarray]:
    """timm's VisionTransformer -> reference naming.

    Its models with registers give the class token no position (`no_embed_class`): the
    class entry of pos_embed is then zero here, which computes the same. timm keeps no
    mask token; it is zero, as at the start of a pretraining.
    """
    out = dict(state)
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
    if not positions_include_class(out["pos_embed"].shape):
        pos = out["pos_embed"]
        out["pos_embed"] = np.concatenate([np.zeros_like(pos[:, :1]), pos], axis=1)
    out["mask_token"] = np.zeros_like(out["cls_token"][0])
    return out


def to_timm(state: StateDict, *, class_position: bool) -> dict[str, np.ndarray]:
    """Reference naming -> timm's, as timm converts DINOv2 itself (`_convert_dinov2`).

    class_position False adds the class token's position to the token and drops it from
    pos_embed (`no_embed_class=True`, which timm's models with registers need).
    """
    out = dict(state)
    out.pop("mask_token", None)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
    if not class_position:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def positions_include_class(shape: tuple[int, ...]) -> bool:
    """Whether pos_embed [1,M,D] holds 1 + a square number of entries.

    Raises UserError when M is neither that nor a square.
    """
    for has_class in (True, False):
        count = shape[1] - has_class
        if round(count**0.5) ** 2 == count:
            return has_class
    raise UserError(f"pos_embed {list(shape)} is no square grid of patches")


def from_ibot(state: StateDict) -> dict[str, np.ndarray]:
    """iBOT's VisionTransformer (also timm's without LayerScale) -> reference naming.

    The published backbones have neither LayerScale nor a mask token; the pretraining
    variant calls them gamma_1, gamma_2 and masked_embed.
    """
    out = {re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", k): x for k, x in state.items()}
    if "masked_embed" in out:
        out["mask_token"] = out.pop("masked_embed")
    elif "cls_token" in out:
        out.setdefault("mask_token", np.zeros_like(out["cls_token"][0]))
    return out
