"""Inputs of the smoke table: phantom sets and random weights in every upstream layout.

The data sets are written as the real downloads look, the weights with the tensor names
of each release, 128 wide and 4 blocks deep (the size this project calls tiny), so the
S and B rows of a family differ in their random numbers only. Positions are stored for a
larger grid than is used, as the published files have them.
"""

from pathlib import Path

import numpy as np

from experiments.table1_rows import ROWS, Column, Row
from tests.upstream_weights import DEPTH, HEADS, WIDTH, random_weights
from ultradino_jax.phantom import LAYOUTS
from ultradino_jax.weights.files import write_safetensors

# Patients and pixels of the longer side of each set.
PATIENTS = {"fetal_planes": 16, "fass": 20, "jnu_ifm": 36}
PIXELS = 160
# nnU-Net's share: its own training for 24 steps, one worker beside it.
NNUNET_OPTIONS = {
    "trainer": "nnUNetTrainer_smoke_1epoch",
    "device": "cpu",
    "processes": 1,
}
NNUNET_VARIABLES = {
    "nnUNet_extTrainer": str(Path(__file__).parent / "nnunet_smoke"),
    "nnUNet_n_proc_DA": "1",
    "nnUNet_compile": "false",
}


def write_smoke_inputs(out: Path, say=print) -> tuple[Path, Path]:
    """(data folder, weights folder) below `out`, written if they are not there."""
    data, weights = out / "data", out / "weights"
    for name, patients in PATIENTS.items():
        if not (data / name).is_dir():
            fresh = data / f"{name}.new"
            LAYOUTS[name](fresh, patients, 0, PIXELS)
            fresh.rename(data / name)
            say(f"wrote {data / name}: {patients} phantom patients")
    weights.mkdir(exist_ok=True)
    for number, row in enumerate(ROWS):
        if not row.weights:
            continue
        path = weights / f"{row.weights[0]}.safetensors"
        if not path.is_file():
            rng = np.random.default_rng([0, number])
            fresh = path.with_suffix(".new")
            write_safetensors(
                fresh, random_weights(row.name, row.channels, row.patch_size, rng), {}
            )
            fresh.rename(path)
    return data, weights


def smoke_settings(row: Row, column: Column) -> dict:
    """{config key: value} that shrink a cell to seconds."""
    side = 56 if row.patch_size == 14 else 64
    settings = {
        "model.image_size": side,
        "model.arch": "tiny" if row.run == "random init" else "",
        "seeds": (0,) if row.run == "nnunet" else (0, 1),  # each costs it two minutes
        "replicates": 200,
    }
    if column.config == "fetal_planes":
        return settings | {
            "model.antialias": True,
            "linear.batch_size": 32,
            "linear.epochs": 6,
            "linear.warmup_epochs": 2,
            "finetune.batch_size": 32,
            "finetune.epochs": 4,
            "finetune.warmup_epochs": 1,
            "finetune.learning_rate": 5e-4,
        }
    steps = {
        f"{part}.{key}": 24
        for part, key in (
            ("train", "steps"),
            ("train", "scratch_steps"),
            ("unet", "steps"),
            ("multiresunet", "steps"),
            ("unetr", "steps"),
        )
    }
    return (
        settings
        | steps
        | {
            "model.head_channels": 32,
            "train.warmup_steps": 5,
            "train.batch_size": 8,
            "train.learning_rate": 1e-3,
            "train.validate_every": 12,
            "train.drop_path": 0.1,
            "unet.width": 8,
            "unet.learning_rate": 1e-3,
            "multiresunet.width": 8,
            "unetr.learning_rate": 1e-3,
            "unetr.width": 8,
            "unetr.embed_dim": WIDTH,
            "unetr.depth": DEPTH,
            "unetr.num_heads": HEADS,
        }
    )
