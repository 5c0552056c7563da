"""The families of weights that can be read, and the one a file belongs to."""

import re
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from ultradino_jax.errors import UserError
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.weights import dinov2, hf, ibot, timm, usfm
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.family import Family
from ultradino_jax.weights.files import WeightFile

# The first that recognises a tensor name has the file.
FAMILIES: tuple[Family, ...] = (
    usfm.FAMILY,
    hf.FAMILY,
    timm.FAMILY,
    ibot.FAMILY,
    dinov2.FAMILY,
)
MODELS = {family.model.__name__: family.model for family in FAMILIES}

# They look like the families above and are none of them.
_UNSUPPORTED = {
    r"rope|storage_tokens|^layer\.\d": "DINOv3 (rotary positions) is not supported",
    r"mlp\.(w12|w3|weights_in|weights_out)\.": (
        "a SwiGLU feed-forward (ViT-g) is not supported"
    ),
}


def detect_family(names: Iterable[str]) -> Family:
    """The entry of FAMILIES that tensor names belong to.

    Raises UserError for architectures that look alike but are not supported, and for
    names of no known kind.
    """
    names = list(names)

    def found(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    for pattern, message in _UNSUPPORTED.items():
        if found(pattern):
            raise UserError(message)
    for marks in ("marks", "weak_marks"):
        for family in FAMILIES:
            if any(found(pattern) for pattern in getattr(family, marks)):
                return family
    shown = ", ".join(sorted(names)[:5]) or "none"
    raise UserError(f"no ViT of a known family; its tensors are {shown}, ..")


def family_of_model(model) -> Family:
    """A family of the model's class (all of them resize it alike)."""
    return next(family for family in FAMILIES if isinstance(model, family.model))


def backbone_from_tensors(
    file: WeightFile, *, num_heads: int | None = None, source: str = ""
) -> Backbone:
    """A read file of another project -> Backbone at its native size and channels.

    num_heads: A, for a width that is no published ViT's, in a file without a config.
    What an export of this project says in its record (statistics, name, position flags)
    comes before the family's habits. Raises UserError as `load.load_backbone` does.
    """
    family = detect_family(file.tensors)
    found = family.read(file, num_heads=num_heads)
    model, name = found.model, _name(found.title, found.model)
    mean, std = family.statistics(found.channels)
    if file.processor and "image_mean" in file.processor:
        mean, std = file.processor["image_mean"], file.processor["image_std"]
    if record := file.record:
        mean, std, name = record["mean"], record["std"], record["name"]
        known = ["pos_offset", "pos_antialias"]
        known += ["layerscale"] if record["model"]["layerscale"] else []
        model = model.clone(**{name: record["model"][name] for name in known})
    for values in (mean, std):
        if len(values) != found.channels:
            raise UserError(
                f"{len(values)} mean/std values for {found.channels} channels"
            )
    return Backbone(
        model=model,
        params=jax.tree.map(jnp.asarray, found.params),
        image_size=model.image_size,
        channels=found.channels,
        mean=tuple(mean),
        std=tuple(std),
        name=name,
        source=source + _left_out((*file.ignored, *found.ignored)),
    )


def _name(title: str, model) -> str:
    """'dinov2_vits14_reg4', 'ibot_vitb16'; unpublished sizes by width and depth."""
    sizes = (model.embed_dim, model.depth)
    variant = next((k for k, v in VARIANTS.items() if v[:2] == sizes), None)
    letter = variant[0] if variant else f"{model.embed_dim}x{model.depth}_"
    registers = f"_reg{model.num_registers}" if model.num_registers else ""
    return f"{title}_vit{letter}{model.patch_size}{registers}"


def _left_out(names: Iterable[str]) -> str:
    """' (left out: head (2), norm)': by the names' first part, to stay one line."""
    counts = Counter(name.partition(".")[0] for name in names)
    parts = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
    return f" (left out: {', '.join(parts)})" if parts else ""
