"""Looks after a run: the probe at its cadence, the alarms, the pictures."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.health import alarms
from ultradino_jax.health.panels import attention_panel, png
from ultradino_jax.health.teacher import Probe
from ultradino_jax.jsonl import MetricFile, read_rows
from ultradino_jax.weights.backbone import Backbone


@dataclass(frozen=True)
class HealthSettings:
    """When a teacher is looked at, and on what.

    every: steps, 0 is never. images: of the training set. labels, patients, phantom:
    see `teacher.load_labelled`. panels_every: looks per attention panel, 0 for none.
    """

    every: int
    images: int
    labels: str
    patients: int
    panels_every: int
    phantom: PhantomSource


class Writer(Protocol):
    """Where measurements and pictures go."""

    def write_health(self, step: int, values: dict) -> None:
        """Record what the probe measured after a step."""

    def image(self, name: str, step: int, pixels, png: bytes) -> None:
        """Keep an image [H,W,3] uint8."""


class Doctor:
    """Health of one run, from step `start` on.

    source: the training images. head: the DINO head's module. writer: None where
    another process writes. scores: {steps done: kNN}, filled in as it is measured.
    Raises UserError or OSError with one line when the labelled set cannot be read.
    """

    def __init__(
        self,
        settings: HealthSettings,
        facts: alarms.Facts,
        source,
        head,
        *,
        workdir: Path,
        writer: Writer | None,
        scores: dict[int, float],
        total_steps: int,
        start: int,
        say,
    ):
        self.settings, self.head, self.total_steps = settings, head, total_steps
        self.writer, self.scores, self.say = writer, scores, say
        self.spent = 0.0
        self.prepared = False
        self.probe = Probe(
            source,
            images=settings.images,
            labels=settings.labels,
            patients=settings.patients,
            phantom=settings.phantom,
        )
        with damaged(workdir):
            for row in read_rows(workdir / "health.jsonl"):
                if row["step"] < start:
                    scores[row["step"] + 1] = row["knn"]
            self.watch, events = alarms.replay(workdir, facts, start)
        self.file = None
        if writer:
            self.file = MetricFile(workdir / "alarms.jsonl", 0)
            for event in events:
                self._record(event)

    def due(self, done: int) -> bool:
        """Whether the teacher is examined after `done` steps."""
        every = self.settings.every
        return every > 0 and (done % every == 0 or done == self.total_steps)

    def missed(self, start: int) -> bool:
        """Whether a run that goes on from `start` was stopped before its look there."""
        return start > 0 and self.due(start) and start not in self.scores

    def examine(self, done: int, teacher: Backbone, head_params, center) -> None:
        """Measure, log, and draw every `health.panels_every`-th time.

        Several processes do the same work, each on its own devices.
        """
        start = time.monotonic()
        if not self.prepared:
            try:
                self.probe.prepare(teacher)
            except (UserError, OSError) as error:
                raise UserError(f"health: {error}") from error
            self.prepared = True
        values = self.probe(teacher, self.head, head_params, center)
        self.scores[done] = values["knn"]
        if self.writer:
            self.writer.write_health(done - 1, values)
            every = self.settings.panels_every
            count = -(-done // self.settings.every)
            if every and (count % every == 0 or done == self.total_steps):
                panel = attention_panel(teacher, self.probe.panel_images())
                self.picture("attention", done - 1, panel)
            self.look("health", {"step": done - 1, **values})
        seconds = time.monotonic() - start
        self.spent += seconds
        self.say(
            f"health after step {done}: kNN {100 * values['knn']:.1f} %  RankMe "
            f"{values['rankme_cls']:.1f} and {values['rankme_patch']:.1f} of "
            f"{values['dimensions']:.0f}  std {values['std_cls']:.3f}  duplicates "
            f"{100 * values['duplicates']:.0f} %  prototypes "
            f"{100 * values['prototypes_used']:.0f} %  ({seconds:.1f} s)"
        )

    def seconds(self) -> dict[str, float]:
        """{'health_seconds': spent since the last call} when there were any."""
        spent, self.spent = self.spent, 0.0
        return {"health_seconds": spent} if spent else {}

    def picture(self, name: str, step: int, pixels) -> None:
        """Into TensorBoard and workdir/panels."""
        if self.writer:
            self.writer.image(name, step, pixels, png(pixels))

    def look(self, source: str, row: dict) -> None:
        """Show a row of a file to the alarms."""
        for event in self.watch.add(source, row):
            self._record(event)
            self.say(alarms.describe(event))

    def _record(self, event: dict) -> None:
        if self.file:
            step = event["step"]
            self.file.write(step, {k: v for k, v in event.items() if k != "step"})

    def close(self) -> None:
        """Close alarms.jsonl."""
        if self.file:
            self.file.close()
