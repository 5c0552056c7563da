"""What looking after a run costs: step time with and without, and the amortised ratio.

    python -m experiments.benchmarks.monitors --config=configs/pretrain_smoke.py

Two compiled steps, with and without the numbers of pretraining/diagnostics.py,
take turns on the same batch, so that a busy machine slows both alike; medians are
compared. Then the probe is run twice: the first time it also reads its images and
compiles. Prints one JSON line. `--every` and `--total` are the cadence and the length
that the cost is spread over (default: the recipe's, configs/pretrain_vitb.py).
"""

import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ultradino_jax.health.checkups import Doctor
from ultradino_jax.pretraining import step as pretrain
from ultradino_jax.pretraining.diagnostics import watch
from ultradino_jax.run.feed import pipeline
from ultradino_jax.run.plan import make_plan
from ultradino_jax.run.program import teacher_of
from ultradino_jax.run.writer import Writer
from ultradino_jax.sharding import batch_sharding, make_mesh, replicated

CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain_smoke.py")
ROUNDS = flags.DEFINE_integer("rounds", 20, "timed steps of each kind")
EVERY = flags.DEFINE_integer("every", 3906, "steps between two looks")
TOTAL = flags.DEFINE_integer("total", 40 * 3906, "steps of the run")


def unwatched(*args):
    """`watch` without its numbers."""
    del args
    return {}


def compiled(plan, state, batch, how):
    """The train step as an executable that keeps its input alive."""
    with mock.patch.object(pretrain, "watch", how):
        step = pretrain.make_train_step(
            plan.modules,
            plan.objective,
            plan.optimizer,
            schedules=plan.schedules,
        )
        return jax.jit(step).lower(state, batch).compile()


def median_seconds(steps: dict, state, batch, rounds: int) -> dict[str, float]:
    """Median seconds of each step; they take turns."""
    times = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            if turn:  # the first touches fresh memory
                times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


def examine_seconds(plan, mesh, state, times: int = 2) -> list[float]:
    """Seconds of each look, panels included."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(folder)
        doctor = Doctor(
            plan.health,
            plan.facts,
            plan.source,
            plan.modules.dino_head,
            workdir=Path(folder),
            writer=writer,
            scores={},
            total_steps=plan.total_steps,
            start=0,
            say=print,
        )
        seconds = []
        for i in range(times):
            start = time.perf_counter()
            teacher, *head = teacher_of(plan, state, mesh)
            doctor.examine((i + 1) * plan.health.every, teacher, *head)
            seconds.append(time.perf_counter() - start)
        doctor.close()
        writer.close()
    return seconds


def main(argv):
    """Measure and print."""
    del argv
    config = CONFIG.value
    mesh = make_mesh()
    plan = make_plan(config, mesh.size)
    stream = pipeline(plan, 0, 1)
    batch = {k: v for k, v in next(stream).items() if k not in ("index", "bad")}
    stream.close()
    batch = jax.device_put(batch, batch_sharding(mesh))
    key = jax.random.key(0)
    state = jax.jit(
        lambda: pretrain.init_state(
            plan.modules, plan.optimizer, key, config.data.channels
        ),
        out_shardings=replicated(mesh),
    )()
    steps = {
        name: compiled(plan, state, batch, how)
        for name, how in (("without", unwatched), ("with", watch))
    }
    seconds = median_seconds(steps, state, batch, ROUNDS.value)
    first, later = examine_seconds(plan, mesh, state)
    looks = TOTAL.value // EVERY.value
    stops = first + (looks - 1) * later
    step_cost = seconds["with"] / seconds["without"] - 1
    probe_cost = stops / (TOTAL.value * seconds["without"])
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch_size": config.batch_size,
        "step_seconds": {k: round(v, 4) for k, v in seconds.items()},
        "step_cost": round(step_cost, 4),
        "look_seconds": {"first": round(first, 2), "later": round(later, 2)},
        "looks": looks,
        "probe_cost": round(probe_cost, 5),
        "total_cost": round(step_cost + probe_cost, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
