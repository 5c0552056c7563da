"""A trained segmentation model with everything needed to feed it, and its folder."""

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ultradino_jax.checkpoint import Backbone, backbone_record, record_to_backbone
from ultradino_jax.evaluators.features import Preprocess, row_sharding
from ultradino_jax.models.upernet import UperNet
from ultradino_jax.models.vit import ViT

RECORD = "segmenter.json"
REGISTERS = ("drop", "keep")


@functools.partial(jax.jit, static_argnames=("model", "preprocess"))
def _logits(model, preprocess, variables, images):
    return model.apply(variables, preprocess.normalise(images))


@functools.partial(jax.jit, static_argnames=("model", "preprocess"))
def _classes(model, preprocess, variables, images):
    logits = model.apply(variables, preprocess.normalise(images))
    return jnp.argmax(logits, axis=-1).astype(jnp.uint8)


@dataclass(frozen=True)
class Segmenter:
    """backbone: how its input is made and its module (no parameters); model: UperNet;
    variables: {'params', 'batch_stats'}; classes: Y names, background first.
    """

    backbone: Backbone
    model: UperNet
    variables: Any
    classes: tuple[str, ...]

    @property
    def preprocess(self) -> Preprocess:
        """The backbone's own."""
        return Preprocess.of(self.backbone)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B,S,S,C] -> float32 [B,S,S,Y]."""
        return np.asarray(_logits(self.model, self.preprocess, self.variables, images))

    def predict(self, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """uint8 [n,S,S,C] -> class indices uint8 [n,S,S], in batches of one shape."""
        batch_size = min(batch_size, len(images))
        by_row, everywhere = row_sharding(batch_size)
        variables = jax.device_put(self.variables, everywhere)
        parts, pending = [], None
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            missing = batch_size - len(batch)
            batch = np.concatenate([batch, batch[-1:].repeat(missing, axis=0)])
            batch = jax.device_put(batch, by_row)
            result = _classes(self.model, self.preprocess, variables, batch)
            if pending is not None:  # fetch the last batch while this one is computed
                parts.append(np.asarray(pending))
            pending = result
        return np.concatenate([*parts, np.asarray(pending)])[: len(images)]


def usable_backbone(backbone: Backbone, registers: str) -> Backbone:
    """Float32, no drop path; its register tokens kept, or dropped as the reference.

    Raises ValueError for another word.
    """
    if registers not in REGISTERS:
        raise ValueError(
            f"registers={registers!r}: choose one of {', '.join(REGISTERS)}"
        )
    model = backbone.model.clone(dtype=jnp.float32, drop_path=0.0)
    params = backbone.params
    if registers == "drop" and model.num_registers:
        model = model.clone(num_registers=0)
        params = {k: v for k, v in params.items() if k != "register_tokens"}
    return dataclasses.replace(backbone, model=model, params=params)


def with_drop_path(model, rate: float):
    """The backbone with a rate that grows linearly from 0 to `rate` over the blocks.

    USFM has no rate per block here: all its blocks take half of it, the same mean.
    """
    if isinstance(model, ViT):
        depth = model.depth
        return model.clone(
            drop_path=tuple(rate * i / max(depth - 1, 1) for i in range(depth))
        )
    return model.clone(drop_path=rate / 2)


def initial_variables(model: UperNet, backbone: Backbone, seed: int):
    """Fresh neck and head around a copy of the backbone's parameters."""
    side = backbone.image_size
    images = jnp.zeros((1, side, side, backbone.channels))
    variables = dict(jax.jit(model.init)(jax.random.key(seed), images))
    params = jax.tree.map(jnp.copy, backbone.params)
    variables["params"] = {**variables["params"], "backbone": params}
    return variables


def save_segmenter(folder: str | Path, segmenter: Segmenter, **facts) -> None:
    """Write variables (Orbax) and record; `facts` are kept in the record.

    The folder appears once it is complete.
    """
    folder = Path(folder).absolute()
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh / "variables", segmenter.variables)
    model = segmenter.model
    record = {
        "format": "ultradino_segmenter",
        "backbone": backbone_record(segmenter.backbone),
        "upernet": {
            "taps": list(model.taps),
            "channels": model.channels,
            "norm": model.norm,
        },
        "classes": list(segmenter.classes),
        **facts,
    }
    (fresh / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict]:
    """(segmenter, its record) from its folder, or the run's folder above it.

    Raises FileNotFoundError naming the path when there is none, and OSError or
    ValueError when what is there is damaged.
    """
    path = Path(path).absolute()
    for folder in (path, path / "segmenter"):
        if (folder / RECORD).is_file():
            break
    else:
        raise FileNotFoundError(
            f"no {RECORD} in {str(path)!r} or its folder 'segmenter'"
        )
    record = json.loads((folder / RECORD).read_text())
    backbone = record_to_backbone(record["backbone"], None, str(folder))
    options = record["upernet"]
    model = UperNet(
        backbone.model,
        num_classes=len(record["classes"]),
        taps=tuple(options["taps"]),
        channels=options["channels"],
        norm=options["norm"],
    )
    side = backbone.image_size
    images = jax.ShapeDtypeStruct((1, side, side, backbone.channels), jnp.float32)
    target = jax.eval_shape(model.init, jax.random.key(0), images)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target
    )
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore(folder / "variables", dict(target))
    segmenter = Segmenter(backbone, model, variables, tuple(record["classes"]))
    return segmenter, record
