"""Run checkpoints (resume) and exported backbones (use), both through Orbax.

A run keeps `workdir/checkpoints/<step>` with the train state and a JSON record of
where the data stream stands. A backbone is a folder with `backbone.json`, which says
how to build and feed it, and its parameters.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ultradino_jax.models.usfm import USFM
from ultradino_jax.models.vit import ViT
from ultradino_jax.tree import flat_names


@jax.jit
def checksum(tree) -> jax.Array:
    """uint32 that changes with any bit of any leaf, and with nothing else.

    A wrapping sum of bits times odd position weights: exact integer arithmetic, so
    neither the order of summation nor the number of devices matters.
    """

    def leaf_sum(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    sums = [leaf_sum(x) for x in jax.tree.leaves(tree)]
    return sum((2 * i + 1) * s for i, s in enumerate(sums)).astype(jnp.uint32)


@dataclasses.dataclass
class Retention:
    """Which checkpoints stay: the newest `last`, every `every` steps, the best.

    every: 0 for none. best: whether the one of the highest score stays, the earliest
    of equals. scores: {step: score}, filled in while the run goes on.
    """

    last: int = 3
    every: int = 0
    best: bool = False
    scores: dict[int, float] = dataclasses.field(default_factory=dict)

    def kept(self, steps: list[int]) -> list[bool]:
        """Whether each of the steps, oldest first, stays."""
        newest = set(steps[-self.last :])
        scored = [step for step in steps if step in self.scores]
        if self.best and scored:
            newest.add(max(scored, key=lambda step: (self.scores[step], -step)))
        return [
            step in newest or (self.every > 0 and step % self.every == 0)
            for step in steps
        ]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """`kept` in the shape of an Orbax preservation policy."""
        del context
        return self.kept([info.step for info in checkpoints])


class RunCheckpoints:
    """Asynchronous checkpoints of a run, newest last.

    directory: `workdir/checkpoints`. keep: which of them to hold, or how many.
    """

    def __init__(self, directory: str | Path, *, keep: int | Retention = 3):
        self.directory = Path(directory).absolute()
        self.retention = keep if isinstance(keep, Retention) else Retention(keep)
        self._open()

    def _open(self):
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(preservation_policy=self.retention),
            item_names=("state", "meta"),
        )

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Start writing; returns once the arrays are copied from the device."""
        if step in self.manager.all_steps():
            return
        meta = {**meta, "checksum": int(checksum(state))}
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )

    def restore(self, abstract_state: Any, report=print):
        """(state, meta) of the newest checkpoint that is whole, or None.

        `abstract_state` holds ShapeDtypeStructs with the shardings wanted now, which
        need not be those of the run that saved. A checkpoint that cannot be read, or
        whose checksum differs, is reported, set aside as `<step>.corrupt` and the one
        before it is used.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state),
                        meta=ocp.args.JsonRestore(),
                    ),
                )
                state, meta = restored["state"], restored["meta"]
                if int(checksum(state)) != meta["checksum"]:
                    raise ValueError("checksum differs from the one saved")
                return state, meta
            except Exception as error:  # whatever a damaged file makes Orbax raise
                reason = str(error).strip().splitlines()[0][:200]
                report(
                    f"checkpoint {step} is not usable ({type(error).__name__}: "
                    f"{reason}); falling back to the one before"
                )
                self._set_aside(step)
        return None

    def _set_aside(self, step: int) -> None:
        self.manager.close()
        if jax.process_index() == 0:
            target = self.directory.parent / "corrupt" / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self.directory / str(step), target)
        _wait_for_all("damaged checkpoint set aside")
        self._open()

    def newest(self) -> int | None:
        """Step of the newest checkpoint that is complete on disk, or None."""
        names = [path.name for path in self.directory.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

    def wait(self) -> None:
        """Block until the save in flight is on disk; raises if it failed."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save in flight and release Orbax's threads."""
        self.manager.close()


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


MODEL_CLASSES = {"ViT": ViT, "USFM": USFM}


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


def record_to_backbone(record: dict, params, source: str) -> Backbone:
    """The inverse, given the parameters. Raises ValueError for an unknown class."""
    name = record.get("class", "ViT")
    if name not in MODEL_CLASSES:
        raise ValueError(f"{source}: unknown model class {name!r} in its record")
    fields = {**record["model"], "dtype": jnp.dtype(record["model"]["dtype"])}
    return Backbone(
        model=MODEL_CLASSES[name](**fields),
        params=params,
        image_size=record["image_size"],
        channels=record["channels"],
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        name=record["name"],
        source=source,
    )


def save_backbone(directory: str | Path, backbone: Backbone, **facts) -> None:
    """Write a backbone: `params/` (Orbax) and `backbone.json`.

    `facts` (JSON values) are kept beside it, e.g. the step it was exported at. An
    existing folder is replaced only once the new one is complete. With several
    processes all of them call it, as Orbax expects.
    """
    directory = Path(directory).absolute()
    fresh = directory.with_name(directory.name + ".new")
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
    _wait_for_all("fresh folder")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh / "params", backbone.params)
    if first:
        record = {**backbone_record(backbone), **facts}
        (fresh / "backbone.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        fresh.rename(directory)
    _wait_for_all("backbone in place")


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def load_backbone(path: str | Path) -> Backbone:
    """Read a backbone written by `save_backbone`, or a run's newest export.

    `path` is the backbone's folder or the workdir of a run. Raises FileNotFoundError
    naming the path when neither holds a `backbone.json`, and ValueError when the
    stored parameters do not fit the stored architecture.
    """
    path = Path(path).absolute()
    for folder in (path, path / "backbone"):
        if (folder / "backbone.json").is_file():
            break
    else:
        raise FileNotFoundError(
            f"no backbone.json in {str(path)!r} or its folder 'backbone'"
        )
    record = json.loads((folder / "backbone.json").read_text())
    backbone = record_to_backbone(record, None, str(folder))
    side = backbone.image_size
    images = jax.ShapeDtypeStruct((1, side, side, backbone.channels), jnp.float32)
    target = jax.eval_shape(backbone.model.init, jax.random.key(0), images)["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), target
    )
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", target)
    return dataclasses.replace(backbone, params=params)
