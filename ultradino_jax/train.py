"""The pretraining loop: restore, feed, step, log, checkpoint."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ultradino_jax.checkpoint import Backbone, RunCheckpoints, save_backbone
from ultradino_jax.data.pipeline import build_pipeline
from ultradino_jax.monitor import BadRecords, Meter, RunStopped, not_finite
from ultradino_jax.plan import Plan, make_plan, vit_name
from ultradino_jax.pretrain import init_state, make_train_step
from ultradino_jax.sharding import (
    abstract_with,
    batch_sharding,
    make_mesh,
    replicated,
    state_shardings,
)
from ultradino_jax.writer import Progress, Writer

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
    "mesh.fsdp",
    "knn.enabled",
    "knn.patients",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    versions = {name: version(name) for name in PACKAGES}
    (workdir / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def start_run(config: ConfigDict, workdir: Path):
    """(plan, mesh) after every check that can be made before the first step."""
    try:
        mesh = make_mesh(config.mesh.fsdp)
        plan = make_plan(config, mesh.size)
        record_config(config, workdir)
    except (ValueError, OSError, ImportError) as error:
        raise RunStopped(str(error)) from error
    return plan, mesh


def pipeline(config: ConfigDict, plan: Plan, start_step: int, num_steps: int):
    """The input stream of this process from `start_step` on."""
    try:
        return build_pipeline(
            plan.source,
            plan.crops,
            batch_size=config.batch_size,
            groups=plan.groups,
            patch_size=plan.modules.backbone.patch_size,
            mask_probability=config.masking.probability,
            mask_ratio=tuple(config.masking.ratio),
            mask_style=config.masking.style,
            seed=config.seed,
            start_step=start_step,
            num_steps=num_steps,
            num_workers=config.data.workers,
            num_threads=config.data.threads,
            prefetch=config.data.prefetch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    except ValueError as error:
        raise RunStopped(str(error)) from error


def export_backbone(config, plan, state, workdir, mesh, **facts) -> Backbone:
    """The teacher's backbone, gathered from its shards, into workdir/backbone."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    channels = config.data.channels
    backbone = Backbone(
        model=plan.modules.backbone,
        params=gather(state.teacher["backbone"]),
        image_size=config.crops.global_size,
        channels=channels,
        mean=plan.objective.mean,
        std=plan.objective.std,
        name=plan.start.name if plan.start else vit_name(config),
    )
    save_backbone(workdir / "backbone", backbone, **facts)
    return backbone


def restore_or_init(config, plan, mesh, checkpoints, say):
    """(state, step): the newest usable checkpoint, or a fresh sharded state."""
    key = jax.random.key(config.seed)

    # On the host: the loaded arrays sit on one device, the mesh may have more.
    weights = jax.device_get(plan.start.params) if plan.start else None

    def init(weights):  # an argument, not a constant of the compiled program
        channels = config.data.channels
        return init_state(plan.modules, plan.optimizer, key, channels, weights)

    abstract = jax.eval_shape(init, weights)
    try:
        shardings = state_shardings(abstract, mesh)
    except ValueError as error:
        raise RunStopped(str(error)) from error
    restored = checkpoints.restore(abstract_with(shardings, abstract), report=say)
    if restored is None:
        return jax.jit(init, out_shardings=shardings)(weights), 0
    state, meta = restored
    stream = {"records": len(plan.source), "digest": plan.source.digest()}
    if meta["stream"] != stream:
        raise RunStopped(
            f"the images are not those this run started with ({meta['stream']} there, "
            f"{stream} now); give it the same ones or another --workdir"
        )
    if meta["groups"] != plan.groups:
        raise RunStopped(
            f"this run was trained in {meta['groups']} groups, {jax.device_count()} "
            f"devices need {plan.groups}; set config.groups or use a divisor of "
            f"{meta['groups']} devices"
        )
    say(f"resumed from the checkpoint at step {int(meta['step'])}")
    return state, int(meta["step"])


def train(
    config: ConfigDict, workdir: str | Path, at_checkpoint: Callable | None = None
) -> Path:
    """Pretrain to the end of the schedule; returns the workdir.

    at_checkpoint(backbone, start, step) is called with the teacher after each
    checkpoint, `start` being the backbone of init_from or None; it may raise
    RunStopped.

    Running it again on the same workdir goes on from the newest checkpoint and gives,
    bit for bit, what an uninterrupted run gives. Raises RunStopped with one line when
    the input is bad, the loss is not finite or too many images are unreadable.
    """
    workdir = Path(workdir)
    plan, mesh = start_run(config, workdir)
    is_main = jax.process_index() == 0
    progress = Progress(plan.total_steps)
    say = progress.say if is_main else (lambda text: None)
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    session = Session(config, plan, mesh, workdir, checkpoints, progress, say)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.close)
        stack.callback(checkpoints.close)
        describe(config, plan, mesh, say)
        state, start = restore_or_init(config, plan, mesh, checkpoints, say)
        if start >= plan.total_steps:
            say(f"already trained for all {start} steps")
            return workdir
        writer = Writer(workdir, start_step=start) if is_main else None
        if writer:
            stack.callback(writer.close)
        stream = pipeline(config, plan, start, plan.total_steps - start)
        stack.callback(stream.close)
        _loop(session, state, start, stream, writer, at_checkpoint)
    say(f"done: {plan.total_steps} steps, teacher backbone in {workdir / 'backbone'}")
    return workdir


