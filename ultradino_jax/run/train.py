"""The pretraining loop: restore, feed, step, log, look after the run, checkpoint."""

import contextlib
import ctypes
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone, save_backbone
from ultradino_jax.checkpoint import Retention, RunCheckpoints
from ultradino_jax.errors import UserError
from ultradino_jax.health.checkups import Doctor
from ultradino_jax.health.panels import crops_panel
from ultradino_jax.pretraining.device_crops import rendered
from ultradino_jax.pretraining.step import init_state, make_train_step
from ultradino_jax.run.bad_steps import BadRecords, Skips, skip_not_finite
from ultradino_jax.run.feed import Feed
from ultradino_jax.run.meter import Meter
from ultradino_jax.run.plan import Plan, make_plan, vit_name
from ultradino_jax.run.stops import Interrupted, RunPaused, RunStopped, Signals
from ultradino_jax.run.workdir import Lock, record_config, record_run
from ultradino_jax.run.writer import Progress, Writer
from ultradino_jax.sharding import (
    abstract_with,
    batch_sharding,
    make_mesh,
    replicated,
    state_shardings,
)


def start_run(config: ConfigDict, workdir: Path, stack: contextlib.ExitStack):
    """(plan, mesh) after every check that can be made before the first step.

    The workdir is this process's until `stack` closes.
    """
    try:
        mesh = make_mesh(config.mesh.fsdp)
        plan = make_plan(config, mesh.size)
        if config.nan.policy not in ("stop", "skip"):
            raise UserError(f"nan.policy {config.nan.policy!r} is none of stop, skip")
        if jax.process_index() == 0:
            stack.callback(Lock(workdir).close)
            record_config(config, workdir)
            record_run(plan, workdir)
    except (ValueError, OSError, ImportError) as error:
        raise RunStopped(str(error)) from error
    return plan, mesh


def teacher_of(config, plan, state, mesh) -> tuple[Backbone, dict, jax.Array]:
    """(backbone, DINO head's parameters, DINO center), gathered from their shards."""
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    backbone = Backbone(
        model=plan.modules.backbone,
        params=gather(state.teacher["backbone"]),
        image_size=config.crops.global_size,
        channels=config.data.channels,
        mean=plan.objective.mean,
        std=plan.objective.std,
        name=plan.start.name if plan.start else vit_name(config),
    )
    return backbone, gather(state.teacher["dino_head"]), gather(state.centers["dino"])


