"""The backbone an evaluation is asked to judge, wherever it comes from."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import from_scratch
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import load_backbone

TRAINED_ROW = "teacher"


@dataclass(frozen=True)
class Wanted:
    """What config.model says of the network.

    arch: the size a checkpoint must have, '' for any; without one, the size built.
    image_size, channels: 0 is what the checkpoint carries. patch_size and seed are of a
    network without checkpoint.
    """

    arch: str = ""
    image_size: int = 0
    channels: int = 0
    patch_size: int = 16
    seed: int = 0


def backbone_of(
    checkpoint: str | Path | None, rows: Collection[str], wanted: Wanted
) -> Backbone:
    """What --checkpoint names or, without one, the ViT wanted, from scratch.

    Raises UserError when a row needs a checkpoint and there is none, and what
    `load_backbone` and `from_scratch` raise.
    """
    size = dict(image_size=wanted.image_size, channels=wanted.channels)
    if checkpoint is not None:
        return load_backbone(checkpoint, arch=wanted.arch, **size)
    if TRAINED_ROW in rows:
        raise UserError(
            f"row {TRAINED_ROW!r} needs --checkpoint; without one, give config.rows "
            "that are trained from scratch"
        )
    return from_scratch(
        wanted.arch, patch_size=wanted.patch_size, seed=wanted.seed, **size
    )
