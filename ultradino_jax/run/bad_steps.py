"""What happens to steps that are not finite and images that cannot be read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.data.sources import BadImage
from ultradino_jax.errors import damaged
from ultradino_jax.jsonl import append, open_rows, read_rows
from ultradino_jax.optimizer import CountState
from ultradino_jax.run.settings import NanPolicy
from ultradino_jax.run.stops import RunStopped
from ultradino_jax.whole import write_json


class BadRecords:
    """Unreadable images met so far: listed in bad_images.jsonl, limited in number."""

    def __init__(self, workdir: Path, source, max_fraction: float, say):
        self.path = workdir / "bad_images.jsonl"
        self.source, self.say = source, say
        self.limit = max_fraction * len(source)
        if jax.process_index() == 0 and self.path.exists():
            open_rows(self.path).close()  # without a line that a crash cut
        with damaged(self.path):
            self.seen = {int(row["index"]) for row in read_rows(self.path)}

    def check(self, indices: np.ndarray) -> None:
        """Take note of indices (-1 is padding). Raises RunStopped over the limit."""
        for index in sorted(set(indices[indices >= 0].tolist()) - self.seen):
            self.seen.add(index)
            record = self.source.record_id(index)
            try:
                self.source[index]
                reason = "unreadable when it was drawn"
            except BadImage as error:
                reason = error.reason
            with self.path.open("ab") as file:
                append(file, {"index": index, "record": record, "reason": reason})
            self.say(f"skipped image {record}: {reason}")
        if len(self.seen) > self.limit:
            raise RunStopped(
                f"{len(self.seen)} of {len(self.source)} images are unreadable, more "
                f"than data.max_bad_fraction allows; they are listed in {self.path}"
            )


class Skips:
    """What happens to a step whose numbers are not finite.

    With the policy 'skip' its update was not applied; it is listed in skipped.jsonl
    with its records.
    """

    def __init__(
        self, workdir: Path, source, policy: NanPolicy, writer, start: int, say
    ):
        self.workdir, self.source, self.policy = workdir, source, policy
        self.writer, self.say = writer, say
        path = workdir / "skipped.jsonl"
        with damaged(path):
            self.count = sum(row["step"] < start for row in read_rows(path))

    def check(self, step: int, values: dict, index: np.ndarray, last_good) -> dict:
        """The values to log. Raises RunStopped when the policy says so.

        index: source records of the batch. last_good(): step of the newest checkpoint.
        """
        values = dict(values)
        values.pop("skipped", None)
        broken = {k: v for k, v in values.items() if not np.isfinite(v)}
        skip = self.policy.policy == "skip"
        if broken:
            records = [self.source.record_id(i) for i in index.ravel()]
            if not skip:
                raise not_finite(step, values, records, self.workdir, last_good())
            self._skip(step, broken, records, last_good)
            values = {}
        return {**values, "skipped": self.count} if skip else values

    def _skip(self, step, broken, records, last_good):
        self.count += 1
        terms = {k: repr(v) for k, v in broken.items()}
        if self.writer:
            self.writer.skipped.write(step, {"terms": terms, "records": records})
        path = self.workdir / "skipped.jsonl"
        self.say(
            f"step {step} skipped: {', '.join(broken)} not finite; its "
            f"{len(records)} records are in {path} ({self.count} so far)"
        )
        if self.count > self.policy.max_skips:
            raise RunStopped(
                f"{self.count} steps were not finite, more than nan.max_skips "
                f"{self.policy.max_skips}; their records are in {path}; last good "
                f"checkpoint: step {last_good()}"
            )


def not_finite(step: int, terms: dict, records: list[str], workdir: Path, last):
    """The RunStopped of a loss that is not finite; nan.json holds the details.

    records: ids of the batch. last: step of the last good checkpoint, or None.
    """
    values = {k: repr(v) for k, v in terms.items()}
    report = {"step": step, "terms": values, "records": records}
    write_json(workdir / "nan.json", report)
    shown = ", ".join(f"{k}={v}" for k, v in terms.items())
    names = ", ".join(records[:4]) + (", .." if len(records) > 4 else "")
    good = "none yet" if last is None else f"step {last}"
    return RunStopped(
        f"loss is not finite at step {step} ({shown}); records {names} (all in "
        f"{workdir / 'nan.json'}); last good checkpoint: {good}"
    )


def skip_not_finite(train_step):
    """train_step that leaves the state alone when any of its metrics is not finite.

    Only the step counters advance (the state's and the schedules'), so data, keys and
    schedules stay functions of the step. The metric 'skipped' is 1 for such a step.
    """

    def step(state, batch):
        new, metrics = train_step(state, batch)
        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()

        def choose(after, before):
            if isinstance(after, CountState):
                return after
            return jnp.where(finite, after, before)

        kept = jax.tree.map(
            choose, new, state, is_leaf=lambda x: isinstance(x, CountState)
        )
        metrics = {**metrics, "skipped": 1.0 - finite.astype(jnp.float32)}
        return kept.replace(step=new.step), metrics

    return step
