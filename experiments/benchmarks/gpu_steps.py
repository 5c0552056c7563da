"""What gpu_cell.py does with a compiled train step."""

import gzip
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from experiments.benchmarks.gpu_profile import kernel_table
from experiments.benchmarks.input_pipeline import Repeated
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.data.sources import CacheSource
from ultradino_jax.prepare import prepare
from ultradino_jax.run.meter import Meter
from ultradino_jax.tree import flat_names

# Steps: to warm up, to time at least and at most, and seconds to time for.
WARMUP, LEAST, MOST, SECONDS = 2, 5, 20, 4.0
# Steps from the pipeline.
FED = 15
TERMS = ("total", "dino_local", "dino_global", "koleo", "ibot")


def losses_of(metrics) -> dict:
    """The loss terms, and whether they are numbers."""
    losses = {name: float(metrics[name]) for name in TERMS if name in metrics}
    return {"losses": losses, "finite": bool(np.isfinite(list(losses.values())).all())}


def timed(step, state, batch) -> tuple[dict, object]:
    """(figures, the last state): steps waited for one by one, then without waiting."""
    start, seconds, metrics = time.perf_counter(), [], {}
    for i in range(WARMUP + MOST):
        before = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        after = time.perf_counter()
        if i < WARMUP:
            start = after
        else:
            seconds.append(after - before)
        if len(seconds) >= LEAST and after - start > SECONDS:
            break
    start = time.perf_counter()
    for _ in range(LEAST):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return {
        "steps": len(seconds),
        "ms": 1e3 * statistics.median(seconds),
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "ms_without_waiting": 1e3 * (time.perf_counter() - start) / LEAST,
        **losses_of(metrics),
    }, state


def profiled(step, state, batch, hlo: str | None, steps: int = 3) -> dict:
    """Kernels of `steps` steps by time; the program's text goes to the file `hlo`."""
    text = step.as_text() or ""
    if hlo:
        Path(hlo).write_bytes(gzip.compress(text.encode()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        return kernel_table(Path(folder), text, steps)


def digests(state) -> dict[str, str]:
    """SHA-256 of every part's bytes, and of all of them together."""
    parts = {}
    whole = hashlib.sha256()
    for name, leaf in flat_names(jax.device_get(state)).items():
        data = np.ascontiguousarray(leaf).tobytes()
        part = "/".join(name.split("/")[:3])
        parts.setdefault(part, hashlib.sha256()).update(data)
        whole.update(data)
    found = {part: digest.hexdigest()[:16] for part, digest in parts.items()}
    return {"whole": whole.hexdigest(), **found}


def repeated(init, step, batch, steps: int = 3) -> dict:
    """Two runs of a few steps from the same state, bit for bit."""
    found = []
    for _ in range(2):
        state = init()
        for _ in range(steps):
            state, _ = step(state, batch)
        found.append(digests(state))
        del state
    first, second = found
    return {
        "steps": steps,
        "equal": first == second,
        "differ": [name for name in first if first[name] != second[name]],
        "digests": first,
    }


def small_cache(folder: Path, images: int, size: tuple[int, int]) -> Repeated:
    """Phantoms of `size` pixels as a prepared cache, read again and again."""
    pictures = folder / "phantoms"
    pictures.mkdir()
    for index in range(images):
        image = Image.fromarray(render_phantom(index, size=size).image)
        image.convert("L").save(pictures / f"{index:04d}.png")
    options = {"region": False, "dedup": "none", "progress": False, "workers": 0}
    prepare(pictures, folder / "cache", **options)
    return Repeated(CacheSource(folder / "cache"))


def on_devices(batch: dict, sharding) -> dict:
    """The pipeline's batch as the step takes it."""
    arrays = {k: v for k, v in batch.items() if k not in ("index", "bad")}
    return jax.device_put(arrays, sharding)


def fed(stream, sharding, step, state, meter: Meter) -> dict:
    """Rates of training from the pipeline's stream, as the loop trains.

    A step is waited for once the next is dispatched. The first third of the batches is
    not counted: the pipeline's buffers were full.
    """
    waiting, first = None, FED // 3
    for seen in range(FED):
        if seen == first:
            jax.block_until_ready(waiting)
            meter.reset()
        with meter.waiting():
            batch = next(stream)
        state, metrics = step(state, on_devices(batch, sharding))
        jax.block_until_ready(waiting)
        waiting = metrics
        meter.steps += 1
    jax.block_until_ready(waiting)
    rates = meter.read()
    return {"steps": FED - first, "ms": 1e3 * rates["seconds_per_step"], **rates}
