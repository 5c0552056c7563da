"""A folder per evaluation: what it holds is kept, unless it is of something else."""

import json
from pathlib import Path

from ultradino_jax import whole
from ultradino_jax.whole import read_json

RECORD = "cell.json"


def claim(folder: Path, config, checkpoint: Path | None) -> dict | None:
    """The results of this evaluation if they are in `folder`, else None.

    config: the ConfigDict of eval.py. Notes both in `folder` on first use, and raises
    UserError when it belongs to another config or checkpoint.
    """
    identity = {
        "config": json.loads(config.to_json_best_effort()),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    advice = "give another --out, or delete it"
    whole.claim(folder / RECORD, identity, "this cell", advice)
    path = folder / "results.json"
    return read_json(path) if path.is_file() else None
