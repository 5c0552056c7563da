"""The backbone an evaluation is asked to judge, wherever it comes from."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ultradino_jax.backbone import Backbone
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import from_scratch
from ultradino_jax.weights.load import load_backbone_file

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
    `load_any_backbone` and `from_scratch` raise.
    """
    size = dict(image_size=wanted.image_size, channels=wanted.channels)
    if checkpoint is not None:
        return load_any_backbone(checkpoint, arch=wanted.arch, **size)
    if TRAINED_ROW in rows:
        raise UserError(
            f"row {TRAINED_ROW!r} needs --checkpoint; without one, give config.rows "
            "that are trained from scratch"
        )
    return from_scratch(
        wanted.arch, patch_size=wanted.patch_size, seed=wanted.seed, **size
    )


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
    try:
        return load_backbone_file(
            path,
            arch=arch or None,
            image_size=image_size or None,
            channels=channels or None,
        )
    except UserError:
        raise
    except ValueError as error:
        reason = str(error).split("Truncating")[0].split("If this")[0]
        raise UserError(
            f"{path}: the parameters are not of the architecture that its "
            f"backbone.json names: {' '.join(reason.split())}"
        ) from error
