"""A folder per evaluation: what it holds is kept, unless it is of something else."""

import json
from pathlib import Path

RECORD = "cell.json"


def claim(folder: Path, config, checkpoint: Path | None) -> dict | None:
    """The results of this evaluation if they are in `folder`, else None.

    config: the ConfigDict of eval.py. Notes both in `folder` on first use, and raises
    ValueError when it belongs to another config or checkpoint.
    """
    identity = {
        "config": json.loads(config.to_json_best_effort()),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    record = folder / RECORD
    if record.is_file() and json.loads(record.read_text()) != identity:
        raise ValueError(
            f"{folder} holds this cell with another config or checkpoint; give another "
            "--out, or delete it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(identity, indent=1) + "\n")
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None
