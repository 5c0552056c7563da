"""The folder of a run: one config, what it is about."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from clu.parameter_overview import get_parameter_overview
from ml_collections import ConfigDict

from ultradino_jax.run.plan import Plan
from ultradino_jax.run.program import kept_programs
from ultradino_jax.weights.lineage import lineage
from ultradino_jax.whole import check_same, read_json, write_json, write_whole

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
    "restart",
    "mesh.fsdp",
    "compilation_cache",
    "model.attention",
    "model.remat",
    "model.unroll",
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
# What a key of the config stands for in runs that were made before there was the key.
MISSING: dict[str, Any] = {
    "loss.gram_weight": 0.0,
    "model.attention": "xla",
    "compilation_cache": "",
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def check_config(config: ConfigDict, workdir: Path) -> None:
    """Compare with the config.json that is there; nothing is written.

    Raises UserError naming every differing key when the workdir belongs to a run of
    another config.
    """
    path = workdir / "config.json"
    if path.is_file():
        settings, advice = config.to_dict(), "use another --workdir"
        options = dict(free=FREE_KEYS, missing=MISSING)
        check_same(read_json(path), settings, workdir, "a run", advice, **options)


def record_config(config: ConfigDict, workdir: Path) -> None:
    """Write config.json and versions.json; what may differ is noted anew.

    Only after all checks: what they refused must leave the records as they were.
    """
    write_json(workdir / "config.json", config.to_dict())
    devices = jax.devices()
    versions = {name: version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    versions["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    versions["system"] = platform.platform()
    write_json(workdir / "versions.json", versions)


def record_run(plan: Plan, workdir: Path, init_from: str) -> None:
    """Write run.json, what the config leaves to the data and the devices, and
    parameters.txt, a table of names, shapes and sizes.

    init_from: of the config; the runs behind it and their images are noted, too.
    """
    ancestors = lineage(init_from)
    if plan.start is not None:
        ancestors[0]["weights"] = plan.start.digest
    facts = {
        "images": len(plan.source),
        "digest": plan.stream["digest"],
        "first_image": plan.source.record_id(0),
        "steps_per_epoch": plan.steps_per_epoch,
        "total_steps": plan.total_steps,
        "groups": plan.groups,
        "gflop_per_step": round(plan.flops_per_step / 1e9, 1),
        "mean": list(plan.objective.mean),
        "std": list(plan.objective.std),
        "ancestors": ancestors,
    }
    write_json(workdir / "run.json", facts)
    table = get_parameter_overview(
        _parameters(plan), include_stats=False, max_lines=None
    )
    write_whole(workdir / "parameters.txt", table + "\n")


def _parameters(plan: Plan) -> dict:
    """Shapes of the student's parameters."""
    return jax.eval_shape(lambda: plan.modules.init(jax.random.key(0), plan.channels))


def describe(plan: Plan, mesh, say) -> None:
    """Say what is about to run."""
    devices = jax.devices()
    say(
        f"{len(plan.source)} images; {plan.total_steps} steps of "
        f"{plan.feed.batch_size} in {plan.groups} groups on {len(devices)} x "
        f"{devices[0].device_kind} (mesh {dict(mesh.shape)})"
    )
    for note in plan.notes:
        say(note)
    if folder := kept_programs():
        say(f"compiled programs are kept in {folder}")
    sizes = ", ".join(
        f"{name} {sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.1f}M"
        for name, tree in _parameters(plan).items()
    )
    say(f"{sizes} parameters; {plan.flops_per_step / 1e9:.0f} GFLOP per step")
