"""iBOT's files, and timm's ViTs without LayerScale, which have the same names."""

import functools
import re

import numpy as np

from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.family import Family
from ultradino_jax.weights.meta import StateDict
from ultradino_jax.weights.vit import Naming, read_vit, resize_vit


def from_ibot(state: StateDict) -> dict[str, np.ndarray]:
    """iBOT's VisionTransformer -> reference naming.

    The published backbones have neither LayerScale nor a mask token; the pretraining
    variant calls them gamma_1, gamma_2 and masked_embed.
    """
    out = {re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", k): x for k, x in state.items()}
    if "masked_embed" in out:
        out["mask_token"] = out.pop("masked_embed")
    elif "cls_token" in out:
        out.setdefault("mask_token", np.zeros_like(out["cls_token"][0]))
    return out


_NAMING = Naming("ibot", {False: (0.1, False)}, tidy=from_ibot)
FAMILY = Family(
    marks=(r"^masked_embed$", r"\.gamma_1$"),
    weak_marks=(r"^blocks\.\d+\.",),
    read=functools.partial(read_vit, _NAMING),
    model=ViT,
    resize=resize_vit,
)
