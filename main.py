"""Pretrain: python main.py --config=configs/pretrain_vitb.py --workdir=runs/x."""

import os
import sys

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


def guard(config):
    """What train() calls at a checkpoint of a run that continues from other weights."""
    if not (config.init_from and config.knn.guard):
        return None
    from ultradino_jax.health.phantom_knn import make_guard
    from ultradino_jax.run.plan import phantom_source
    from ultradino_jax.run.train import RunStopped

    check = make_guard(config.knn.patients, phantom_source(config), config.knn.guard)

    def stop(teacher, start, step):
        if problem := check(teacher, start, step):
            raise RunStopped(problem)

    return stop


def join_others():
    """Connect to the job's other processes, if the flags say that there are any."""
    if not (DISTRIBUTED.value or COORDINATOR.value):
        return
    import jax

    place = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if COORDINATOR.value and None in place:
        sys.exit("error: --coordinator needs --num_processes and --process_id")
    try:
        jax.distributed.initialize(*place)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: cannot join the other processes: {error}")


def main(argv):
    """Train, then score the phantom kNN if the config asks for it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Imported here: the data workers are spawned and import this file.
    # Orbax narrates every file it writes at INFO.
    logging.set_verbosity(logging.WARNING)
    import jax

    from ultradino_jax.run.plan import phantom_source
    from ultradino_jax.run.stops import EXIT_PAUSED, RunPaused, RunStopped
    from ultradino_jax.run.train import train

    join_others()
    try:
        workdir = train(CONFIG.value, WORKDIR.value, guard(CONFIG.value))
        if CONFIG.value.knn.enabled and jax.process_index() == 0:
            from ultradino_jax.health.phantom_knn import phantom_knn

            phantom_knn(
                workdir, CONFIG.value.knn.patients, phantom_source(CONFIG.value)
            )
    except RunStopped as stopped:
        sys.exit(f"error: {stopped}")
    except RunPaused as paused:
        print(f"paused: {paused}", flush=True)
        sys.exit(EXIT_PAUSED)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
