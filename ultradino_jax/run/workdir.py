"""The folder of a run: one process at a time, one config."""

import fcntl
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ultradino_jax.run.plan import Plan
from ultradino_jax.run.stops import RunStopped

# Config keys that may differ when a run is resumed: they do not touch its numbers.
FREE_KEYS = (
    "data.root",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_bad_fraction",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "mesh.fsdp",
    "knn.enabled",
    "knn.patients",
    "nan.policy",
    "nan.max_skips",
    "health.every",
    "health.images",
    "health.labels",
    "health.patients",
    "health.panels_every",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Lock:
    """Exclusive use of a workdir, given back by the kernel when the process ends.

    Raises RunStopped naming the process that holds it.
    """

    def __init__(self, workdir: Path):
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = (workdir / "lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RunStopped(
                f"workdir {str(workdir)!r} is in use by {holder}; wait for it or use "
                "another --workdir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def close(self) -> None:
        """Give the workdir back."""
        self._file.close()


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def record_config(config: ConfigDict, workdir: Path) -> None:
    """Write config.json and versions.json, or compare with the ones there.

    Raises RunStopped naming every differing key when the workdir belongs to a run of
    another config.
    """
    now = _flat(config.to_dict())
    path = workdir / "config.json"
    if path.exists():
        before = _flat(json.loads(path.read_text()))
        differing = [
            f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in FREE_KEYS
        ]
        if differing:
            raise RunStopped(
                f"workdir {str(workdir)!r} holds a run of another config "
                f"({'; '.join(differing)}); use another --workdir"
            )
    write_whole(path, json.dumps(config.to_dict(), indent=1) + "\n")
    devices = jax.devices()
    versions = {name: version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    versions["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    versions["system"] = platform.platform()
    write_whole(workdir / "versions.json", json.dumps(versions, indent=1) + "\n")


def record_run(plan: Plan, workdir: Path) -> None:
    """Write run.json: what the config leaves to the data and the devices."""
    facts = {
        "images": len(plan.source),
        "digest": plan.source.digest(),
        "first_image": plan.source.record_id(0),
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "groups": plan.groups,
        "gflop_per_step": round(plan.flops_per_step / 1e9, 1),
        "mean": list(plan.objective.mean),
        "std": list(plan.objective.std),
    }
    write_whole(workdir / "run.json", json.dumps(facts, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a full disk leaves the old one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
