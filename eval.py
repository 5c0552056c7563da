"""Evaluate: python eval.py --config=configs/fetal_planes.py:linear --checkpoint=...

--checkpoint is the workdir of a pretraining run, an exported backbone or a file that
can be converted, and is left out when all of config.rows are trained from scratch;
--workdir receives the results.
"""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from ultradino_jax import cli

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/*.py[:kind]")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "what is evaluated")
WORKDIR = flags.DEFINE_string("workdir", None, "folder for the results", required=True)


def main(argv):
    """Evaluate what the config describes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Orbax narrates every file it reads at INFO.
    logging.set_verbosity(logging.WARNING)
    from ultradino_jax.evaluators.evaluate import evaluate

    evaluate(CONFIG.value, CHECKPOINT.value, WORKDIR.value)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    flags.mark_flag_as_required("config")
    cli.run(main)
