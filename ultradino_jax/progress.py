"""How far work has got, said to people: rate and time left."""

import sys
import time


def warn(line: str) -> None:
    """A line to people, beside what a command prints."""
    print(line, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """90061 -> '1d 1h', 3700 -> '1h 1m', 75 -> '1m 15s'."""
    seconds = int(seconds)
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    parts = []
    for name, size in units:
        if seconds >= size or (name == "s" and not parts):
            parts.append(f"{seconds // size}{name}")
            seconds %= size
    return " ".join(parts[:2])


class Progress:
    """A line every few seconds to standard error: `name: done/total, time left, rate`.

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
            took = format_duration(time.monotonic() - self.start)
            print(f"{self.name}: done in {took}", file=sys.stderr, flush=True)

    def _print(self, done, rate, now):
        line = f"{self.name}: {done}"
        if self.total is not None:
            left = format_duration((self.total - done) / rate) if rate else "unknown"
            line += f"/{self.total} {self.unit}, about {left} left"
        so_far = format_duration(now - self.start)
        line += f", {rate:.1f} {self.unit}/s, {so_far} so far"
        print(line, file=sys.stderr, flush=True)
