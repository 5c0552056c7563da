"""This project's own backbones: Orbax folders, and flat files with a record."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ultradino_jax.errors import StaleFile, UserError, damaged, out_of_memory
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.families import MODELS
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.meta import check_placement, nest
from ultradino_jax.whole import newest_step, read_json

RECORD = "backbone.json"


def record_to_backbone(record: dict, params, source: str) -> Backbone:
    """The inverse of `backbone.backbone_record`, given the parameters.

    Raises UserError, starting with `source`, for an unknown model class and for a
    record that does not say everything.
    """
    with damaged(source):
        name = record.get("class", "ViT")
        if name not in MODELS:
            raise UserError(f"{source}: unknown model class {name!r} in its record")
        fields = {**record["model"], "dtype": jnp.dtype(record["model"]["dtype"])}
        return Backbone(
            model=MODELS[name](**fields),
            params=params,
            image_size=record["image_size"],
            channels=record["channels"],
            mean=tuple(record["mean"]),
            std=tuple(record["std"]),
            name=record["name"],
            source=source,
        )


def own_folder(path: str | Path) -> Path | None:
    """Where `path`, a backbone's folder or a run's workdir, holds a backbone.json."""
    path = Path(path).absolute()
    places = (path, path / "backbone")
    return next((place for place in places if (place / RECORD).is_file()), None)


def read_backbone(path: str | Path) -> Backbone:
    """Read a backbone written by `save_backbone`, or a run's newest export.

    `path` is the backbone's folder or the workdir of a run. Raises FileNotFoundError
    naming the path when neither holds a `backbone.json`, and UserError when the
    stored parameters do not fit the stored architecture. Warns with `StaleFile` when
    the run's newest checkpoint is newer.
    """
    folder = own_folder(path)
    if folder is None:
        raise FileNotFoundError(
            f"no {RECORD} in {str(path)!r} or its folder 'backbone'"
        )
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    record = read_json(folder / RECORD)
    if line := stale(folder, record):
        warnings.warn(line, StaleFile, stacklevel=2)
    with damaged(folder):
        backbone = record_to_backbone(record, None, str(folder))
        shapes = _abstract_params(backbone)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    params = restore_arrays(folder / "params", target, RECORD)
    return dataclasses.replace(backbone, params=params)


def stale(folder: Path, record: dict) -> str | None:
    """A line when a run's backbone is older than the run's newest checkpoint.

    folder: that of the backbone; record: its backbone.json.
    """
    there = record.get("step")
    newest = newest_step(folder.parent / "checkpoints")
    # One of a later step was written while its checkpoint was; a rerun makes the same.
    if there is None or newest is None or there >= newest:
        return None
    return (
        f"the backbone in {str(folder)!r} is of step {there}, the newest checkpoint of "
        f"its run of step {newest}; the run's own command makes it anew"
    )


def restore_arrays(folder: Path, target, record: str) -> Any:
    """A tree of arrays that Orbax wrote, of the shapes of `target`.

    record: name of the file beside it that tells the architecture. Raises UserError
    when the arrays are damaged or of another architecture.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder, target)
    except Exception as error:  # whatever a damaged file makes Orbax raise
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        reason = str(error).split("Truncating")[0].split("If this")[0]
        raise UserError(
            f"{folder.parent}: the parameters are damaged, or not of the architecture "
            f"that its {record} names: {' '.join(reason.split())[:600]}"
        ) from error


def is_flat(file: WeightFile) -> bool:
    """Whether a file has this project's own names."""
    return file.record is not None and file.record.get("naming") == "own"


def backbone_from_flat(file: WeightFile, source: str) -> Backbone:
    """A flat file: parameter paths as names, the record in its header.

    Raises UserError for a classifier or segmenter, and when the tensors are not those
    of the record's architecture.
    """
    assert file.record is not None
    kind = file.record["format"].removeprefix("ultradino_")
    if kind != "backbone":
        raise UserError(f"holds a {kind}; exports.formats.load_task reads it")
    params = jax.tree.map(jnp.asarray, nest(file.tensors))
    with damaged(source):
        backbone = record_to_backbone(file.record, params, source)
        abstract = _abstract_params(backbone)
    shapes = {k: x.shape for k, x in flat_names(abstract).items()}
    check_placement(file.tensors, shapes)
    return backbone


def _abstract_params(backbone: Backbone):
    side = backbone.image_size
    images = jax.ShapeDtypeStruct((1, side, side, backbone.channels), jnp.float32)
    return jax.eval_shape(backbone.model.init, jax.random.key(0), images)["params"]
