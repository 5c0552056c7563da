"""Tensors of a known family of vision transformers -> `backbone.Backbone`."""

import re
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.backbone import Backbone, record_to_backbone
from ultradino_jax.errors import UserError
from ultradino_jax.models.usfm import USFM
from ultradino_jax.models.vit import VARIANTS, ViT
from ultradino_jax.normalization import FUS, IMAGENET
from ultradino_jax.tree import flat_names
from ultradino_jax.weights import naming
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.meta import (
    Architecture,
    check_placement,
    nest,
    vit_params,
)
from ultradino_jax.weights.usfm import usfm_params

# (offset, antialias) of the position interpolation: family, has registers.
_POSITIONS = {
    ("dinov2", False): (0.1, False),
    ("dinov2", True): (0.0, True),
    ("ultradino", False): (0.1, False),
    ("ultradino", True): (0.1, False),
    ("ibot", False): (0.1, False),
    ("hf", False): (0.0, False),
    ("hf", True): (0.0, True),
    ("timm", False): (0.0, True),
    ("timm", True): (0.0, True),
}


def detect_family(names: Iterable[str]) -> str:
    """'usfm', 'hf', 'timm', 'ibot' or 'dinov2', from tensor names.

    Raises UserError for architectures that look alike but are not supported, and for
    names of no known kind.
    """
    names = set(names)

    def has(pattern):
        return any(re.search(pattern, name) for name in names)

    if has(r"rope|storage_tokens|^layer\.\d"):
        raise UserError("DINOv3 (rotary positions) is not supported")
    if has(r"mlp\.(w12|w3|weights_in|weights_out)\."):
        raise UserError("a SwiGLU feed-forward (ViT-g) is not supported")
    if has(r"relative_position_bias_table|attn\.q_bias"):
        return "usfm"
    if has(r"(^|\.)embeddings\."):
        return "hf"
    if not has(r"^blocks\.\d+\."):
        shown = ", ".join(sorted(names)[:5]) or "none"
        raise UserError(f"no ViT of a known family; its tensors are {shown}, ..")
    if "masked_embed" in names or has(r"\.gamma_1$"):
        return "ibot"
    if "reg_token" in names:
        return "timm"
    if "mask_token" in names or "register_tokens" in names:
        return "dinov2"
    return "timm" if has(r"\.ls1\.gamma$") else "ibot"


def backbone_from_tensors(
    file: WeightFile,
    *,
    arch: str | None = None,
    num_heads: int | None = None,
    source: str = "",
) -> Backbone:
    """A read file -> Backbone at its native size and channels.

    arch: a name in VARIANTS, whose depth the file must have. num_heads: A, for a width
    that is no published ViT's, in a file without a config. Raises UserError as
    `load.load_backbone_file` does.
    """
    record = file.record
    if record and record["naming"] == "own":
        return _own(file, source)
    family = detect_family(file.tensors)
    if family == "usfm":
        params, sizes, ignored = usfm_params(file.tensors)
        channels = sizes.pop("channels")
        model = USFM(**sizes)
    else:
        model, params, channels, ignored = _vit(file, family, arch, num_heads)
        family = _provenance(family, channels)
    mean, std = FUS if channels == 1 else IMAGENET
    if file.processor and "image_mean" in file.processor:
        mean, std = file.processor["image_mean"], file.processor["image_std"]
    name = _name("dinov2" if family == "hf" else family, model)
    if record:
        mean, std, name = record["mean"], record["std"], record["name"]
        flags = ("pos_offset", "pos_antialias")
        model = model.clone(**{flag: record["model"][flag] for flag in flags})
    for values in (mean, std):
        if len(values) != channels:
            raise UserError(f"{len(values)} mean/std values for {channels} channels")
    return Backbone(
        model=model,
        params=jax.tree.map(jnp.asarray, params),
        image_size=model.image_size,
        channels=channels,
        mean=tuple(mean),
        std=tuple(std),
        name=name,
        source=source + _left_out((*file.ignored, *ignored)),
    )


