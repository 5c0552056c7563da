"""What evaluations of every kind share: rows, the facts of a call, and its results.

A kind is a folder: settings.py reads its config, evaluate.py goes from data to results
with `begin` and `finish`, results.py says its figures. The kind brings
the loader of its data, the fit and score of a row, and the figures.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ultradino_jax.data.source_digest import sampled_pixels
from ultradino_jax.evaluators.overlap import check_overlap
from ultradino_jax.limits import FLAG, SEED, TEXT, choice, integer, number, several
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.whole import claim, write_json

PACKAGES = ("jax", "flax", "optax", "numpy")
COUNT = integer(1)
# What the values may be that the configs of all kinds have.
LIMITS = {
    "data.path": TEXT,
    "data.data_dir": TEXT,
    "data.manual_dir": TEXT,
    "data.download": FLAG,
    "data.val_fraction": number(0, 1),
    "data.test_fraction": number(0, 1),
    "data.split_seed": SEED,
    "data.classes": several(TEXT),
    "allow_overlap": FLAG,
    "model.arch": choice(("", *VARIANTS)),
    "model.patch_size": COUNT,
    "model.image_size": integer(0),
    "model.channels": choice((0, 1, 3)),
    "random_init_seed": SEED,
    "seeds": several(SEED, least=1),
    "replicates": COUNT,
}


@dataclass
class Entry:
    """Runs of one method on one row ('teacher', 'random init', 'unet', ..)."""

    row: str
    method: str
    shots: int | None = None
    runs: list[Any] = field(default_factory=list)

    @property
    def label(self) -> str:
        """'teacher/linear', 'teacher/logreg/10'."""
        parts = [self.row, self.method, *([str(self.shots)] if self.shots else [])]
        return "/".join(parts)


# Settings that change no number of a row's run that is kept in the folder.
FREE = (
    "allow_overlap",
    "seeds",
    "rows",
    "replicates",
    "data.path",
    "data.data_dir",
    "data.manual_dir",
    "data.download",
    "external.path",
    "external.data_dir",
    "external.manual_dir",
    "external.download",
    "finetune.checkpoint_every",
    "checkpoint_every",
)
IDENTITY = "evaluation.json"


def seed_folder(workdir: str | Path, row: str, seed: int) -> Path:
    """Where the model and predictions of a row's run are kept."""
    return Path(workdir) / row.replace(" ", "_") / f"seed{seed}"


def checkpoint_record(checkpoint: str | Path | None, backbone) -> dict:
    """What results.json says about the network and its input; path is None for none."""
    return {
        "path": None if checkpoint is None else str(checkpoint),
        "name": backbone.name,
        "source": getattr(backbone, "source", ""),
        "digest": backbone.digest,
        "image_size": backbone.image_size,
        "channels": backbone.channels,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


@dataclass(frozen=True)
class Call:
    """One call of an evaluation: where it writes, what it is made from, how it talks.

    facts: what results.json says of it, whatever the kind.
    """

    workdir: Path
    facts: dict[str, Any]
    say: Callable[[str], object]

    def finish(
        self,
        form: str,
        results: dict,
        *,
        table: Callable[[dict], str],
        files: Sequence[str] = (),
    ) -> dict:
        """Write results.json and say the table; returns what was written.

        form: the file's format; files: what else was written.
        """
        results = {"format": form, **self.facts, **results}
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(self.workdir / "results.json", results)
        self.say(table(results))
        names = ", ".join(["results.json", *files])
        self.say(f"written to {self.workdir}: {names}")
        return results


def begin(
    config: dict,
    checkpoint: str | Path | None,
    workdir: str | Path,
    backbone,
    data,
    splits: Sequence,
    *,
    what: str,
    packages: Sequence[str],
    say: Callable[[str], object],
) -> Call:
    """Compare the images with those of pretraining, say what begins, note the facts.

    Nothing is written, and nothing of the workdir read, before it is known to be of the
    same weights, data and settings: `evaluation.json` there says so.

    config: as JSON values. backbone: shown for the input of all rows. data: the whole
    set; splits: that of a run, or of each. what: words on the data behind their name
    and version. packages: those of the kind. Raises UserError as `check_overlap` and
    `whole.claim`.
    """
    allowed = config["allow_overlap"]
    overlap = check_overlap(checkpoint, *splits, allowed=allowed, say=say)
    identity = {
        "weights": backbone.digest,
        "data": _data_record(data),
        "config": config,
    }
    advice = "choose another workdir, or delete what is there"
    free = [f"config.{name}" for name in FREE]
    record = Path(workdir) / IDENTITY
    claim(record, identity, "an evaluation", advice, free=free)
    say(
        f"{data.name} {data.version}{what}; {backbone.name} from "
        f"{checkpoint or 'scratch'}, digest {backbone.digest[:12]}"
    )
    facts = {
        "config": config,
        "checkpoint": checkpoint_record(checkpoint, backbone),
        "overlap": overlap,
        "versions": versions(packages),
    }
    return Call(Path(workdir), facts, say)


def _data_record(data) -> dict:
    """What tells a data set from another: names, patients, and pixels of some."""
    columns = (data.ids, data.patients)
    lines = sorted("\t".join(map(str, row)) for row in zip(*columns, strict=True))
    pixels = sorted(sampled_pixels(data).items())
    return {
        "name": data.name,
        "images": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "pixels": hashlib.sha256(repr(pixels).encode()).hexdigest(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions of the packages behind the figures."""
    return {name: version(name) for name in (*PACKAGES, *packages)}
