"""Backbones: a frozen model with what feeds it, written as a folder.

The folder holds `backbone.json`, which says how to build and feed the model, and its
parameters (Orbax). own.py reads it.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ultradino_jax.sharding import wait_for_all
from ultradino_jax.tree import flat_names
from ultradino_jax.whole import whole_folder, write_json


def params_digest(params) -> str:
    """sha256 over names, shapes and bytes of all parameters of a tree."""
    sha = hashlib.sha256()
    for name, leaf in sorted(flat_names(params).items()):
        leaf = np.asarray(leaf)
        sha.update(f"{name}{leaf.shape}{leaf.dtype}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen model with everything needed to feed it.

    model, params: the Flax module and its parameters. image_size: side in pixels of
    its input. channels: C. mean, std: per channel, on the [0,1] scale. digest: sha256
    of the parameters. name and source say what it is and where it came from.
    """

    model: Any
    params: Any
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    source: str = ""

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of all parameters."""
        return params_digest(self.params)


def backbone_record(backbone: Backbone) -> dict:
    """JSON values: the module's class and fields, input size and statistics, name."""
    fields = dataclasses.fields(backbone.model)
    model = {f.name: getattr(backbone.model, f.name) for f in fields if f.init}
    for name in ("parent", "name"):
        model.pop(name, None)
    model["dtype"] = jnp.dtype(model["dtype"]).name
    return {
        "format": "ultradino_backbone",
        "class": type(backbone.model).__name__,
        "model": model,
        "image_size": backbone.image_size,
        "channels": backbone.channels,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "name": backbone.name,
    }


def save_backbone(directory: str | Path, backbone: Backbone, **facts) -> None:
    """Write a backbone: `params/` (Orbax) and `backbone.json`.

    `facts` (JSON values) are kept beside it, e.g. the step it was exported at. An
    existing folder is replaced only once the new one is complete. With several
    processes all of them call it, as Orbax expects.
    """
    first = jax.process_index() == 0
    with whole_folder(directory, first=first, meet=wait_for_all) as fresh:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(fresh / "params", backbone.params)
        if first:
            record = {**backbone_record(backbone), **facts}
            write_json(fresh / "backbone.json", record)
