"""What stops a run, and how fast it goes."""

import contextlib
import json
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np

from ultradino_jax.data.sources import BadImage
from ultradino_jax.health.alarms import read_rows
from ultradino_jax.run.plan import Plan, peak_flops


class RunStopped(Exception):
    """The run cannot start or go on; the message is one line for the user."""


# sysexits.h EX_TEMPFAIL: saved on a signal, the same command goes on.
EXIT_PAUSED = 75


class RunPaused(Exception):
    """A signal ended the run after its state was saved; the message says where."""


class Interrupted(Exception):
    """Raised by a signal's handler where the main thread waits for data."""


class Signals:
    """SIGINT, SIGTERM and SIGUSR1 as a request to save and stop.

    `received` is the name of the first one or None. A second one has its usual effect
    at once. Outside the main thread, where Python allows no handlers, nothing changes.
    interrupt_waits: whether `waiting` is cut short; not where several processes must
    take the same number of steps.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, interrupt_waits: bool = True):
        self.received: str | None = None
        self.interrupt_waits = interrupt_waits
        self._waiting = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in self.CAUGHT}

    def _handle(self, number, frame):
        del frame
        self.received = signal.Signals(number).name
        self.close()
        if self._waiting:
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self):
        """A wait that a signal cuts short by raising Interrupted."""
        self._waiting = self.interrupt_waits
        try:
            if self.received and self.interrupt_waits:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class BadRecords:
    """Unreadable images met so far: listed in bad_images.jsonl, limited in number."""

    def __init__(self, workdir: Path, source, max_fraction: float, say):
        self.path = workdir / "bad_images.jsonl"
        self.source, self.say = source, say
        self.limit = max_fraction * len(source)
        self.seen = set()
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            self.seen = {json.loads(line)["index"] for line in lines}

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
            line = {"index": index, "record": record, "reason": reason}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.say(f"skipped image {record}: {reason}")
        if len(self.seen) > self.limit:
            raise RunStopped(
                f"{len(self.seen)} of {len(self.source)} images are unreadable, more "
                f"than data.max_bad_fraction allows; they are listed in {self.path}"
            )


class Meter:
    """Speed since the last reading."""

    def __init__(self, plan: Plan, batch_size: int, dtype: str):
        self.plan, self.batch_size = plan, batch_size
        peak = peak_flops(jax.devices()[0]) if dtype == "bfloat16" else None
        self.peak = peak and peak * jax.device_count()
        self.last = None
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start, self.steps, self.waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def read(self) -> dict[str, float]:
        """Rates since the last reading; starts a new interval.

        With no step since, as when a checkpoint waits for the step just logged, the
        last reading again.
        """
        if self.steps == 0 and self.last:
            return self.last
        elapsed = time.monotonic() - self.start
        seconds = elapsed / max(self.steps, 1)
        flops = self.plan.flops_per_step / seconds
        timing = {
            "seconds_per_step": seconds,
            "images_per_second": self.batch_size / seconds,
            "data_wait": self.waited / elapsed,
            "gflops_per_second": flops / 1e9,
        }
        if self.peak:
            timing["mfu"] = flops / self.peak
        self.reset()
        self.last = timing
        return timing


class Skips:
    """What happens to a step whose numbers are not finite.

    settings: nan.policy, 'stop' or 'skip' (the update was not applied), and
    nan.max_skips. Skipped steps are listed in skipped.jsonl with their records.
    """

    def __init__(self, workdir: Path, source, settings, writer, start: int, say):
        self.workdir, self.source, self.settings = workdir, source, settings
        self.writer, self.say = writer, say
        rows = read_rows(workdir / "skipped.jsonl")
        self.count = sum(row["step"] < start for row in rows)

    def check(self, step: int, values: dict, index: np.ndarray, last_good) -> dict:
        """The values to log. Raises RunStopped when the policy says so.

        index: source records of the batch. last_good(): step of the newest checkpoint.
        """
        values = dict(values)
        values.pop("skipped", None)
        broken = {k: v for k, v in values.items() if not np.isfinite(v)}
        skip = self.settings.policy == "skip"
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
        if self.count > self.settings.max_skips:
            raise RunStopped(
                f"{self.count} steps were not finite, more than nan.max_skips "
                f"{self.settings.max_skips}; their records are in {path}; last good "
                f"checkpoint: step {last_good()}"
            )


def not_finite(step: int, terms: dict, records: list[str], workdir: Path, last):
    """The RunStopped of a loss that is not finite; nan.json holds the details.

    records: ids of the batch. last: step of the last good checkpoint, or None.
    """
    report = {"step": step, "terms": {k: repr(v) for k, v in terms.items()}}
    (workdir / "nan.json").write_text(
        json.dumps({**report, "records": records}, indent=1) + "\n"
    )
    shown = ", ".join(f"{k}={v}" for k, v in terms.items())
    names = ", ".join(records[:4]) + (", .." if len(records) > 4 else "")
    good = "none yet" if last is None else f"step {last}"
    return RunStopped(
        f"loss is not finite at step {step} ({shown}); records {names} (all in "
        f"{workdir / 'nan.json'}); last good checkpoint: {good}"
    )
