"""Does a run repeat itself? The question of the paper's Figure 3, on the phantom.

    python -m experiments.reproducibility --out=runs/reproducibility

The figure shows how far the iBOT loss of two runs of one seed drifts apart. Here five
runs of main.py are compared: a run, the same again, one killed with SIGKILL and
resumed, one on eight (simulated) devices instead of one, one in bfloat16 instead of
float32, and one of another seed for scale. All have eight groups, so that the same
images meet in the loss on any number of devices.
Writes reproducibility.csv (step, iBOT loss of each run), .json (largest differences)
and .png.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ultradino_jax.jsonl import read_rows
from ultradino_jax.whole import write_json

ROOT = Path(__file__).parent.parent
RUNS = {
    "first": {},
    "again": {},
    "killed and resumed": {"kill": True},
    "8 devices": {"devices": 8},
    "bfloat16": {"dtype": "bfloat16"},
    "another seed": {"seed": 1},
}


def command(workdir: Path, steps: int, seed: int, dtype: str) -> list[str]:
    """main.py on the smoke recipe: `steps` steps of eight groups of two images."""
    values = {
        "seed": seed,
        "model.dtype": dtype,
        "epochs": 1,
        "steps_per_epoch": steps,
        "optim.warmup_epochs": 0.1,
        "teacher.warmup_temp_epochs": 0.3,
        "optim.freeze_last_layer_epochs": 0.1,
        "batch_size": 16,
        "groups": 8,
        "log_every": 1,
        "checkpoint_every": max(steps // 6, 1),
        "health.every": 0,
        "knn.enabled": False,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    config = "--config=configs/pretrain_smoke.py"
    return [sys.executable, "main.py", config, f"--workdir={workdir}", *flags]


def losses(workdir: Path) -> dict[int, float]:
    """{step: iBOT loss} of the complete lines of metrics.jsonl."""
    rows = read_rows(workdir / "metrics.jsonl")
    return {row["step"]: row["ibot"] for row in rows}


def run(
    workdir: Path, steps: int, *, devices=1, seed=0, dtype="float32", kill=False
) -> dict[int, float]:
    """Train, or take the run that is there; returns its losses."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    line = command(workdir, steps, seed, dtype)
    if kill and len(losses(workdir)) < steps:
        victim = subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        while victim.poll() is None and len(losses(workdir)) <= steps // 2:
            time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        print(f"killed after {len(losses(workdir))} of {steps} steps", flush=True)
    subprocess.run(line, cwd=ROOT, env=env, check=True)
    return losses(workdir)


def differences(table: dict[str, dict[int, float]]) -> dict[str, list[float]]:
    """|iBOT loss - that of the first run|, step by step."""
    first = table["first"]
    return {
        name: [abs(values[s] - first[s]) for s in sorted(first)]
        for name, values in table.items()
        if name != "first"
    }


def plot(table, apart, out: Path) -> None:
    """The losses, and their distance to the first run on a logarithmic axis."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(list(table["first"].values()), label="first")
    for name in ("bfloat16", "another seed"):
        left.plot(list(table[name].values()), label=name)
    left.set(xlabel="step", ylabel="iBOT loss")
    left.legend()
    least = 1e-9
    for name, values in apart.items():
        zero = " (exactly 0)" if max(values) == 0 else ""
        right.plot([max(v, least) for v in values], label=name + zero)
    right.set(yscale="log", xlabel="step", ylabel="difference to the first run")
    right.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main(argv=None) -> None:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description="Compare runs of one seed.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, options in RUNS.items():
        print(f"--- {name}", flush=True)
        table[name] = run(args.out / name.replace(" ", "_"), args.steps, **options)
    apart = differences(table)
    with (args.out / "reproducibility.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *table])
        rows.writerows([s, *(v[s] for v in table.values())] for s in table["first"])
    summary = {
        "steps": args.steps,
        "largest_difference": {name: max(values) for name, values in apart.items()},
        "last_ibot_loss": list(table["first"].values())[-1],
    }
    write_json(args.out / "reproducibility.json", summary)
    plot(table, apart, args.out / "reproducibility.png")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
