"""Kill a run with SIGKILL again and again; in the end not a byte may differ.

    python -m experiments.kill_test --out=runs/kill_test --kills=20

A tiny run on the phantom, checkpointed every two steps, is started in a process of its
own, killed at a random moment (from its first line to its last save) and started again.
After every kill the complete lines of metrics.jsonl must be those of an uninterrupted
run, as must the finished files. Prints the moment of every kill.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

# Beyond the seconds config: more steps, one group, looks at the run's health.
VALUES = {
    "groups": 1,
    "epochs": 4,
    "steps_per_epoch": 6,
    "health.every": 12,
    "health.images": 16,
    "health.patients": 4,
}


def child(workdir: Path, cache: Path) -> None:
    """The run, in a process that may be killed."""
    import jax

    from configs import pretrain_smoke
    from ultradino_jax.run.train import train

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = pretrain_smoke.get_config("seconds")
    config.update_from_flattened_dict(VALUES)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    train(config, workdir)


def start(workdir: Path, cache: Path):
    """A child forked from a server that has done the imports, and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ultradino_jax.run.train", "configs.pretrain_smoke"]
    )
    process = context.Process(target=child, args=(workdir, cache))
    process.start()
    return process


def metrics(workdir: Path) -> bytes:
    """The complete lines so far."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""


def finish(process) -> None:
    """Wait for a run that must succeed."""
    process.join()
    if process.exitcode:
        sys.exit(f"the run ended with exit code {process.exitcode}")


def main(argv=None) -> None:
    """Kill, rerun, compare."""
    parser = argparse.ArgumentParser(description="SIGKILL at random moments.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    cache, whole, workdir = (args.out.absolute() / n for n in ("cache", "whole", "run"))
    finish(start(whole, cache))
    begun = time.monotonic()
    finish(start(args.out / "timing", cache))  # compiled already: what a run takes
    seconds = time.monotonic() - begun
    expected, draw = metrics(whole), random.Random(args.seed)
    print(
        f"{expected.count(b'step')} lines; a whole run takes {seconds:.0f} s",
        flush=True,
    )
    kills = 0
    while kills < args.kills:
        process, wait = start(workdir, cache), draw.uniform(0.05, seconds)
        process.join(timeout=wait)
        if process.exitcode is not None:  # it was done before: begin anew
            if process.exitcode or metrics(workdir) != expected:
                sys.exit(f"run {workdir} ended with {process.exitcode} or differs")
            shutil.rmtree(workdir)
            continue
        process.kill()
        process.join()
        kills += 1
        now = metrics(workdir)
        print(
            f"kill {kills}: after {wait:.1f} s, {len(now.splitlines())} lines",
            flush=True,
        )
        if not expected.startswith(now):
            sys.exit("metrics.jsonl differs from the uninterrupted run")
    finish(start(workdir, cache))
    for name in ("metrics.jsonl", "health.jsonl", "backbone/backbone.json"):
        if (workdir / name).read_bytes() != (whole / name).read_bytes():
            sys.exit(f"{name} differs from the uninterrupted run")
    print(f"{kills} kills: metrics.jsonl and health.jsonl are the same bytes")


if __name__ == "__main__":
    main()
