"""Alarms: what looks wrong in the metrics of a run, since when, what to try.

An alarm looks at one row at a time, of metrics.jsonl, timing.jsonl or health.jsonl. It
goes on after `rows` bad rows in a row and off at the first good one. The list is a
function of those three files, so a resumed run rebuilds it by reading them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ultradino_jax.jsonl import read_rows
from ultradino_jax.pretraining.terms import terms_in


@dataclass(frozen=True)
class Facts:
    """What an alarm must know of the config.

    warmup: steps of learning-rate warm-up, during which low information is normal.
    dino_weight: of the loss. num_prototypes: K.
    """

    warmup: int = 0
    dino_weight: float = 1.0
    num_prototypes: int = 65536


@dataclass(frozen=True)
class Alarm:
    """name, the file it reads, how many rows must be bad, the test and the advice.

    bad(row, facts) says what is seen, or None. A row without the keys is skipped.
    """

    name: str
    source: str
    rows: int
    bad: Callable[[dict, Facts], str | None]
    advice: str


def _warm(row, facts):
    return row["step"] >= facts.warmup


def uniform_collapse(row, facts):
    """The teacher says the same of every image, without being certain."""
    information = row["marginal_entropy"] - row["teacher_entropy"]
    ln_k = row["ln_k"]
    soft = row["marginal_entropy"] > 0.1 * ln_k
    if not (_warm(row, facts) and soft and information < 0.01 * ln_k):
        return None
    return (
        f"teacher entropy {row['teacher_entropy']:.3f} of ln K {ln_k:.3f}, that of its "
        f"mean answer {row['marginal_entropy']:.3f}: no image is told from another"
    )


def one_hot_collapse(row, facts):
    """The teacher is certain of one and the same prototype for every image."""
    if not (_warm(row, facts) and row["marginal_entropy"] < 0.1 * row["ln_k"]):
        return None
    return (
        f"the teacher's mean answer has entropy {row['marginal_entropy']:.3f} of ln K "
        f"{row['ln_k']:.3f}: one prototype takes all images"
    )


def dimensional_collapse(row, facts):
    """Features lie on a few directions."""
    limit = max(1.5, 0.01 * row["dimensions"])
    flat = row["rankme_cls"] < limit or row["std_cls"] < 0.01
    if not (_warm(row, facts) and flat):
        return None
    return (
        f"RankMe of the CLS tokens is {row['rankme_cls']:.1f} of "
        f"{row['dimensions']:.0f}, their standard deviation {row['std_cls']:.3f} of 1"
    )


def dead_prototypes(row, facts):
    """Hardly any prototype ever wins."""
    if not (_warm(row, facts) and row["prototypes_used"] < 0.05):
        return None
    return (
        f"the images of the probe use {100 * row['prototypes_used']:.1f} % of the "
        f"prototypes that even use would reach (K = {facts.num_prototypes})"
    )


def duplicate_frames(row, facts):
    """Many images have a twin."""
    if row["duplicates"] <= 0.2:
        return None
    return (
        f"{100 * row['duplicates']:.0f} % of the probe's training images have a twin "
        "among them"
    )


def data_starvation(row, facts):
    """The device waits for images."""
    if row["data_wait"] <= 0.3:
        return None
    return (
        f"{100 * row['data_wait']:.0f} % of the time is spent waiting for images "
        f"({row['images_per_second']:.1f} images per second)"
    )


def learning_rate(row, facts):
    """Steps too long for the weights, or a student worse than an ignorant one."""
    ratio = row["update_norm/backbone"] / max(row["weight_norm/backbone"], 1e-12)
    weight = row.get("dino_weight", facts.dino_weight)  # in the row when scheduled
    loss = sum(row[k] for k in terms_in(row, ["dino_weight"])) / max(weight, 1e-12)
    if ratio > 0.05:
        return f"one step moves the backbone by {100 * ratio:.1f} % of its norm"
    if _warm(row, facts) and loss > 1.2 * row["ln_k"]:
        return (
            f"the DINO loss {loss:.3f} is above ln K {row['ln_k']:.3f}, that of a "
            "student that knows nothing"
        )
    return None


ALARMS = (
    Alarm(
        "uniform collapse",
        "metrics",
        5,
        uniform_collapse,
        "lower teacher.warmup_temp and teacher.temp (0.04 and below), "
        "loss.centering=sinkhorn_knopp, a longer optim.warmup_epochs; a batch below "
        "about 64 carries too little signal",
    ),
    Alarm(
        "one-hot collapse",
        "metrics",
        5,
        one_hot_collapse,
        "raise teacher.temp, loss.centering=sinkhorn_knopp, lower optim.base_lr; small "
        "batches need a higher teacher.momentum (0.998 and above)",
    ),
    Alarm(
        "dimensional collapse",
        "health",
        2,
        dimensional_collapse,
        "raise loss.koleo_weight, use larger groups (KoLeo needs neighbours), lower "
        "optim.base_lr; check with the panels that the images are not all alike",
    ),
    Alarm(
        "dead prototypes",
        "health",
        2,
        dead_prototypes,
        "lower head.num_prototypes, loss.centering=sinkhorn_knopp, or a longer "
        "optim.freeze_last_layer_epochs",
    ),
    Alarm(
        "duplicate frames",
        "health",
        1,
        duplicate_frames,
        "drop duplicates and thin cine loops with python -m ultradino_jax.prepare, and "
        "train on the cache it writes",
    ),
    Alarm(
        "data starvation",
        "timing",
        5,
        data_starvation,
        "more data.workers and data.threads, a prepared cache on a local disk, smaller "
        "or 8-bit images; a slow disk shows as low CPU use",
    ),
    Alarm(
        "learning rate and batch do not fit",
        "metrics",
        3,
        learning_rate,
        "lower optim.base_lr (it is multiplied by sqrt(batch_size / 1024)), lengthen "
        "optim.warmup_epochs, or raise the batch with accum_steps",
    ),
)
SOURCES = ("metrics", "timing", "health")


class Watch:
    """The alarms of one run. `active` maps a name to its event."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.active: dict[str, dict] = {}
        self._streak: dict[str, tuple[int, int]] = {}  # name -> (first step, rows)

    def add(self, source: str, row: dict) -> list[dict]:
        """Look at a row of a file; returns the alarms that went on or off.

        An event is {'step', 'alarm', 'on', 'since', 'seen', 'advice'}.
        """
        events = []
        for alarm in ALARMS:
            if alarm.source != source:
                continue
            try:
                seen = alarm.bad(row, self.facts)
            except KeyError:  # e.g. the row of a skipped step
                continue
            event = self._update(alarm, row["step"], seen)
            if event:
                events.append(event)
        return events

    def _update(self, alarm: Alarm, step: int, seen: str | None) -> dict | None:
        name = alarm.name
        if seen is None:
            self._streak.pop(name, None)
            event = self.active.pop(name, None)
            return event and {**event, "step": step, "on": False}
        first, rows = self._streak.get(name, (step, 0))
        self._streak[name] = (first, rows + 1)
        if rows + 1 < alarm.rows or name in self.active:
            return None
        self.active[name] = {
            "step": step,
            "alarm": name,
            "on": True,
            "since": first,
            "seen": seen,
            "advice": alarm.advice,
        }
        return self.active[name]


def replay(workdir: str | Path, facts: Facts, before: int | None = None):
    """(Watch, events) after the rows of a workdir's files, those of steps < before."""
    watch, events = Watch(facts), []
    rows = [
        (row["step"], place, source, row)
        for place, source in enumerate(SOURCES)
        for row in read_rows(Path(workdir) / f"{source}.jsonl")
        if before is None or row["step"] < before
    ]
    for _, _, source, row in sorted(rows, key=lambda item: item[:2]):
        events += watch.add(source, row)
    return watch, events


def describe(event: dict) -> str:
    """One line for the log."""
    if not event["on"]:
        return f"alarm over at step {event['step']}: {event['alarm']}"
    return (
        f"ALARM {event['alarm']} since step {event['since']}: {event['seen']}. "
        f"Try: {event['advice']}"
    )
