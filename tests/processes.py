"""Programs in a process of their own, as users start them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(devices: int = 1) -> dict[str, str]:
    """This process's, with another number of CPU devices and the tests' cache."""
    here = os.environ["XLA_FLAGS"]
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": re.sub(r"(count=)\d+", rf"\g<1>{devices}", here),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def start_main(
    workdir, *flags, devices: int = 1, program=("main.py",), **popen
) -> subprocess.Popen:
    """main.py, or another program with its flags; stdout and stderr come together."""
    return subprocess.Popen(
        [sys.executable, *program, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **popen,
    )
