"""The steps of a run, one after another: train, log, look after it, save."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.health.checkups import Doctor
from ultradino_jax.health.panels import crops_panel
from ultradino_jax.pretraining.device_crops import rendered
from ultradino_jax.run.bad_steps import Skips
from ultradino_jax.run.feed import Feed
from ultradino_jax.run.meter import Meter
from ultradino_jax.run.plan import Plan
from ultradino_jax.run.program import (
    compiled_step,
    executable,
    local,
    teacher_of,
)
from ultradino_jax.run.stops import (
    Interrupted,
    RunPaused,
    RunStopped,
    Signals,
    stop_agreed,
)
from ultradino_jax.run.writer import Progress, Writer
from ultradino_jax.weights.backbone import Backbone, save_backbone


class Loop:
    """One process's part of the steps; `run` goes from the first to the last.

    writer: None where another process writes. guard(teacher, step): a message when a
    continued run got worse, else None.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        *,
        checkpoints: RunCheckpoints,
        feed: Feed,
        signals: Signals,
        skips: Skips,
        meter: Meter,
        doctor: Doctor,
        writer: Writer | None,
        progress: Progress,
        guard: Callable[[Backbone, int], str | None] | None,
        say: Callable[[str], None],
    ):
        self.plan, self.mesh, self.workdir = plan, mesh, workdir
        self.checkpoints, self.feed, self.signals = checkpoints, feed, signals
        self.skips, self.meter, self.doctor = skips, meter, doctor
        self.writer, self.progress, self.say = writer, progress, say
        self.guard = guard

    def run(self, state, start: int) -> None:
        """Train from step `start` to the end.

        Raises RunPaused after a signal, the state being saved, RunStopped when a step
        is not finite or the guard objects.
        """
        total, settings = self.plan.total_steps, self.plan.loop
        try:
            batch, index, arrays = self.feed(start, self.signals)
        except Interrupted:
            why = f"{self.signals.received}: nothing new to save"
            raise RunPaused(why) from None
        if self.doctor.missed(start):
            self.look_and_save(start, state, look=True, save=False)
        train_step = compiled_step(self.plan, self.mesh, state)
        train_step = executable(train_step, (state, batch), self.say)
        if start == 0:
            self.show_first_batch(arrays)
        del arrays
        pending = None
        for step in range(start, total):
            state, metrics = train_step(state, batch)
            if step == start:  # a first step's warm-up is not speed
                jax.block_until_ready(metrics)
                self.meter.reset()
            self.meter.steps += 1
            if pending:
                self.settle(*pending)
            pending, done = (step, metrics, index), step + 1
            if done < total:
                with contextlib.suppress(Interrupted):
                    batch, index = self.feed(done, self.signals)[:2]
            stop = stop_agreed(self.signals, done, settings.log_every)
            look = self.doctor.due(done)
            save = done % settings.checkpoint_every == 0 or done == total or stop
            if save or look:
                self.settle(*pending)  # only a state with finite numbers is kept
                pending = None
                if stop and done < total:
                    batch, index = None, index[:0].copy()  # the worker's memory
                    self.pause(done, state)
                self.look_and_save(done, state, look, save)
        self.checkpoints.wait()

    def show_first_batch(self, arrays) -> None:
        """A picture of the crops and masks."""
        if self.writer:
            shown = rendered(arrays, self.plan.crops)
            patch_size = self.plan.modules.backbone.patch_size
            self.doctor.picture("crops", 0, crops_panel(shown, patch_size))

    def settle(self, step: int, metrics, index: np.ndarray) -> None:
        """Wait for a step's numbers, refuse or skip what is not finite, log."""
        plan, last_good = self.plan, self.checkpoints.last_good
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        values = self.skips.check(step, values, index, last_good)
        done = step + 1
        if done % plan.loop.log_every and done < plan.total_steps:
            return
        values["ln_k"] = float(np.log(plan.modules.dino_head.num_prototypes))
        values |= {k: float(s(step)) for k, s in plan.schedules.items()}
        timing = {**self.meter.read(), **self.doctor.seconds()}
        if self.writer:
            self.writer.write(step, values, timing)
            if "total" in values:  # not a skipped step
                self.progress.update(step, values, timing)
            self.doctor.look("metrics", {"step": step, **values})
            self.doctor.look("timing", {"step": step, **timing})

    def save(self, done: int, state) -> None:
        """Start writing the checkpoint after `done` steps."""
        meta = {
            "step": done,
            "groups": self.plan.groups,
            "stream": self.plan.stream,
        }
        self.checkpoints.save(done, state, meta)

    def pause(self, done: int, state) -> None:
        """Save and raise RunPaused."""
        self.save(done, state)
        self.checkpoints.wait()
        raise RunPaused(
            f"{self.signals.received}: saved at step {done} of {self.plan.total_steps};"
            " the same command goes on from there"
        )

    def look_and_save(self, done: int, state, look: bool, save: bool) -> None:
        """Examine the teacher, write the checkpoint and the backbone."""
        teacher, *head = teacher_of(self.plan, state, self.mesh)
        if look:  # before saving: a resumed run must not miss it
            self.doctor.examine(done, *local(teacher, *head))
        if save:
            self.save(done, state)
            save_backbone(self.workdir / "backbone", teacher, step=done)
            if self.guard:
                problem = self.guard(local(teacher, *head)[0], done)
                if problem:
                    raise RunStopped(problem)
