"""What stops a run, and how fast it goes."""

import contextlib
import json
import time
from pathlib import Path

import jax
import numpy as np

from ultradino_jax.data.sources import BadImage
from ultradino_jax.plan import Plan, peak_flops


class RunStopped(Exception):
    """The run cannot start or go on; the message is one line for the user."""


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
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Rates since the last reading; starts a new interval.

        With no step since, as when a checkpoint waits for the step just logged, the
        last reading again.
        """
        if self.steps == 0 and self.last:
            return self.last
        elapsed = time.perf_counter() - self.start
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