@dataclasses.dataclass(frozen=True)
class Session:
    """What stays the same from the first step of a process to its last."""

    config: ConfigDict
    plan: Plan
    mesh: jax.sharding.Mesh
    workdir: Path
    checkpoints: RunCheckpoints
    progress: Progress
    say: Callable[[str], None]


def _loop(run: Session, state, start: int, stream, writer, at_checkpoint):
    config, plan, mesh, workdir = run.config, run.plan, run.mesh, run.workdir
    train_step = jax.jit(
        make_train_step(
            plan.modules,
            plan.objective,
            plan.optimizer,
            teacher_temp=plan.schedules["teacher_temp"],
            ema_momentum=plan.schedules["ema_momentum"],
            seed=config.seed,
            accum_steps=config.accum_steps,
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )
    sharding = batch_sharding(mesh)
    meter = Meter(plan, config.batch_size, config.model.dtype)
    bad = BadRecords(workdir, plan.source, config.data.max_bad_fraction, run.say)
    stream_facts = {"records": len(plan.source), "digest": plan.source.digest()}
    ln_k = float(np.log(config.head.num_prototypes))
    last_good = start or None

    def fetch():
        """Next batch on the device, and the records it came from."""
        with meter.waiting():
            try:
                batch = dict(next(stream))
            except RuntimeError as error:
                raise RunStopped(str(error).strip().splitlines()[-1]) from error
        index, rejected = batch.pop("index"), batch.pop("bad")
        bad.check(rejected)
        place = jax.make_array_from_process_local_data
        return {k: place(sharding, v) for k, v in batch.items()}, index

    def settle(step, metrics, index):
        """Wait for a step's numbers, refuse what is not finite, log."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not all(np.isfinite(v) for v in values.values()):
            records = [plan.source.record_id(i) for i in index.ravel()]
            raise not_finite(step, values, records, workdir, last_good)
        last = step == plan.total_steps - 1
        if not ((step + 1) % config.log_every == 0 or last):
            return
        values["ln_k"] = ln_k
        values |= {k: float(s(step)) for k, s in plan.schedules.items()}
        timing = meter.read()
        if writer:
            writer.write(step, values, timing)
            run.progress.update(step, values, timing)

    run.say("compiling the train step")
    batch, index = fetch()
    pending = None
    for step in range(start, plan.total_steps):
        state, metrics = train_step(state, batch)
        if step == start:  # compile time is not speed
            jax.block_until_ready(metrics)
            meter.reset()
        meter.steps += 1
        if pending:
            settle(*pending)
        pending = (step, metrics, index)
        done = step + 1
        if done < plan.total_steps:
            batch, index = fetch()
        if done % config.checkpoint_every == 0 or done == plan.total_steps:
            settle(*pending)  # only a state with finite numbers is kept
            pending = None
            meta = {"step": done, "groups": plan.groups, "stream": stream_facts}
            run.checkpoints.save(done, state, meta)
            teacher = export_backbone(config, plan, state, workdir, mesh, step=done)
            last_good = done
            if at_checkpoint:
                at_checkpoint(teacher, plan.start, done)
    run.checkpoints.wait()


def describe(config: ConfigDict, plan: Plan, mesh, say) -> None:
    """Say what is about to run."""
    devices = jax.devices()
    abstract = jax.eval_shape(
        lambda: plan.modules.init(jax.random.key(0), config.data.channels)
    )
    count = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in abstract.items()}
    if not config.data.root:
        say("data.root is empty: training on the built-in phantom, not on real images")
    say(
        f"{len(plan.source)} images; {plan.total_steps} steps of {config.batch_size} "
        f"in {plan.groups} groups on {len(devices)} x {devices[0].device_kind} "
        f"(mesh {dict(mesh.shape)})"
    )
    if plan.groups != config.groups:
        say(
            f"groups raised from {config.groups} to {plan.groups} for the devices: "
            f"masks, KoLeo and drop path now work on "
            f"{config.batch_size // plan.groups} images at a time"
        )
    millions = ", ".join(f"{name} {n / 1e6:.1f}M" for name, n in count.items())
    say(f"{millions} parameters; {plan.flops_per_step / 1e9:.0f} GFLOP per step")
