"""timm's naming of a DINOv2-style ViT <-> the reference naming of meta.py."""

import functools
from collections.abc import Mapping

import numpy as np

from ultradino_jax.errors import UserError
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.family import Family
from ultradino_jax.weights.meta import StateDict
from ultradino_jax.weights.vit import Naming, read_vit, resize_vit


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


def _reference_shapes(shapes: Mapping) -> dict:
    out = {**shapes, "register_tokens": shapes.get("reg_token", (1, 0, 0))}
    if pos := shapes.get("pos_embed"):
        out["pos_embed"] = (1, pos[1] + (not positions_include_class(pos)), pos[2])
    return out


def _expected(reference: StateDict, shapes: Mapping) -> dict[str, np.ndarray]:
    has_class = positions_include_class(shapes["pos_embed"])
    return to_timm(reference, class_position=has_class)


_NAMING = Naming(
    "timm",
    {False: (0.0, True), True: (0.0, True)},
    shapes=_reference_shapes,
    expected=_expected,
    to_reference=from_timm,
)
FAMILY = Family(
    marks=(r"^reg_token$",),
    weak_marks=(r"\.ls1\.gamma$",),
    read=functools.partial(read_vit, _NAMING),
    model=ViT,
    resize=resize_vit,
)
