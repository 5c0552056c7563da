"""One training step of gpu.py, timed in a process of its own.

    python -m experiments.benchmarks.gpu_cell SPEC OUT

SPEC is JSON: {"cell": "vitb remat=norms", "gpus": 0, "lock": PATH, ..}; OUT is
written as JSON. The batch is random, made once on the host: uint8 noise (zeros run
faster than real data) and masks as the pipeline draws them.
"""

import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import pretrain_smoke, pretrain_vitb, pretrain_vits
from experiments.benchmarks.ahead import abstract_batch
from experiments.benchmarks.gpu_steps import (
    FED,
    fed,
    on_devices,
    profiled,
    repeated,
    small_cache,
    timed,
)
from experiments.benchmarks.gpu_worker import alone, kept, work
from ultradino_jax.data.crops import NUM_GLOBAL
from ultradino_jax.data.masking import sample_masks
from ultradino_jax.pretraining.step import init_state
from ultradino_jax.run.feed import pipeline
from ultradino_jax.run.meter import Meter, peak_flops
from ultradino_jax.run.plan import Plan, make_plan
from ultradino_jax.run.program import compiled_step
from ultradino_jax.sharding import batch_sharding, make_mesh, state_shardings

MODELS = {
    "vitb": pretrain_vitb.get_config,
    "vits": pretrain_vits.get_config,
    "smoke": lambda: pretrain_smoke.get_config("seconds"),
}
SHORT = {
    "remat": "model.remat",
    "attention": "model.attention",
    "unroll": "model.unroll",
    "dtype": "model.dtype",
    "drop_path": "model.drop_path",
    "accum": "accum_steps",
}
SWITCHES = ("profile", "pipeline", "repeat")


def parse_cell(cell: str) -> tuple[str, dict]:
    """'vitb remat=norms batch=256' -> ('vitb', {'remat': 'norms', 'batch': 256}).

    A bare word besides the model is a switch. Raises ValueError for an unknown word.
    """
    model, *words = cell.split()
    if model not in MODELS:
        raise ValueError(f"model {model!r} of a cell is none of {', '.join(MODELS)}")
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and key not in SWITCHES:
            raise ValueError(f"{key!r} in a cell is none of {', '.join(SWITCHES)}")
        options[key] = value if equals else True
        with contextlib.suppress(json.JSONDecodeError):
            options[key] = json.loads(value) if equals else True
    return model, options


def cell_config(model: str, options: dict, devices: int):
    """The config of a cell; batch and groups are per device (by default 256 and 1).

    Raises KeyError for a key the config has not.
    """
    config = MODELS[model]().lock()  # no new keys
    rest = {k: v for k, v in options.items() if k not in SWITCHES}
    config.batch_size = rest.pop("batch", 256) * devices
    config.groups = rest.pop("groups", 1) * devices
    config.update_from_flattened_dict({SHORT.get(k, k): v for k, v in rest.items()})
    return config


def random_batch(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the pipeline's, of noise."""
    rng, feed = np.random.default_rng(seed), plan.feed
    shapes = abstract_batch(plan)
    crops = {
        name: np.frombuffer(rng.bytes(shape.size), np.uint8).reshape(shape.shape)
        for name, shape in shapes.items()
        if name.endswith("crops")
    }
    side = plan.crops.global_size // feed.patch_size
    rows = NUM_GLOBAL * feed.batch_size // plan.groups
    drawn = [
        sample_masks(
            random.Random(f"{seed}/{group}"),
            rows,
            (side, side),
            probability=feed.mask_probability,
            ratio=feed.mask_ratio,
            style=feed.mask_style,
        )
        for group in range(plan.groups)
    ]
    names = ("masks", "mask_indices", "mask_weights")
    stacked = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    masks = dict(zip(names, stacked, strict=True))
    masks["masks"] = masks["masks"].reshape(shapes["masks"].shape)
    return crops | masks


def mesh_of(gpus: int):
    """Mesh of the first `gpus` devices, 0 for all."""
    return make_mesh(devices=jax.devices()[: gpus or None])


def initialiser(plan: Plan, mesh):
    """The jitted program that makes the train state of step 0."""

    def init():
        key = jax.random.key(plan.feed.seed)
        return init_state(plan.modules, plan.optimizer, key, plan.channels)

    return jax.jit(init, out_shardings=state_shardings(jax.eval_shape(init), mesh))


def memory_gb(compiled) -> dict:
    """What XLA's buffer assignment asks for, GB per device."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    names = ("argument", "output", "temp", "alias")
    row = {n: getattr(found, f"{n}_size_in_bytes") / 1e9 for n in names}
    row["total"] = row["argument"] + row["output"] + row["temp"] - row["alias"]
    return {name: round(value, 3) for name, value in row.items()}


def measure(spec: dict) -> dict:
    """The row of a cell."""
    model, options = parse_cell(spec["cell"])
    mesh = mesh_of(spec.get("gpus", 0))
    config = cell_config(model, options, mesh.size)
    plan = make_plan(config, mesh.size)
    with contextlib.ExitStack() as stack:
        stream = None
        if options.get("pipeline"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            images = min(128, config.data.phantom_images)
            source = small_cache(Path(folder), images, tuple(config.data.phantom_size))
            plan = dataclasses.replace(plan, source=source)
            stream = pipeline(plan, 0, FED + 1)
            stack.callback(stream.close)
        return measure_plan(spec, options, plan, mesh, stream)


def measure_plan(spec: dict, options: dict, plan: Plan, mesh, stream) -> dict:
    """The row of a plan, its batches from the stream if there is one."""
    lock, marks, sharding = (
        spec.get("lock"),
        [time.perf_counter()],
        batch_sharding(mesh),
    )
    size, num_devices = plan.feed.batch_size, mesh.size
    with alone(lock, False):
        init = initialiser(plan, mesh)
        state = jax.block_until_ready(init())
        arrays = next(stream) if stream else random_batch(plan)
        batch = on_devices(arrays, sharding)
        marks.append(time.perf_counter())
        lowered = compiled_step(plan, mesh, state).lower(state, batch)
        marks.append(time.perf_counter())
        step = lowered.compile()
        marks.append(time.perf_counter())
    names = ("init_seconds", "trace_seconds", "compile_seconds")
    row: dict[str, Any] = dict(
        zip(names, np.diff(marks).round(2).tolist(), strict=True)
    )
    row["predicted_gb"] = memory_gb(step)
    with alone(lock):
        if stream:
            meter = Meter(plan.flops_per_step, size, plan.dtype)
            row["fed"] = fed(stream, sharding, step, state, meter)
            state = init()
        figures, state = timed(step, state, batch)
        row |= figures
        memory = jax.devices()[0].memory_stats() or {}
        row["peak_gb"] = memory.get("peak_bytes_in_use", 0) / 1e9 or None
        if options.get("profile"):
            row["profile"] = kept(profiled, step, state, batch, spec.get("hlo"))
        if options.get("repeat"):
            del state
            row["repeat"] = kept(repeated, init, step, batch)
    seconds, peak = row["ms"] / 1e3, peak_flops(jax.devices()[0])
    row["images_per_second"] = size / seconds
    row["tflop"] = plan.flops_per_step / 1e12
    row["mfu"] = plan.flops_per_step / seconds / (peak * num_devices) if peak else None
    return row


if __name__ == "__main__":
    work(measure, sys.argv)
