"""A folder per evaluation: what it holds is kept, unless it is of something else."""

import json
from pathlib import Path

from ultradino_jax import whole
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.whole import read_json

RECORD = "cell.json"


def claim(folder: Path, config, checkpoint: Path | None) -> dict | None:
    """The results of this evaluation if they are in `folder`, else None.

    config: the ConfigDict of eval.py. Notes both in `folder` on first use, and raises
    UserError when it belongs to another config or other weights, also under the same
    name.
    """
    identity = {
        "config": json.loads(config.to_json_best_effort()),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "weights": None if checkpoint is None else load_backbone(checkpoint).digest,
    }
    advice = "give another --out, or delete it"
    record, missing = folder / RECORD, {}
    # Cells were once noted without a digest: then the file's time must do.
    if checkpoint is not None and record.is_file():
        older = checkpoint.stat().st_mtime < record.stat().st_mtime
        missing = {"weights": identity["weights"]} if older else {}
    whole.claim(record, identity, "this cell", advice, missing=missing)
    path = folder / "results.json"
    return read_json(path) if path.is_file() else None
