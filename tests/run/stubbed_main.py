"""main.py with the steps of `stubs`: flags, signals, disks and workers are real.

A step takes a tenth of a second of waiting, so that there is time to be killed in.
"""

import sys
import time
from types import SimpleNamespace

from absl import flags

import main
from ultradino_jax import cli


def import_tensorboardx():
    """Without torch, which it imports where that is installed, and uses for nothing."""
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    import tensorboardX.proto.event_pb2  # noqa: F401

    del sys.modules["torch"]


if __name__ == "__main__":
    import_tensorboardx()
    from tests.run import stubs

    def slow(state, batch):
        time.sleep(0.1)
        return stubs.step(state, batch)

    stubs.stub(SimpleNamespace(setattr=setattr), slow)
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main.main)