def restore_or_init(config, plan, mesh, checkpoints, stream, say):
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
    the input is bad, the workdir is in use or cannot be written, the loss is not finite
    or too many images are unreadable; RunPaused after a signal, the state being saved.
    """
    workdir = Path(workdir)
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        plan, mesh = start_run(config, workdir, stack)
        progress = Progress(plan.total_steps, weights=plan.objective.weights)
        stack.callback(progress.close)
        say = progress.say if is_main else (lambda text: None)
        keep = Retention(config.keep_checkpoints, config.keep_every, config.keep_best)
        checkpoints = RunCheckpoints(workdir / "checkpoints", keep=keep)
        stack.push(closing(checkpoints))
        stream = {"records": len(plan.source), "digest": plan.source.digest()}
        run = Session(config, plan, mesh, workdir, checkpoints, progress, say, stream)
        describe(config, plan, mesh, say)
        state, start = restore_or_init(config, plan, mesh, checkpoints, stream, say)
        if start >= plan.total_steps:
            say(f"already trained for all {start} steps")
            return workdir
        signals = Signals(interrupt_waits=jax.process_count() == 1)
        stack.callback(signals.close)
        writer = Writer(workdir, start_step=start) if is_main else None
        if writer:
            stack.push(closing(writer))
        doctor = Doctor(config, plan, workdir, writer, keep, start, say)
        stack.push(closing(doctor))
        _loop(run, state, start, writer, doctor, signals, stack, at_checkpoint)
    say(f"done: {plan.total_steps} steps, teacher backbone in {workdir / 'backbone'}")
    return workdir


def closing(resource):
    """An exit callback that closes; its own failure never hides the one under way."""

    def leave(kind, error, trace):
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            resource.close()

    return leave


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
    stream: dict  # what identifies the images

    @contextlib.contextmanager
    def doing(self, what: str):
        """Turn whatever a full or broken disk makes a library raise into one line."""
        try:
            yield
        except (RunStopped, Interrupted):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            good = self.checkpoints.newest()
            raise RunStopped(
                f"{what} failed ({lines[0][:200]}); last good "
                f"checkpoint: {f'step {good}' if good else 'none yet'}"
            ) from error

    def save(self, step: int, state) -> None:
        """Start writing the checkpoint after `step` steps."""
        meta = {"step": step, "groups": self.plan.groups, "stream": self.stream}
        with self.doing(f"writing the checkpoint of step {step} or the one before"):
            self.checkpoints.save(step, state, meta)

    def wait(self, step: int) -> None:
        """Until that checkpoint is on disk."""
        with self.doing(f"writing the checkpoint of step {step}"):
            self.checkpoints.wait()


def stop_agreed(signals: Signals, step: int, every: int) -> bool:
    """Whether to save and stop now; several processes agree every `every` steps."""
    if jax.process_count() == 1:
        return signals.received is not None
    if step % every:
        return False
    wanted = np.array(signals.received is not None)
    return bool(multihost_utils.process_allgather(wanted).any())


def compiled_step(config: ConfigDict, plan: Plan, mesh, state):
    """The jitted train step; the state it is given is consumed."""
    step = make_train_step(
        plan.modules,
        plan.objective,
        plan.optimizer,
        schedules=plan.schedules,
        seed=config.seed,
        accum_steps=config.accum_steps,
        whole=lambda params: jax.lax.with_sharding_constraint(params, replicated(mesh)),
    )
    if config.nan.policy == "skip":
        step = skip_not_finite(step)

    def train_step(state, batch):
        return step(state, rendered(batch, plan.crops))

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
    )


def executable(step, arguments, say):
    """A jitted step compiled for these arguments; says how long it took, what it needs.

    The compiler leaves up to a gigabyte of freed memory with the process, which glibc
    is told to give back before the temporaries come on top of it.
    """
    say("compiling the train step")
    start = time.monotonic()
    compiled = step.lower(*arguments).compile()
    line = f"compiled in {time.monotonic() - start:.0f} s"
    if memory := compiled.memory_analysis():
        state, rest = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        line += f"; GB per device: state and batch {state / 1e9:.2f}"
        line += f", temporaries {rest / 1e9:.2f}"
    say(line)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return compiled


def _loop(
    run: Session, state, start, writer, doctor: Doctor, signals, stack, at_checkpoint
):
    config, plan, mesh, workdir = run.config, run.plan, run.mesh, run.workdir
    total = plan.total_steps
    meter = Meter(plan.flops_per_step, config.batch_size, config.model.dtype)
    bad = BadRecords(workdir, plan.source, config.data.max_bad_fraction, run.say)
    skips = Skips(workdir, plan.source, config.nan, writer, start, run.say)
    sharding = batch_sharding(mesh)
    feed = Feed(
        config, plan, start, sharding=sharding, meter=meter, bad=bad, say=run.say
    )
    stack.push(closing(feed))
    ln_k = float(np.log(config.head.num_prototypes))

    def settle(step, metrics, index):
        """Wait for a step's numbers, refuse or skip what is not finite, log."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        values = skips.check(step, values, index, run.checkpoints.newest)
        if not ((step + 1) % config.log_every == 0 or step == total - 1):
            return
        values["ln_k"] = ln_k
        values |= {k: float(s(step)) for k, s in plan.schedules.items()}
        timing = {**meter.read(), **doctor.seconds()}
        if writer:
            with run.doing("writing the metrics"):
                writer.write(step, values, timing)
            if "total" in values:  # not a skipped step
                run.progress.update(step, values, timing)
            doctor.look("metrics", {"step": step, **values})
            doctor.look("timing", {"step": step, **timing})

    try:
        batch, index, arrays = feed(start, signals)
    except Interrupted:
        raise RunPaused(f"{signals.received}: nothing new to save") from None
    train_step = compiled_step(config, plan, mesh, state)
    train_step = executable(train_step, (state, batch), run.say)
    if writer and start == 0:
        shown = rendered(arrays, plan.crops)
        doctor.picture("crops", 0, crops_panel(shown, plan.modules.backbone.patch_size))
    pending = None
    for step in range(start, total):
        state, metrics = train_step(state, batch)
        if step == start:  # a first step's warm-up is not speed
            jax.block_until_ready(metrics)
            meter.reset()
        meter.steps += 1
        if pending:
            settle(*pending)
        pending, done = (step, metrics, index), step + 1
        if done < total:
            with contextlib.suppress(Interrupted):
                batch, index, _ = feed(done, signals)
        stop = stop_agreed(signals, done, config.log_every)
        checkup = doctor.due(done)
        save = done % config.checkpoint_every == 0 or done == total or stop
        if not (save or checkup):
            continue
        settle(*pending)  # only a state with finite numbers is kept
        pending = None
        teacher = None
        if not stop or done == total:
            teacher, *head = teacher_of(config, plan, state, mesh)
            if checkup:  # before saving: a resumed run must not miss it
                with run.doing("measuring the health of the run"):
                    doctor.examine(done, teacher, *head)
        if save:
            run.save(done, state)
        if save and teacher:
            with run.doing("writing the backbone"):
                save_backbone(workdir / "backbone", teacher, step=done)
            if at_checkpoint:
                at_checkpoint(teacher, plan.start, done)
        if stop and done < total:
            run.wait(done)
            raise RunPaused(
                f"{signals.received}: saved at step {done} of {total}; "
                "the same command goes on from there"
            )
    run.wait(total)


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
