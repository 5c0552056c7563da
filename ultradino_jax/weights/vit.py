"""Reading a DINOv2-style ViT in any library's naming; the namings have own modules."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultradino_jax.errors import UserError
from ultradino_jax.models.pos_embed import interpolate_pos_embed
from ultradino_jax.models.vit import VARIANTS, ViT
from ultradino_jax.weights.family import Found
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.meta import (
    Architecture,
    StateDict,
    check_placement,
    vit_params,
)

# Blocks in chunks, as sharded training keeps them: 'blocks.1.7.x' is block 7.
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_CLASSIFIERS = ("head.", "classifier.")


def _expected_as_is(reference: StateDict, shapes) -> StateDict:
    return reference


@dataclass(frozen=True)
class Naming:
    """How a library names and shapes the tensors of a DINOv2-style ViT.

    The reference naming is that of meta.py. title: as of `Found`. positions: {whether
    there are registers: (offset, antialias) of the position interpolation}.
    tidy: a file's tensors -> this naming, variants undone. shapes: {name: shape} in
    this naming -> the same in the reference's, as far as the architecture shows in it.
    expected: (reference tensors, a file's shapes) -> what a complete file holds.
    to_reference: complete tensors -> reference naming. sizes: a Hugging Face
    config.json -> {'depth': .., 'num_heads': ..}.
    """

    title: str
    positions: Mapping[bool, tuple[float, bool]]
    tidy: Callable[[StateDict], StateDict] = dict
    shapes: Callable[[Mapping], Mapping] = dict
    expected: Callable[[StateDict, Mapping], StateDict] = _expected_as_is
    to_reference: Callable[[StateDict], StateDict] = dict
    sizes: Callable[[dict], dict] | None = None


def read_vit(
    naming: Naming, file: WeightFile, *, num_heads: int | None = None
) -> Found:
    """`Family.read` of a ViT in the given naming."""
    state = {
        _CHUNKED.sub(r"blocks.\1.", k): x for k, x in naming.tidy(file.tensors).items()
    }
    ignored = [name for name in state if name.startswith(_CLASSIFIERS)]
    state = {name: x for name, x in state.items() if name not in ignored}
    known = _known(naming, file, state, num_heads)
    architecture, expected = _expected(naming, state, known.get("depth", 0))
    check_placement(state, expected)
    state = naming.to_reference(state)
    d, registers = architecture.embed_dim, architecture.num_registers
    widths = {v[0]: v[2] for v in VARIANTS.values()}
    num_heads = num_heads or known.get("num_heads") or widths.get(d)
    if num_heads is None:
        raise UserError(f"cannot tell the number of heads of a ViT that is {d} wide")
    offset, antialias = naming.positions[registers > 0]
    model = ViT(
        embed_dim=d,
        depth=architecture.depth,
        num_heads=num_heads,
        patch_size=architecture.patch_size,
        image_size=architecture.grid * architecture.patch_size,
        num_registers=registers,
        mlp_ratio=architecture.hidden_dim // d,
        layerscale=1e-5 if architecture.layerscale else None,
        pos_offset=offset,
        pos_antialias=antialias,
    )
    return Found(naming.title, model, vit_params(state), architecture.channels, ignored)


def _known(
    naming: Naming, file: WeightFile, state: StateDict, num_heads
) -> dict[str, Any]:
    """Depth and heads where something beside the tensors tells them."""
    if file.record:
        return file.record["model"]
    if file.config and naming.sizes:
        return naming.sizes(file.config)
    if num_heads is not None:
        return {}
    # A file that lacks its last blocks must not pass for a shallower model.
    depths = {v[0]: v[1] for v in VARIANTS.values()}
    tokens = [x for name, x in state.items() if name.endswith("cls_token")]
    return {"depth": depths.get(tokens[0].shape[-1], 0) if tokens else 0}


def _expected(naming: Naming, state: StateDict, depth: int):
    """(Architecture, {name in the file's naming: shape}) of a complete file."""
    shapes = {name: np.shape(x) for name, x in state.items()}
    architecture = Architecture.of(naming.shapes(shapes), depth=depth)
    reference = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in architecture.shapes().items()
    }
    expected = naming.expected(reference, shapes)
    return architecture, {name: x.shape for name, x in expected.items()}


def resize_vit(model: ViT, params: dict, grid: tuple[int, int]) -> dict:
    """`Family.resize`: bicubic, with the flags of the library they come from."""
    pos_embed = interpolate_pos_embed(
        params["pos_embed"],
        grid,
        offset=model.pos_offset,
        antialias=model.pos_antialias,
    )
    return {**params, "pos_embed": pos_embed}
