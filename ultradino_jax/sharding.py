"""Device mesh and partition rules: where every array of the train state lives."""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ultradino_jax.tree import map_with_name

BATCH_AXES = ("data", "fsdp")

# Ordered (regular expression on the path, axis split over 'fsdp' or None). The first
# match decides. Optimiser moments carry their parameter's path, so they follow it.
DATA_PARALLEL = ((r"", None),)
FSDP = (
    (r"/(kernel|v)$", -1),
    (r"/pos_embed$", -1),
    (r"", None),
)


# jaxlib comes without types, so Device reads as a variable.
def make_mesh(
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
):
    """Mesh ('data', 'fsdp') over all devices, `fsdp` of them sharing one copy.

    Raises ValueError when the number of devices is not divisible by `fsdp`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"{len(devices)} devices cannot form fsdp groups of {fsdp}")
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def batch_sharding(mesh) -> NamedSharding:
    """Leading axis W of every batch array over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state, mesh, rules=None):
    """NamedSharding of every leaf by the first rule that matches its path.

    Without `rules`, FSDP's when the mesh has an fsdp axis above 1, else data
    parallel's. Raises ValueError for a leaf no rule matches, or whose axis is not
    divisible by the mesh.
    """
    size = mesh.shape["fsdp"]
    rules = rules if rules is not None else (FSDP if size > 1 else DATA_PARALLEL)

    def place(name, leaf):
        for pattern, axis in rules:
            if not re.search(pattern, name):
                continue
            if axis is None or leaf.ndim == 0:
                return replicated(mesh)
            if leaf.shape[axis] % size:
                raise ValueError(
                    f"{name} of shape {leaf.shape}: axis {axis} is not divisible by "
                    f"the {size} devices of the fsdp axis"
                )
            spec = [None] * leaf.ndim
            spec[axis] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*spec))
        raise ValueError(f"no partition rule matches {name}")

    return map_with_name(place, abstract_state)


def abstract_with(shardings, abstract_state):
    """ShapeDtypeStructs that carry their sharding, as Orbax wants its targets."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_state,
        shardings,
    )


def resolve_groups(groups: int, batch_size: int, devices: int) -> int:
    """Number of groups W that `devices` devices can share: the least multiple.

    Raises ValueError when the batch cannot be cut into that many groups.
    """
    resolved = int(np.lcm(groups, devices))
    if batch_size % resolved:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by {resolved} groups "
            f"(groups {groups}, {devices} devices)"
        )
    return resolved


def wait_for_all(what: str) -> None:
    """A barrier of all processes; nothing with one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def row_sharding(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
    """(rows over the local devices, a copy on each); one device if they do not fit."""
    devices = jax.local_devices()
    if batch_size % len(devices):
        devices = devices[:1]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(
        mesh, PartitionSpec()
    )
