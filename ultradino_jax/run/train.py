"""Pretraining from a config to a workdir: plan, restore, loop, score."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ultradino_jax.checkpoint import Retention, RunCheckpoints
from ultradino_jax.data.sources import IGNORED, report_ignored
from ultradino_jax.errors import (
    Paused,
    StaleFile,
    UserError,
    as_user_error,
    user_line,
)
from ultradino_jax.health.checkups import Doctor
from ultradino_jax.health.phantom_knn import make_guard, phantom_knn
from ultradino_jax.run.bad_steps import BadRecords, Skips
from ultradino_jax.run.feed import Feed
from ultradino_jax.run.loop import Loop
from ultradino_jax.run.meter import Meter
from ultradino_jax.run.plan import Plan, make_plan
from ultradino_jax.run.program import keep_programs, restore_or_init, teacher_of
from ultradino_jax.run.stops import RunStopped, Signals
from ultradino_jax.run.workdir import (
    check_config,
    describe,
    record_config,
    record_run,
)
from ultradino_jax.run.writer import Progress, Writer
from ultradino_jax.sharding import batch_sharding, make_mesh
from ultradino_jax.weights.backbone import save_backbone
from ultradino_jax.weights.own import RECORD, read_backbone
from ultradino_jax.whole import Lock, named, read_json


def join_others(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connect to the job's other processes; None lets the launcher say where they are.

    Raises UserError when they cannot be joined.
    """
    place = (coordinator, num_processes, process_id)
    if coordinator and None in place:
        raise UserError("--coordinator needs --num_processes and --process_id")
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise UserError(f"--process_id {process_id} of {num_processes} processes")
    try:
        jax.distributed.initialize(*place)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {error}") from error


def train(config: ConfigDict, workdir: str | Path) -> Path:
    """Pretrain to the end of the schedule; returns the workdir.

    Running it again on the same workdir goes on from the newest checkpoint and gives,
    bit for bit, what an uninterrupted run gives. At the end the phantom kNN is scored
    if the config asks for it. Raises UserError or OSError with one line when the input
    is bad or the workdir is in use, RunStopped when the disk is full, the loss is not
    finite or too many images are unreadable; RunPaused after a signal, the state being
    saved.
    """
    workdir = named(workdir, "workdir")
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        keep_programs(config.get("compilation_cache", "auto"))
        plan = make_plan(config, len(jax.devices()))
        with as_user_error():
            mesh = make_mesh(**config.mesh)
        if is_main:
            stack.callback(Lock(workdir).close)
            check_config(config, workdir)

        def record():
            if is_main:
                record_config(config, workdir)
                record_run(plan, workdir, config.init_from)

        train_plan(plan, mesh, workdir, stack, record)
    if plan.knn.enabled and is_main:
        phantom_knn(workdir, plan.knn.patients, plan.knn.phantom)
    return workdir


def train_plan(
    plan: Plan,
    mesh,
    workdir: Path,
    stack: contextlib.ExitStack,
    record: Callable[[], None],
) -> None:
    """Go on from the newest checkpoint to the end; `stack` closes what is opened.

    record(): notes config and run, once nothing in the workdir refuses them.
    """
    is_main = jax.process_index() == 0
    progress = Progress(plan.total_steps, weights=plan.objective.weights)
    stack.callback(progress.close)
    say = progress.say if is_main else (lambda text: None)
    s = plan.loop
    keep = Retention(s.keep_last, s.keep_every, s.keep_best)
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=keep)
    stack.push(closing(checkpoints))
    describe(plan, mesh, say)
    state, start = restore_or_init(plan, mesh, checkpoints, say)
    record()
    if is_main:
        report_ignored(plan.source, say, workdir / IGNORED)
    if start > 0:
        renew_backbone(plan, mesh, state, start, workdir, say)
    if start >= plan.total_steps:
        say(f"already trained for all {start} steps")
        return
    stack.enter_context(naming_the_last_good(checkpoints))
    signals = Signals(interrupt_waits=jax.process_count() == 1)
    stack.callback(signals.close)
    writer = Writer(workdir, start_step=start) if is_main else None
    if writer:
        stack.push(closing(writer))
    doctor = Doctor(
        plan.health,
        plan.facts,
        plan.source,
        plan.modules.dino_head,
        workdir=workdir,
        writer=writer,
        scores=keep.scores,
        total_steps=plan.total_steps,
        start=start,
        say=say,
    )
    stack.push(closing(doctor))
    meter = Meter(plan.flops_per_step, plan.feed.batch_size, plan.dtype)
    bad = BadRecords(workdir, plan.source, s.max_bad_fraction, say)
    sharding = batch_sharding(mesh)
    feed = Feed(plan, start, sharding=sharding, meter=meter, bad=bad, say=say)
    stack.push(closing(feed))
    guard = None
    if plan.start is not None and plan.knn.guard > 0:
        guard = make_guard(plan.knn, plan.start, say)
    Loop(
        plan,
        mesh,
        workdir,
        checkpoints=checkpoints,
        feed=feed,
        signals=signals,
        skips=Skips(workdir, plan.source, plan.nan, writer, start, say),
        meter=meter,
        doctor=doctor,
        writer=writer,
        progress=progress,
        guard=guard,
        say=say,
    ).run(state, start)
    backbone = workdir / "backbone"
    say(f"done: {plan.total_steps} steps, teacher backbone in {backbone}")


def renew_backbone(plan: Plan, mesh, state, step: int, workdir: Path, say) -> None:
    """Write the teacher's backbone of a restored state anew if it is not there.

    A run may have been stopped between the checkpoint and the backbone.
    """
    folder = workdir / "backbone"
    teacher, *_ = teacher_of(plan, state, mesh)
    try:
        there = read_json(folder / RECORD).get("step")
        if there == step and jax.process_count() == 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StaleFile)
                if read_backbone(folder).digest == teacher.digest:
                    return
        elif there == step:  # processes must agree, so only the record is asked
            return
    except (FileNotFoundError, UserError):
        pass
    say(f"the backbone in {folder} was not of step {step}: written anew")
    save_backbone(folder, teacher, step=step)


@contextlib.contextmanager
def naming_the_last_good(checkpoints: RunCheckpoints) -> Iterator[None]:
    """Whatever a full or broken disk raises inside becomes one line, a RunStopped."""
    try:
        yield
    except (UserError, Paused):
        raise
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        good = checkpoints.last_good()
        shown = "none yet" if good is None else f"step {good}"
        raise RunStopped(f"{line}; last good checkpoint: {shown}") from error


def closing(resource):
    """An exit callback that closes; its own failure never hides the one under way."""

    def leave(kind, error, trace):
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            resource.close()

    return leave
