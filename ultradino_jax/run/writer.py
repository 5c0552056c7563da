"""What a run writes for people and tools: metric files and a progress line."""

import os
import platform
import struct
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Protobuf makes the messages when the module is imported.
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import image as image_summary
from tensorboardX.summary import scalar as scalar_summary

from ultradino_jax.errors import damaged
from ultradino_jax.jsonl import MetricFile
from ultradino_jax.pretraining.terms import terms_in
from ultradino_jax.progress import format_duration


class Board:
    """A TensorBoard event file, written at once and by nobody else.

    tensorboardX's SummaryWriter hands events to a thread, which dies of a full disk or
    sleeps when the clock is set back; the training then waits for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(file_version="brain.Event:2")
        # Events of later steps, from a run that was cut off, are not shown.
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields):
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))
        self._file.flush()

    def scalars(self, step: int, values: dict) -> None:
        """Record numbers by name."""
        for name, value in values.items():
            self._write(step=step, summary=scalar_summary(name, value))

    def image(self, step: int, name: str, pixels) -> None:
        """Record an image [H,W,3] uint8."""
        summary = image_summary(name, pixels, dataformats="HWC")
        self._write(step=step, summary=summary)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Writer:
    """metrics.jsonl, health.jsonl, skipped.jsonl, timing.jsonl, TensorBoard.

    The first three are a function of the run alone; speed goes to a file of its own
    because it differs from run to run.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0):
        self.workdir = workdir = Path(workdir)
        with damaged(workdir):
            self.metrics, self.health, self.skipped, self.timing = self.files = [
                MetricFile(workdir / f"{name}.jsonl", start_step)
                for name in ("metrics", "health", "skipped", "timing")
            ]
        self.board = Board(workdir / "tensorboard", start_step)

    def write(self, step: int, metrics: dict, timing: dict) -> None:
        """Record float values of a step in all three places."""
        self.metrics.write(step, metrics)
        self.timing.write(step, timing)
        self.board.scalars(step, {**metrics, **timing})

    def write_health(self, step: int, values: dict) -> None:
        """Record what the probe measured after a step."""
        self.health.write(step, values)
        self.board.scalars(step, {f"health/{k}": v for k, v in values.items()})

    def image(self, name: str, step: int, pixels, png: bytes) -> None:
        """Show an image [H,W,3] uint8 in TensorBoard and keep it in panels/."""
        self.board.image(step, name, pixels)
        folder = self.workdir / "panels"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_{step + 1:08d}.png").write_bytes(png)

    def close(self) -> None:
        """Flush and close everything."""
        for file in self.files:
            file.close()
        self.board.close()


class Progress:
    """One line per log step: live on a terminal, plain elsewhere.

    weights: names of the loss weights, which tell the terms to show.
    """

    def __init__(self, total_steps: int, *, weights=(), stream=None):
        self.total, self.weights = total_steps, weights
        self.console = Console(file=stream or sys.stdout, highlight=False)
        self.live = (
            Live(console=self.console, auto_refresh=False)
            if self.console.is_terminal
            else None
        )
        if self.live:
            self.live.start()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, step: int, metrics: dict, timing: dict) -> None:
        """Show step, losses, speed and time left."""
        left = (self.total - step - 1) * timing["seconds_per_step"]
        terms = " ".join(
            f"{name} {metrics[name]:.4f}"
            for name in ("total", *terms_in(metrics, self.weights))
        )
        utilisation = (
            f"MFU {100 * timing['mfu']:.1f}%"
            if "mfu" in timing
            else f"{timing['gflops_per_second']:.0f} GFLOP/s"
        )
        text = (
            f"step {step + 1}/{self.total}  {terms}  "
            f"entropy {metrics['teacher_entropy']:.3f} of {metrics['ln_k']:.3f}  "
            f"{timing['images_per_second']:.1f} img/s  "
            f"data wait {100 * timing['data_wait']:.0f}%  {utilisation}  "
            f"ETA {format_duration(left)}"
        )
        if self.live:
            self.live.update(Text(text), refresh=True)
        else:
            self.say(time.strftime("%H:%M:%S ") + text)

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self.live:
            self.live.stop()