def _own(file: WeightFile, source: str) -> Backbone:
    """This project's flat file: parameter paths as names, the record in its header."""
    kind = file.record["format"].removeprefix("ultradino_")
    if kind != "backbone":
        raise UserError(f"holds a {kind}; interop.save_tasks.load_task reads it")
    params = jax.tree.map(jnp.asarray, nest(file.tensors))
    backbone = record_to_backbone(file.record, params, source)
    side = backbone.model.image_size
    images = jax.ShapeDtypeStruct((1, side, side, backbone.channels), jnp.float32)
    target = jax.eval_shape(backbone.model.init, jax.random.key(0), images)["params"]
    check_placement(file.tensors, {k: x.shape for k, x in flat_names(target).items()})
    return backbone


def _provenance(family: str, channels: int) -> str:
    """UltraDINO files have DINOv2's names; one channel tells them apart."""
    return "ultradino" if family == "dinov2" and channels == 1 else family


def _vit(file: WeightFile, family: str, arch, num_heads):
    """(ViT, params, channels, names left out) of a file of a ViT family."""
    state, ignored = dict(file.tensors), []
    if family == "hf":
        state = naming.hf_file_names(state)
    elif family == "ibot":
        state = naming.from_ibot(state)
    # Blocks in chunks, as sharded training keeps them: 'blocks.1.7.x' is block 7.
    chunked = re.compile(r"^blocks\.\d+\.(\d+)\.")
    state = {chunked.sub(r"blocks.\1.", name): x for name, x in state.items()}
    for name in list(state):
        if name.startswith(("head.", "classifier.")):
            ignored.append(name)
            state.pop(name)
    known = {}
    if file.record:
        known = file.record["model"]
    elif file.config and family == "hf":
        config = file.config
        if config.get("use_swiglu_ffn"):
            raise UserError("a SwiGLU feed-forward (ViT-g) is not supported")
        known = {
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
        }
    elif arch is not None:
        known = {"depth": VARIANTS[arch][1]}
    elif num_heads is None:
        # A file that lacks its last blocks must not pass for a shallower model.
        depths = {v[0]: v[1] for v in VARIANTS.values()}
        known = {"depth": depths.get(state.get("cls_token", np.empty(0)).shape[-1], 0)}
    architecture, expected = _expected(state, family, known.get("depth", 0))
    check_placement(state, expected)
    if family == "hf":
        state = naming.from_hf(state)
    elif family == "timm":
        state = naming.from_timm(state)
    d, registers = architecture.embed_dim, architecture.num_registers
    widths = {v[0]: v[2] for v in VARIANTS.values()}
    num_heads = num_heads or known.get("num_heads") or widths.get(d)
    if num_heads is None:
        raise UserError(f"cannot tell the number of heads of a ViT that is {d} wide")
    kind = _provenance(family, architecture.channels)
    offset, antialias = _POSITIONS[kind, registers > 0]
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
    return model, vit_params(state), architecture.channels, ignored


def _expected(state, family: str, depth: int):
    """(Architecture, {name in the family's naming: shape}) of a complete file."""
    shapes = {name: np.shape(x) for name, x in state.items()}
    class_position = True
    if family == "hf":
        shapes = {naming.hf_to_reference_name(k): s for k, s in shapes.items()}
    elif family == "timm":
        shapes["register_tokens"] = shapes.get("reg_token", (1, 0, 0))
        if pos := shapes.get("pos_embed"):
            class_position = naming.positions_include_class(pos)
            shapes["pos_embed"] = (1, pos[1] + (not class_position), pos[2])
    architecture = Architecture.of(shapes, depth=depth)
    reference = {
        name: np.broadcast_to(np.float32(0), shape)
        for name, shape in architecture.shapes().items()
    }
    if family == "hf":
        reference = naming.to_hf(reference)
    elif family == "timm":
        reference = naming.to_timm(reference, class_position=class_position)
    return architecture, {name: x.shape for name, x in reference.items()}


def _name(family: str, model) -> str:
    """'dinov2_vits14_reg4', 'ibot_vitb16'; unpublished sizes by width and depth."""
    sizes = (model.embed_dim, model.depth)
    variant = next((k for k, v in VARIANTS.items() if v[:2] == sizes), None)
    letter = variant[0] if variant else f"{model.embed_dim}x{model.depth}_"
    registers = f"_reg{model.num_registers}" if model.num_registers else ""
    return f"{family}_vit{letter}{model.patch_size}{registers}"


def _left_out(names: Iterable[str]) -> str:
    """' (left out: head (2), norm)': by the names' first part, to stay one line."""
    counts = Counter(name.partition(".")[0] for name in names)
    parts = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
    return f" (left out: {', '.join(parts)})" if parts else ""
