"""Pretrain: python main.py --config=configs/pretrain_vitb.py --workdir=runs/x."""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from ultradino_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/pretrain_*.py")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; resumed if it exists"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "join the other processes of a SLURM, OpenMPI or cloud job"
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where no launcher says it"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator, from 0")


def main(argv):
    """Join the other processes if there are any, and train."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Imported here: the data workers are spawned and import this file.
    # Orbax narrates every file it writes at INFO.
    logging.set_verbosity(logging.WARNING)
    from ultradino_jax.run.train import join_others, train

    if DISTRIBUTED.value or COORDINATOR.value:
        join_others(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    assert WORKDIR.value is not None  # the flag is required
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
