"""The backbone an evaluation is asked to judge, wherever it comes from."""

from pathlib import Path

from ultradino_jax.checkpoint import Backbone, load_backbone


def load_any_backbone(
    path: str | Path, *, arch: str = "", image_size: int = 0, channels: int = 0
) -> Backbone:
    """A run's workdir, an exported backbone, or a file of another project.

    arch: the size it must have; image_size, channels: what it is to be used at; empty
    or 0 trusts the checkpoint. Raises FileNotFoundError or ValueError with one line.
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
            raise ValueError(
                f"{path}: the parameters are not of the architecture that its "
                f"backbone.json names: {' '.join(reason.split())}"
            ) from error
    # Imported late: converting needs packages that own checkpoints do without.
    from ultradino_jax.interop.load import load_backbone_file

    return load_backbone_file(
        path,
        arch=arch or None,
        image_size=image_size or None,
        channels=channels or None,
    )
