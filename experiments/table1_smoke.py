"""Inputs of the smoke table: phantom sets and random weights in every upstream layout.

The data sets are written as the real downloads look, the weights with the tensor names
of each release, 128 wide and 4 blocks deep (the size this project calls tiny), so the
S and B rows of a family differ in their random numbers only. Positions are stored for a
larger grid than is used, as the published files have them.
"""

from pathlib import Path

import numpy as np

from experiments.table1_rows import ROWS, Column, Row
from ultradino_jax.phantom import LAYOUTS
from ultradino_jax.weights.files import write_safetensors

WIDTH, DEPTH, HEADS, GRID = 128, 4, 4, 6
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
            write_safetensors(fresh, random_weights(row, rng), {})
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


def random_weights(row: Row, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{upstream tensor name: float32 array in torch's layout} of a row's family."""
    family = row.name.partition("_")[0]
    d, f, c, p = WIDTH, 4 * WIDTH, row.channels, row.patch_size

    def normal(*shape):
        return rng.normal(0, 0.02, shape).astype(np.float32)

    def fan_in(out, *into):
        return rng.normal(0, np.prod(into) ** -0.5, (out, *into)).astype(np.float32)

    def ones(*shape):
        return np.ones(shape, np.float32)

    state = {"cls_token": normal(1, 1, d), "norm.weight": ones(d)}
    state |= {"norm.bias": normal(d), "patch_embed.proj.bias": normal(d)}
    state["patch_embed.proj.weight"] = fan_in(d, c, p, p)
    for i in range(DEPTH):
        block = {
            "attn.qkv.weight": fan_in(3 * d, d),
            "attn.proj.weight": fan_in(d, d),
            "attn.proj.bias": normal(d),
            "mlp.fc1.weight": fan_in(f, d),
            "mlp.fc1.bias": normal(f),
            "mlp.fc2.weight": fan_in(d, f),
            "mlp.fc2.bias": normal(d),
        }
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.weight": ones(d), f"{norm}.bias": normal(d)}
        if family == "usfm":
            block |= {"gamma_1": ones(d), "gamma_2": ones(d)}
            block |= {"attn.q_bias": normal(d), "attn.v_bias": normal(d)}
        else:
            block["attn.qkv.bias"] = normal(3 * d)
        if family in ("dinov2", "ultradino"):
            block |= {"ls1.gamma": ones(d), "ls2.gamma": ones(d)}
        state |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    if family == "usfm":
        entries = (2 * GRID - 1) ** 2 + 3
        state["rel_pos_bias.relative_position_bias_table"] = normal(entries, HEADS)
    else:
        state["pos_embed"] = normal(1, 1 + GRID**2, d)
    if family in ("dinov2", "ultradino"):
        state |= {"mask_token": normal(1, d), "register_tokens": normal(1, 4, d)}
    if family == "ultradino":  # its checkpoint holds the teacher with a head
        state = {f"backbone.{name}": x for name, x in state.items()}
        state["dino_head.mlp.0.weight"] = normal(16, d)
    return state
