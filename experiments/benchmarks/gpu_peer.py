"""A PyTorch peer's training step on the GPU, at a cell's sizes. Part of gpu.py.

    python -m experiments.benchmarks.gpu_peer SPEC OUT

SPEC is JSON: {'cell': 'vitb batch=256', 'peer': .., 'python': PATH, 'threads': 8}. The
peer is served by torch_step.py in an environment of its own, with our initial weights
and the same noise and masks as our cell; drop path is the cell's (lightly-train has its
own). JAX only writes the input, on the CPU.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import jax

from experiments.benchmarks.gpu_cell import cell_config, parse_cell, random_batch
from experiments.benchmarks.gpu_steps import LEAST, WARMUP
from experiments.benchmarks.gpu_worker import work
from experiments.benchmarks.torch_input import write_input
from experiments.benchmarks.turns import Worker
from ultradino_jax.run.meter import peak_of
from ultradino_jax.run.plan import make_plan


def measure(spec: dict) -> dict:
    """The row of a peer's cell."""
    config = cell_config(*parse_cell(spec["cell"]), 1)
    plan = make_plan(config, 1)
    script = str(Path(__file__).with_name("torch_step.py"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.npz"
        write_input(config, plan, random_batch(plan), path)
        jax.clear_caches()
        command = [spec["python"], script, spec["peer"], str(path)]
        peer = Worker([*command, str(spec["threads"]), "auto"])
        try:
            for _ in range(WARMUP):
                peer.step()
            seconds = [peer.step() for _ in range(2 * LEAST)]
        finally:
            peer.close()
    median = statistics.median(seconds)
    device = peer.about.get("device", "cpu")
    peak = peak_of(device)
    return {
        "device": device,
        "torch": peer.about["torch"],
        "steps": len(seconds),
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(seconds),
        "ms_max": 1e3 * max(seconds),
        "images_per_second": config.batch_size / median,
        "mfu": plan.flops_per_step / median / peak if peak else None,
        "peak_gb": peer.peak_gb,
        "losses": peer.first_terms,
    }


if __name__ == "__main__":
    work(measure, sys.argv)
