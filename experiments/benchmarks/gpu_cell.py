"""One training step of gpu.py, timed in a process of its own.

    python -m experiments.benchmarks.gpu_cell SPEC OUT

SPEC is JSON: {'cell': 'vitb remat=dots batch=256', 'gpus': 0, 'lock': PATH, ..}; OUT is
written as JSON. The batch is random, made once on the host: uint8 noise (zeros run
faster than real data) and masks as the pipeline draws them.
"""

import contextlib
import fcntl
import gzip
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jaxlib
import numpy as np

from configs import pretrain_smoke, pretrain_vitb, pretrain_vits
from experiments.benchmarks.ahead import abstract_batch
from experiments.benchmarks.gpu_profile import kernel_table
from ultradino_jax.data.crops import NUM_GLOBAL
from ultradino_jax.data.masking import sample_masks
from ultradino_jax.pretraining.step import init_state
from ultradino_jax.run.meter import peak_flops
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
# Steps: to warm up, to time at least and at most, and seconds to time for.
WARMUP, LEAST, MOST, SECONDS = 2, 5, 20, 4.0


def parse_cell(cell: str) -> tuple[str, dict]:
    """'vitb remat=dots batch=256' -> ('vitb', {'remat': 'dots', 'batch': 256}).

    A bare word besides the model is a switch. Raises ValueError for an unknown model.
    """
    model, *words = cell.split()
    if model not in MODELS:
        raise ValueError(f"model {model!r} of a cell is none of {', '.join(MODELS)}")
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        options[key] = value if equals else True
        with contextlib.suppress(json.JSONDecodeError):
            options[key] = json.loads(value) if equals else True
    return model, options


def cell_config(model: str, options: dict, devices: int):
    """The config of a cell; batch and groups are per device (by default 256 and 1).

    Raises KeyError for a key the config has not.
    """
    config = MODELS[model]().lock()  # no new keys
    rest = {k: v for k, v in options.items() if k != "profile"}
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


def fresh_state(plan: Plan, mesh):
    """The train state of step 0, made by one program."""

    def init():
        key = jax.random.key(plan.feed.seed)
        return init_state(plan.modules, plan.optimizer, key, plan.channels)

    shardings = state_shardings(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=shardings)()


def about_device() -> dict:
    """What ran."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": getattr(device.client, "platform_version", "").replace("\n", " "),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


@contextlib.contextmanager
def holding(path: str | None, how: int):
    """A lock on a file: cells compile side by side (shared) but are timed alone."""
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, how)
        yield


def memory_gb(compiled) -> dict:
    """What XLA's buffer assignment asks for, GB per device."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    names = ("argument", "output", "temp", "alias")
    row = {n: getattr(found, f"{n}_size_in_bytes") / 1e9 for n in names}
    row["total"] = row["argument"] + row["output"] + row["temp"] - row["alias"]
    return {name: round(value, 3) for name, value in row.items()}


def timed(compiled, state, batch) -> tuple[dict, object]:
    """(figures, the last state): steps waited for one by one, then without waiting."""
    start = time.perf_counter()
    seconds = []
    for i in range(WARMUP + MOST):
        if i == WARMUP:
            start = time.perf_counter()
        before = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        if i >= WARMUP:
            seconds.append(time.perf_counter() - before)
        if len(seconds) >= LEAST and time.perf_counter() - start > SECONDS:
            break
    start = time.perf_counter()
    for _ in range(LEAST):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    flowing = (time.perf_counter() - start) / LEAST
    losses = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    terms = ("total", "dino_local", "dino_global", "koleo", "ibot")
    return {
        "steps": len(seconds),
        "ms": 1e3 * statistics.median(seconds),
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "ms_without_waiting": 1e3 * flowing,
        "losses": {k: losses[k] for k in terms if k in losses},
        "finite": bool(np.isfinite([losses[k] for k in terms if k in losses]).all()),
    }, state


def profiled(compiled, state, batch, hlo: Path | None, steps: int = 3) -> dict:
    """Kernels of `steps` steps by total time; the program's text goes to `hlo`."""
    text = compiled.as_text() or ""
    if hlo:
        hlo.write_bytes(gzip.compress(text.encode()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = compiled(state, batch)
            jax.block_until_ready(state)
        return kernel_table(Path(folder), text, steps)


def measure(spec: dict) -> dict:
    """The row of a cell."""
    model, options = parse_cell(spec["cell"])
    mesh = mesh_of(spec.get("gpus", 0))
    config = cell_config(model, options, mesh.size)
    plan = make_plan(config, mesh.size)
    lock, marks = spec.get("lock"), [time.perf_counter()]
    with holding(lock, fcntl.LOCK_SH):
        state = jax.block_until_ready(fresh_state(plan, mesh))
        batch = jax.device_put(random_batch(plan), batch_sharding(mesh))
        marks.append(time.perf_counter())
        lowered = compiled_step(plan, mesh, state).lower(state, batch)
        marks.append(time.perf_counter())
        compiled = lowered.compile()
        marks.append(time.perf_counter())
    names = ("init_seconds", "trace_seconds", "compile_seconds")
    row = dict(zip(names, np.diff(marks).round(2).tolist(), strict=True))
    row["predicted_gb"] = memory_gb(compiled)
    with holding(lock, fcntl.LOCK_EX):
        figures, state = timed(compiled, state, batch)
        row |= figures
        if options.get("profile"):
            hlo = spec.get("hlo")
            found = profiled(compiled, state, batch, Path(hlo) if hlo else None)
            row["profile"] = found
    seconds, peak = row["ms"] / 1e3, peak_flops(jax.devices()[0])
    row["images_per_second"] = config.batch_size / seconds
    row["tflop"] = plan.flops_per_step / 1e12
    row["mfu"] = plan.flops_per_step / seconds / (peak * mesh.size) if peak else None
    memory = jax.devices()[0].memory_stats() or {}
    row["peak_gb"] = memory.get("peak_bytes_in_use", 0) / 1e9 or None
    return row


def work(measure, argv) -> None:
    """The main function of a worker: measure(spec) to OUT; an error is a row too."""
    spec, out = json.loads(argv[1]), Path(argv[2])
    row = about_device()
    try:
        row |= measure(spec)
    except Exception as error:  # whatever it is, it is this row's and the rest goes on
        lines = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0]}"[:300]
        out.write_text(json.dumps(row))
        raise
    out.write_text(json.dumps(row))


if __name__ == "__main__":
    work(measure, sys.argv)
