"""What every process that gpu.py starts has in common."""

import contextlib
import fcntl
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax


def about_device() -> dict:
    """What ran, on what, when."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": getattr(device.client, "platform_version", "").replace("\n", " "),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def error_row(error: Exception) -> dict:
    """The error's first line as a row."""
    lines = str(error).strip().splitlines() or [""]
    return {"error": f"{type(error).__name__}: {lines[0]}"[:300]}


def kept(function: Callable[..., dict], *arguments) -> dict:
    """The function's row, or its error's: what it is part of goes on."""
    try:
        return function(*arguments)
    except Exception as error:  # out of memory, a missing cuDNN, whatever it is
        return error_row(error)


@contextlib.contextmanager
def alone(path: str | None, alone: bool = True):
    """A lock on a file: rows compile side by side (not alone) but are timed alone."""
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def work(measure: Callable[[dict], dict], argv: list[str]) -> None:
    """A worker's main function: the row of measure(SPEC) to OUT, also if it fails."""
    spec, out = json.loads(argv[1]), Path(argv[2])
    row = about_device()
    try:
        row |= measure(spec)
    except Exception as error:
        out.write_text(json.dumps(row | error_row(error)))
        raise
    out.write_text(json.dumps(row))
