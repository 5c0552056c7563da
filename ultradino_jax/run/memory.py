"""What a train step needs of a device's memory, before anything is compiled.

Which rows of activations are kept follows from `block.rematerialised`; how much is
alive beside them is fitted to what XLA allocates for an H100 (tests/run/test_memory.py
has the figures), so an estimate is good to a tenth.
"""

import os

import jax

from ultradino_jax.data.crops import NUM_GLOBAL, CropConfig
from ultradino_jax.models.packing import layout_of
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.run.settings import FeedSettings

# Settings of model.remat, the fastest first. On a GPU, to move what 'none' keeps costs
# more than to make it anew (experiments/benchmarks/NOTES.md); a CPU has the memory and
# lacks the arithmetic.
FASTEST = {"gpu": ("matmuls", "norms"), "cpu": ("none", "matmuls", "norms")}
# Values of the width D that a block keeps for each row, in the compute dtype.
KEPT = {"norms": 2, "matmuls": 10, "none": 15.4}
FITS = 0.95  # of the device's memory


def step_bytes(
    modules: Modules,
    crops: CropConfig,
    feed: FeedSettings,
    *,
    chunk_rows: int,
    accum_steps: int,
    devices: int,
    remat: str,
    unroll: int,
) -> float:
    """Bytes of each device for state, activations and logits of one step.

    What XLA takes for 'norms' with all blocks unrolled varies: this or up to half more.
    """
    model, head = modules.backbone, modules.dino_head
    d, depth = model.embed_dim, model.depth
    h, e, k = head.hidden_dim, head.bottleneck_dim, head.num_prototypes
    heads = 1 if modules.ibot_head is None else 2
    block = (4 + 2 * model.mlp_ratio) * d * d
    layers = d * h + (head.num_layers - 2) * h * h + h * e
    parameters = depth * block + heads * (layers + e * k)
    groups = feed.groups // (accum_steps * devices)  # on a device at a time
    b = groups * feed.batch_size // feed.groups
    extra = 1 + model.num_registers
    views = [
        (count * b, (side // model.patch_size) ** 2 + extra)
        for count, side in (
            (NUM_GLOBAL, crops.global_size),
            (crops.num_local, crops.local_size),
        )
        if count
    ]
    rows = groups * layout_of(views, groups).rows
    assert isinstance(model.drop_path, float | int)  # as the recipes have it
    kept = rows * (1 - model.drop_path)
    width = jax.numpy.dtype(model.dtype).itemsize
    unrolled = unroll >= depth
    # A loop stacks what a block has kept when it is done; unrolled, the making anew of
    # two blocks overlaps.
    blocks = KEPT[remat] * (depth + (not unrolled))
    blocks += (KEPT["matmuls"] - KEPT[remat]) * (1 + unrolled) * (remat == "norms")
    return (
        20 * parameters  # student, teacher, two moments and the gradient
        + blocks * kept * d * width
        + 4.5 * rows * d * 4  # the residual stream, its gradient and what joins them
        + 2.6 * min(chunk_rows, NUM_GLOBAL * b) * k * 4  # logits and their gradient
    )


def device_bytes() -> float:
    """The memory of a device of this process that JAX may use."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)


def choose_remat(
    wanted: str, unroll: int, depth: int, need, limit: float, platform: str
) -> tuple[str, int, str]:
    """(model.remat, model.unroll, a line about memory) for those of the config.

    wanted: 'auto' is the fastest that fits, or the smallest where nothing does. unroll:
    0 is all blocks, or one with 'norms', which then needs less. need(remat, unroll):
    bytes of a step. limit: bytes of a device. platform: 'cpu', 'gpu', ..
    """
    fastest = FASTEST.get(platform, FASTEST["gpu"])
    settings = [
        (remat, unroll or (1 if remat == "norms" else depth))
        for remat in (fastest if wanted == "auto" else (wanted,))
    ]
    fitting = [s for s in settings if need(*s) <= FITS * limit]
    remat, unroll = chosen = (*fitting, settings[-1])[0]
    why = ", the fastest that fits" if fitting else ", the smallest there is"
    line = (
        f"remat: {remat}{why if wanted == 'auto' else ''}, {unroll} of {depth} blocks "
        f"unrolled; a step needs about {need(*chosen) / 1e9:.1f} GB of the "
        f"{limit / 1e9:.1f} GB of a device"
    )
    if need(*chosen) > limit:
        line += (
            ": it will run out of memory. A smaller batch_size needs less, and so does "
            "the same batch in more groups, some at a time: accum_steps=4 and four "
            "times the groups, 256 images each being what the reference gives a GPU"
        )
    return remat, unroll, line
