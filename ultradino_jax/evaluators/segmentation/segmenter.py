"""A trained segmentation model with everything needed to feed it, and its folder."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.segmentation.networks import Network
from ultradino_jax.models.upernet import UperNet, default_taps
from ultradino_jax.models.vit import ViT
from ultradino_jax.sharding import row_sharding
from ultradino_jax.weights.backbone import Backbone, backbone_record
from ultradino_jax.weights.own import record_to_backbone, restore_arrays
from ultradino_jax.whole import read_json, whole_folder, write_json

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
    """backbone: how its input is made, and for UperNet its backbone's module (no
    parameters); model: UperNet or the module of a Network; variables: {'params'[,
    'batch_stats']}; classes: Y names, background first.
    """

    backbone: Backbone | Network
    model: Any
    variables: Any
    classes: tuple[str, ...]
    letterbox: bool = False

    @property
    def preprocess(self) -> Preprocess:
        """The backbone's own, stretched or with its aspect."""
        return Preprocess.of(self.backbone, letterbox=self.letterbox)

    def with_parameters(self) -> Backbone:
        """UperNet's backbone as it was trained."""
        assert isinstance(self.backbone, Backbone)
        return dataclasses.replace(
            self.backbone, params=self.variables["params"]["backbone"]
        )

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

    Raises UserError for another word.
    """
    if registers not in REGISTERS:
        raise UserError(
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


def segmentation_model(
    backbone: Backbone | Network, num_classes: int, *, norm: str, head_channels: int
):
    """The module that is trained: UperNet on a backbone, or the network as it is.

    norm, head_channels: UperNet's; 0 channels stands for the backbone's D.
    """
    if isinstance(backbone, Network):
        return backbone.build(num_classes)
    return UperNet(
        backbone.model,
        num_classes=num_classes,
        taps=default_taps(backbone.model.depth),
        channels=head_channels or None,
        norm=norm,
    )


def initial_variables(model, backbone: Backbone | Network, seed: int):
    """Fresh variables; UperNet's neck and head around a copy of the backbone's."""
    side = backbone.image_size
    images = jnp.zeros((1, side, side, backbone.channels))
    # A network of a hundred kernels compiles five times faster with this generator.
    impl = "rbg" if isinstance(backbone, Network) else None
    key = jax.random.key(seed, impl=impl)
    variables = dict(jax.jit(model.init)(key, images))
    if isinstance(backbone, Network):
        return variables
    params = jax.tree.map(jnp.copy, backbone.params)
    variables["params"] = {**variables["params"], "backbone": params}
    return variables


def save_segmenter(folder: str | Path, segmenter: Segmenter, **facts) -> None:
    """Write variables (Orbax) and record; `facts` are kept in the record.

    The folder appears once it is complete.
    """
    record = {
        "format": "ultradino_segmenter",
        **architecture_record(segmenter),
        "classes": list(segmenter.classes),
        "letterbox": segmenter.letterbox,
        **facts,
    }
    with whole_folder(folder) as fresh:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(fresh / "variables", segmenter.variables)
        write_json(fresh / RECORD, record)


def architecture_record(segmenter: Segmenter) -> dict:
    """JSON values from which `module_of` makes the module again."""
    backbone, model = segmenter.backbone, segmenter.model
    if isinstance(backbone, Network):
        return {"network": backbone.record()}
    upernet = {"taps": model.taps, "channels": model.channels, "norm": model.norm}
    return {"backbone": backbone_record(backbone), "upernet": upernet}


def module_of(record: dict, folder: str) -> tuple[Backbone | Network, Any]:
    """(how input is made, module) of an `architecture_record` with 'classes'."""
    num_classes = len(record["classes"])
    if "network" in record:
        network = Network.from_record(record["network"])
        return network, network.build(num_classes)
    backbone = record_to_backbone(record["backbone"], None, folder)
    options = {**record["upernet"], "taps": tuple(record["upernet"]["taps"])}
    return backbone, UperNet(backbone.model, num_classes=num_classes, **options)


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict]:
    """(segmenter, its record) from its folder, or the run's folder above it.

    Raises FileNotFoundError naming the path when there is none, and OSError or
    UserError when what is there is damaged.
    """
    path = Path(path).absolute()
    for folder in (path, path / "segmenter"):
        if (folder / RECORD).is_file():
            break
    else:
        raise FileNotFoundError(
            f"no {RECORD} in {str(path)!r} or its folder 'segmenter'"
        )
    record = read_json(folder / RECORD)
    with damaged(folder):
        classes, letterbox = tuple(record["classes"]), record.get("letterbox", False)
        backbone, model = module_of(record, str(folder))
        side = backbone.image_size
        images = jax.ShapeDtypeStruct((1, side, side, backbone.channels), jnp.float32)
        target = jax.eval_shape(model.init, jax.random.key(0), images)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target
    )
    variables = restore_arrays(folder / "variables", dict(target), RECORD)
    return Segmenter(backbone, model, variables, classes, letterbox), record
