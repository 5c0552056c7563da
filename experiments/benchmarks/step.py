"""Our training step against PyTorch's, and against itself with other settings.

    python -m experiments.benchmarks.step --peer=torch-reference \
        --peer=lightly-train --lightly_python=VENV/bin/python

ViT-S/16, 4 images of 2 x 224 + 8 x 96 pixels, 1 channel, 4 registers, 65,536
prototypes, float32, drop path 0: the recipe with what differs in `step_config`. Every
system is a process of its own on the same cores; they take turns, so that a busy
machine slows all alike: two steps each per round, of which the second counts (the first
finds caches and memory taken by the one before), forwards and backwards through the
list. The first round is left out. Prints medians, the median of each round's ratio, and
every process's peak resident memory.

- `--peer` torch-reference is torch_step.py's statement of DINOv2's step, with the same
  initial weights and batch; the losses of its first step are compared with ours.
  `--torch_python` names its Python, by default this one.
- `--peer` lightly-train is lightly-train 0.18.0's own step on the same tensors
  (`pip install lightly-train==0.18.0` in an environment of its own).
- `--variant` is ours with config values changed, e.g. `--variant=model.unroll=1`; by
  default the recipe's drop path. `--config.KEY=VALUE` changes all of ours.
"""

import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from configs import pretrain_vits
from experiments.benchmarks.torch_input import write_input
from experiments.benchmarks.turns import Worker, share_cores
from ultradino_jax.pretraining.step import init_state
from ultradino_jax.run.feed import pipeline
from ultradino_jax.run.plan import make_plan
from ultradino_jax.run.program import compiled_step, executable
from ultradino_jax.sharding import batch_sharding, make_mesh, replicated

PEERS = ("torch-reference", "lightly-train")
TERMS = ("dino_local", "dino_global", "koleo", "ibot")


def step_config():
    """The ViT-S recipe at what two CPU cores can time."""
    config = pretrain_vits.get_config()
    config.batch_size, config.groups, config.steps_per_epoch = 4, 1, 1000
    config.model.dtype, config.model.remat = "float32", "none"
    config.model.drop_path, config.model.unroll = 0.0, 12
    config.loss.chunk_rows = 64  # 5 % faster here than the 1024 meant for GPUs
    config.data.phantom_images, config.data.phantom_size = 4, (256, 341)
    config.data.workers, config.data.threads = 0, 0
    return config


CONFIG = config_flags.DEFINE_config_dict("config", step_config())
PEER = flags.DEFINE_multi_enum("peer", [], PEERS, "what to compare with")
VARIANT = flags.DEFINE_multi_string(
    "variant", ["model.drop_path=0.3"], "ours, changed; '' for none"
)
TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "of the reference")
LIGHTLY_PYTHON = flags.DEFINE_string("lightly_python", None, "of lightly-train")
ROUNDS = flags.DEFINE_integer("rounds", 7, "timed steps of each")
THREADS = flags.DEFINE_integer("threads", 2, "cores all of them run on")
JSON = flags.DEFINE_string("json", "experiments/results/step.json", "written to")
WORKER = flags.DEFINE_string("worker", None, "internal: run this variant of ours")


def changed(config, variant: str):
    """The config with 'key=value,key=value' applied."""
    for item in filter(None, variant.split(",")):
        key, _, value = item.partition("=")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        config.update_from_flattened_dict({key: value})
    return config


def fixed_batch(plan) -> dict[str, np.ndarray]:
    """The batch of step 0."""
    stream = pipeline(plan, 0, 1)
    batch = {k: v for k, v in next(stream).items() if k not in ("index", "bad")}
    stream.close()
    return batch


