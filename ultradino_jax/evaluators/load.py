"""The backbone an evaluation is asked to judge, wherever it comes from."""

from pathlib import Path

from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import from_scratch
from ultradino_jax.weights.load import load_backbone

TRAINED_ROW = "teacher"


def backbone_of(config: ConfigDict, checkpoint: str | Path | None) -> Backbone:
    """What --checkpoint names or, without one, the ViT of config.model from scratch.

    Raises UserError when a row needs a checkpoint and there is none, and what
    `load_backbone` and `from_scratch` raise.
    """
    c = config.model
    if checkpoint is not None:
        return load_backbone(
            checkpoint, arch=c.arch, image_size=c.image_size, channels=c.channels
        )
    if TRAINED_ROW in config.rows:
        raise UserError(
            f"row {TRAINED_ROW!r} needs --checkpoint; without one, give config.rows "
            "that are trained from scratch"
        )
    return from_scratch(
        c.arch,
        patch_size=c.patch_size,
        image_size=c.image_size,
        channels=c.channels,
        seed=config.random_init_seed,
    )


def checkpoint_record(checkpoint: str | Path | None, backbone) -> dict:
    """What results.json says about the network and its input; path is None for none."""
    return {
        "path": None if checkpoint is None else str(checkpoint),
        "name": backbone.name,
        "source": getattr(backbone, "source", ""),
        "digest": backbone.digest,
        "image_size": backbone.image_size,
        "channels": backbone.channels,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
