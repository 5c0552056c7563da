"""Looks after a run: the probe at its cadence, the alarms, the pictures."""

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ultradino_jax.backbone import Backbone
from ultradino_jax.checkpoint import Retention
from ultradino_jax.health import alarms
from ultradino_jax.health.panels import attention_panel, png
from ultradino_jax.health.teacher import Probe
from ultradino_jax.jsonl import MetricFile, read_rows
from ultradino_jax.run.plan import Plan, phantom_source
from ultradino_jax.run.stops import RunStopped
from ultradino_jax.run.writer import Writer


def facts_of(config: ConfigDict, plan: Plan) -> alarms.Facts:
    """What the alarms must know of a run."""
    return alarms.Facts(
        warmup=int(config.optim.warmup_epochs * plan.steps_per_epoch),
        dino_weight=config.loss.dino_weight,
        num_prototypes=config.head.num_prototypes,
    )


class Doctor:
    """Health of one run, from step `start` on.

    Raises RunStopped with one line when the labelled set cannot be read.
    """

    def __init__(
        self,
        config: ConfigDict,
        plan: Plan,
        workdir: Path,
        writer: Writer | None,
        retention: Retention,
        start: int,
        say,
    ):
        self.plan, self.writer, self.say = plan, writer, say
        self.settings = config.health
        self.retention = retention
        self.spent = 0.0
        self.prepared = False
        self.probe = Probe(
            plan.source,
            images=config.health.images,
            labels=config.health.labels,
            patients=config.health.patients,
            phantom=phantom_source(config),
        )
        for row in read_rows(workdir / "health.jsonl"):
            if row["step"] < start:
                retention.scores[row["step"] + 1] = row["knn"]
        self.watch, events = alarms.replay(workdir, facts_of(config, plan), start)
        self.file = None
        if writer:
            self.file = MetricFile(workdir / "alarms.jsonl", 0)
            for event in events:
                self._record(event)

    def due(self, done: int) -> bool:
        """Whether the teacher is examined after `done` steps."""
        every = self.settings.every
        return every > 0 and (done % every == 0 or done == self.plan.total_steps)

    def examine(self, done: int, teacher: Backbone, head_params, center) -> None:
        """Measure, log, and draw every `health.panels_every`-th time."""
        start = time.monotonic()
        # Several processes do the same work, each on its own devices.
        teacher, head_params, center = _local((teacher, head_params, center))
        if not self.prepared:
            try:
                self.probe.prepare(teacher)
            except (ValueError, OSError) as error:
                raise RunStopped(f"health: {error}") from error
            self.prepared = True
        head = self.plan.modules.dino_head
        values = self.probe(teacher, head, head_params, center)
        self.retention.scores[done] = values["knn"]
        if self.writer:
            self.writer.write_health(done - 1, values)
            every = self.settings.panels_every
            count = -(-done // self.settings.every)
            if every and (count % every == 0 or done == self.plan.total_steps):
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


def _local(parts):
    """The same values as host arrays where the devices are not all this process's."""
    if jax.process_count() == 1:
        return parts
    backbone, head_params, center = parts
    params = jax.device_get(backbone.params)
    return (
        Backbone(**{**vars(backbone), "params": params}),
        jax.device_get(head_params),
        jax.device_get(center),
    )
