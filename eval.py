"""Evaluate: python eval.py --config=configs/fetal_planes.py:linear --checkpoint=...

--checkpoint is the workdir of a pretraining run, an exported backbone or a file that
interop can convert, and is left out when all of config.rows are trained from scratch;
--workdir receives the results.
"""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from ultradino_jax import cli
from ultradino_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/*.py[:kind]")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "what is evaluated")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for the results")


def main(argv):
    """Dispatch on the kind of task."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Orbax narrates every file it reads at INFO.
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    if config.task == "classification":
        from ultradino_jax.evaluators.classification.evaluate import evaluate
    elif config.task == "segmentation":
        from ultradino_jax.evaluators.segmentation.evaluate import evaluate
    else:
        raise UserError(f"config.task={config.task!r} is unknown")
    evaluate(config, CHECKPOINT.value, WORKDIR.value)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
