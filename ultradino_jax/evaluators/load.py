"""The backbone an evaluation is asked to judge, wherever it comes from."""

from pathlib import Path

from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone, load_backbone
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import from_scratch

TRAINED_ROW = "teacher"


def backbone_of(config: ConfigDict, checkpoint: str | Path | None) -> Backbone:
    """What --checkpoint names or, without one, the ViT of config.model from scratch.

    Raises UserError when a row needs a checkpoint and there is none, and what
    `load_any_backbone` and `from_scratch` raise.
    """
    c = config.model
    if checkpoint is not None:
        return load_any_backbone(
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


def load_any_backbone(
    path: str | Path, *, arch: str = "", image_size: int = 0, channels: int = 0
) -> Backbone:
    """A run's workdir, an exported backbone, or a file of another project.

    arch: the size it must have; image_size, channels: what it is to be used at; empty
    or 0 trusts the checkpoint. Raises FileNotFoundError or UserError with one line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    own = any((p / "backbone.json").is_file() for p in (path, path / "backbone"))
    if own and not (arch or image_size or channels):
        try:
            return load_backbone(path)
        except ValueError as error:
            reason = str(error).split("Truncating")[0].split("If this")[0]
            raise UserError(
                f"{path}: the parameters are not of the architecture that its "
                f"backbone.json names: {' '.join(reason.split())}"
            ) from error
    # Imported late: converting needs packages that own checkpoints do without.
    from ultradino_jax.weights.load import load_backbone_file

    return load_backbone_file(
        path,
        arch=arch or None,
        image_size=image_size or None,
        channels=channels or None,
    )
