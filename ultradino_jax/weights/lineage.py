"""Which runs a checkpoint comes from, and which images they saw.

A run leaves its config.json and run.json in its workdir. One that began with the
weights of another (`init_from`) saw that one's images, too.
"""

from pathlib import Path
from typing import Any

from ultradino_jax.errors import damaged
from ultradino_jax.whole import read_json


def run_of(checkpoint: str | Path) -> Path | None:
    """The workdir of the pretraining run that a path is or lies in, or None.

    Other programs' folders may have a config.json, too; it says nothing of images.
    """
    path = Path(checkpoint).absolute()
    for folder in (path, path.parent):
        file = folder / "config.json"
        if file.is_file() and "data" in read_json(file):
            return folder
    return None


def lineage(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The runs behind a checkpoint, newest first.

    A run is {'run': its workdir, 'root', 'list_file': of its images ('' is the built-in
    phantom), 'digest': that of the images, None when it was not noted}. What began with
    weights of no run ends in {'file': their path}. Raises UserError for a damaged
    record.
    """
    found: list[dict] = []
    seen = set()
    while checkpoint:
        folder = run_of(checkpoint)
        if folder is None:
            found.append({"file": str(checkpoint)})
            break
        if folder in seen:
            break
        seen.add(folder)
        config = read_json(folder / "config.json")
        file = folder / "run.json"
        facts = read_json(file) if file.is_file() else {}
        with damaged(folder):
            entry = {name: config["data"][name] for name in ("root", "list_file")}
            found.append({"run": str(folder), **entry, "digest": facts.get("digest")})
            if "ancestors" in facts:  # as they were when the run began
                return found + [dict(entry) for entry in facts["ancestors"]]
            checkpoint = config.get("init_from", "")
    return found
