"""What a run writes for people and tools: metric files and a progress line."""

import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX import SummaryWriter


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


class MetricFile:
    """JSON lines {'step': k, name: value, ..} that survive a restart.

    Opening at `start_step` drops the lines of later steps (and a line cut by a crash),
    so a resumed run leaves the same bytes as one that was never stopped.
    """

    def __init__(self, path: Path, start_step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: dict) -> None:
        """Append one line, flushed."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

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
        self.metrics, self.health, self.skipped, self.timing = self.files = [
            MetricFile(workdir / f"{name}.jsonl", start_step)
            for name in ("metrics", "health", "skipped", "timing")
        ]
        self.board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step, write_to_disk=True
        )

    def write(self, step: int, metrics: dict, timing: dict) -> None:
        """Record float values of a step in all three places."""
        self.metrics.write(step, metrics)
        self.timing.write(step, timing)
        for name, value in {**metrics, **timing}.items():
            self.board.add_scalar(name, value, step)

    def write_health(self, step: int, values: dict) -> None:
        """Record what the probe measured after a step."""
        self.health.write(step, values)
        for name, value in values.items():
            self.board.add_scalar(f"health/{name}", value, step)

    def image(self, name: str, step: int, pixels, png: bytes) -> None:
        """Show an image [H,W,3] uint8 in TensorBoard and keep it in panels/."""
        self.board.add_image(name, pixels, step, dataformats="HWC")
        folder = self.workdir / "panels"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_{step + 1:08d}.png").write_bytes(png)

    def close(self) -> None:
        """Flush and close everything."""
        for file in self.files:
            file.close()
        self.board.close()


class Progress:
    """One line per log step: live on a terminal, plain elsewhere."""

    def __init__(self, total_steps: int, *, stream=None):
        self.total = total_steps
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
            for name in ("total", "dino_local", "dino_global", "koleo", "ibot")
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
