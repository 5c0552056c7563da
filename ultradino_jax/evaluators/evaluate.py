"""The door to both kinds of evaluation."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from ultradino_jax.errors import UserError
from ultradino_jax.whole import Lock, named


def evaluate(
    config: ConfigDict,
    checkpoint: str | Path | None,
    workdir: str | Path,
    say: Callable[[str], None] = print,
) -> dict:
    """Run the evaluation a config describes and return what results.json holds.

    config: of configs/fetal_planes.py, fass.py or jnu_ifm.py; its `task` is
    'classification' or 'segmentation'. checkpoint: what `load_backbone` reads; None
    when all rows of the config are trained from scratch. workdir: folder for the
    results, of one process at a time; the same call again goes on after an
    interruption. say: receives the lines
    that tell how it goes.

    Raises UserError or OSError with one line when the input is bad.
    """
    workdir = named(workdir, "workdir")
    # Either kind alone is enough to wait for.
    if config.task == "classification":
        from ultradino_jax.evaluators.classification.evaluate import evaluate as run
    elif config.task == "segmentation":
        from ultradino_jax.evaluators.segmentation.evaluate import evaluate as run
    else:
        raise UserError(f"config.task={config.task!r} is unknown")
    with contextlib.closing(Lock(workdir)):
        return run(config, checkpoint, workdir, say)