def peak_gb() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def serve_ours(config) -> None:
    """The protocol of torch_step.py for our step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    plan = make_plan(config, 1)
    key, channels = jax.random.key(config.seed), config.data.channels
    state = jax.jit(
        lambda: init_state(plan.modules, plan.optimizer, key, channels),
        out_shardings=replicated(mesh),
    )()
    batch = jax.device_put(fixed_batch(plan), batch_sharding(mesh))
    start = time.perf_counter()
    step = compiled_step(plan, mesh, state)
    step = executable(step, (state, batch), lambda line: None)
    memory = step.memory_analysis()
    about = {
        "jax": jax.__version__,
        "compile_seconds": time.perf_counter() - start,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9 if memory else None,
        "gflop": plan.flops_per_step / 1e9,
        "peak_gb_before_step": peak_gb(),
    }
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        terms = {name: float(metrics[name]) for name in TERMS}
        answer = {"seconds": seconds, "terms": terms, "peak_gb": peak_gb()}
        print(json.dumps(answer), flush=True)


def start_workers(folder: Path) -> dict[str, Worker]:
    """Every system asked for, ready to step; ours first."""
    ours = [sys.executable, "-m", "experiments.benchmarks.step", *sys.argv[1:]]
    commands = {"ours": [*ours, "--worker="]}
    for variant in filter(None, VARIANT.value):
        commands[f"ours, {variant}"] = [*ours, f"--worker={variant}"]
    script = str(Path(__file__).with_name("torch_step.py"))
    pythons: dict[str, str | None] = dict(
        zip(PEERS, (TORCH_PYTHON.value, LIGHTLY_PYTHON.value), strict=True)
    )
    for peer in PEER.value:
        if not pythons[peer]:
            raise app.UsageError("--peer=lightly-train needs --lightly_python")
        path = folder / "input.npz"
        if not path.exists():
            plan = make_plan(CONFIG.value, 1)
            write_input(CONFIG.value, plan, fixed_batch(plan), path)
        command = [pythons[peer], script, peer, str(path), str(THREADS.value)]
        commands[peer] = command
    workers = {}
    for name, command in commands.items():
        start = time.perf_counter()
        workers[name] = Worker(command)
        print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
    return workers


def summary(workers: dict[str, Worker], loads: list[float]) -> dict:
    """What is printed and kept."""
    ours = workers["ours"]
    rows = {}
    for name, worker in workers.items():
        ratios = [a / b for a, b in zip(ours.seconds, worker.seconds, strict=True)]
        rows[name] = {
            "median_seconds": round(statistics.median(worker.seconds), 4),
            "min_seconds": round(min(worker.seconds), 4),
            "ours_over_this": round(statistics.median(ratios), 4),
            "peak_gb": round(worker.peak_gb, 3),
            "first_step": worker.first_terms,
            **worker.about,
        }
    gflop = ours.about["gflop"]
    return {
        "cores": THREADS.value,
        "rounds": len(ours.seconds),
        "load": {"start": loads[0], "end": loads[1]},
        "gflop_per_second": round(gflop / rows["ours"]["median_seconds"], 1),
        "systems": rows,
    }


def main(argv):
    """Take turns and print."""
    del argv
    share_cores(THREADS.value)
    jax.config.update("jax_platforms", "cpu")
    if WORKER.value is not None:
        serve_ours(changed(CONFIG.value, WORKER.value))
        return
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        workers = start_workers(Path(folder))
        for turn in range(ROUNDS.value + 1):
            for worker in list(workers.values())[:: -1 if turn % 2 else 1]:
                worker.step()
                seconds = worker.step()
                if turn:  # the first touches fresh memory
                    worker.seconds.append(seconds)
            latest = (f"{n} {w.seconds[-1]:.2f} s" for n, w in workers.items() if turn)
            print(f"round {turn} of {ROUNDS.value}:", *latest, flush=True)
        for worker in workers.values():
            worker.close()
    loads.append(os.getloadavg()[0])
    result = summary(workers, [round(x, 2) for x in loads])
    Path(JSON.value).write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["systems"].items():
        print(
            f"{name:28} {row['median_seconds']:7.3f} s (least {row['min_seconds']:.3f})"
            f", ours takes {row['ours_over_this']:.3f} of it, "
            f"peak {row['peak_gb']:.2f} GB"
        )
    first = result["systems"]["ours"]["first_step"]
    if "torch-reference" in result["systems"]:
        other = result["systems"]["torch-reference"]["first_step"]
        apart = {k: abs(first[k] / other[k] - 1) for k in TERMS}
        print("first step, relative:", {k: f"{v:.1e}" for k, v in apart.items()})
    print(f"load {result['load']}, {result['gflop_per_second']} GFLOP/s by formula")


if __name__ == "__main__":
    app.run(main)
