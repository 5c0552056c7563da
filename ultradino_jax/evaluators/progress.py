"""A line every few seconds for work that takes longer: rate and time left."""

import sys
import time


class Progress:
    """Reports `name: done/total, rate, time left` to standard error.

    Nothing is printed for work that ends within `every` seconds.
    """

    def __init__(self, name: str, total: int | None, *, unit: str, every: float = 10):
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.start = self.last = time.monotonic()
        self.first = None  # (time, done) of the first update, which holds the compile

    def update(self, done: int) -> None:
        """Say that `done` of the total are finished."""
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        if now - self.last >= self.every:
            self.last = now
            since, before = self.first if done > self.first[1] else (self.start, 0)
            rate = (done - before) / max(now - since, 1e-9)
            self._print(done, rate, now)

    def close(self) -> None:
        """Print the closing line if anything was printed before."""
        if self.last != self.start:
            print(
                f"{self.name}: done in {time.monotonic() - self.start:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _print(self, done, rate, now):
        line = f"{self.name}: {done}"
        if self.total is not None:
            left = (self.total - done) / rate if rate else float("inf")
            line += f"/{self.total} {self.unit}, about {left:.0f} s left"
        line += f", {rate:.1f} {self.unit}/s, {now - self.start:.0f} s so far"
        print(line, file=sys.stderr, flush=True)
