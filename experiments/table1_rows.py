"""Table 1 as data: which systems, which columns, what the paper measured.

A cell is a row in a column. Everything a cell changes in a config of `configs/` is
written here; the runner (table1.py) and the tables (table1_collect.py) add nothing.

Sources: [P] the paper's Table 1; [U] the released UltraDINO configs; [J] this project.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Column(NamedTuple):
    """One column: `config` is a file of configs/ and its argument; `data` the folder
    below --data; `metric` the figure of results.json that the paper prints.
    """

    name: str
    title: str
    config: str
    argument: str
    data: str
    metric: str


# [P] JNU and 20-shot: mean of 5 draws; the others: mean of 3 seeds. The paper does not
# say whether its mean Dice holds the background; tables show both.
COLUMNS = (
    Column("jnu_p4", "JNU-IFM p=4", "jnu_ifm", "p4", "jnu_ifm", "foreground_dice"),
    Column("fass_n20", "FASS n=20", "fass", "n20", "fass", "foreground_dice"),
    Column("fass_full", "FASS full", "fass", "full", "fass", "foreground_dice"),
    Column(
        "planes_finetune", "FETAL_PLANES fine-tune", "fetal_planes", "finetune",
        "fetal_planes", "macro_f1",
    ),
    Column(
        "planes_linear", "FETAL_PLANES linear", "fetal_planes", "linear",
        "fetal_planes", "macro_f1",
    ),
)  # fmt: skip
SEGMENTATION = ("jnu_p4", "fass_n20", "fass_full")
EVERY = tuple(column.name for column in COLUMNS)


@dataclass(frozen=True)
class Row:
    """One system.

    run: its row in eval.py ('teacher', 'random init', a network, or 'nnunet').
    weights: names of its file or folder below --weights, any suffix of SUFFIXES.
    arch, patch_size, channels: of its ViT, '' and 0 where there is none. images:
    pretraining images. columns: those that apply. overrides: {column: {config key:
    value}}. paper: {column: [P]'s figure}; notes: keys of NOTES.
    """

    name: str
    title: str
    run: str
    weights: tuple[str, ...] = ()
    arch: str = ""
    patch_size: int = 0
    channels: int = 0
    images: int = 0
    columns: tuple[str, ...] = EVERY
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)
    notes: str = ""


SUFFIXES = ("", ".pth", ".pt", ".safetensors")
# [U] 20 images of FASS get 45,000 steps from iBOT and USFM, 20,000 from the others.
LONG = {"fass_n20": {"train.steps": 45_000}}


def _paper(*figures) -> dict[str, float]:
    return {c: x for c, x in zip(EVERY, figures, strict=True) if x is not None}


SCRATCH = ("jnu_p4", "fass_n20", "fass_full", "planes_finetune")
# 13 systems; the ViT from scratch comes in two sizes, so there are 14 lines.
ROWS = (
    Row("unet", "U-Net", "unet", columns=SEGMENTATION, notes="pn"),
    Row(
        "multiresunet", "MultiResUNet", "multiresunet", columns=SEGMENTATION, notes="pn"
    ),
    Row("unetr", "UNETR", "unetr", columns=SEGMENTATION, notes="pn"),
    Row("nnunet", "nnU-Net 2-D", "nnunet", columns=SEGMENTATION, notes="pa"),
    Row(
        "scratch_vits16", "ViT-S/16 from scratch", "random init",
        arch="small", patch_size=16, channels=1, columns=SCRATCH,
        paper=_paper(79.59, 62.54, 77.95, 85.08, None), notes="b",
    ),
    Row(
        "scratch_vitb16", "ViT-B/16 from scratch", "random init",
        arch="base", patch_size=16, channels=1, columns=SCRATCH,
        paper=_paper(79.92, 63.28, 78.53, 84.79, None), notes="b",
    ),
    Row(
        "ibot_vits16_im1k", "iBOT S/16, ImageNet-1k", "teacher",
        weights=("ibot_vits16_im1k",), arch="small", patch_size=16, channels=3,
        images=1_281_167, overrides=LONG,
        paper=_paper(81.94, 72.23, 79.09, 94.01, 83.98), notes="ri",
    ),
    Row(
        "ibot_vitb16_im1k", "iBOT B/16, ImageNet-1k", "teacher",
        weights=("ibot_vitb16_im1k",), arch="base", patch_size=16, channels=3,
        images=1_281_167, overrides=LONG,
        paper=_paper(83.84, 71.94, 78.91, 94.02, 85.24), notes="ri",
    ),
    Row(
        "ibot_vitb16_im22k", "iBOT B/16, ImageNet-22k", "teacher",
        weights=("ibot_vitb16_im22k",), arch="base", patch_size=16, channels=3,
        images=14_197_122, overrides=LONG,
        paper=_paper(82.17, 72.01, 79.24, 94.16, 83.01), notes="ri",
    ),
    Row(
        "dinov2_vits14", "DINOv2 S/14", "teacher",
        weights=("dinov2_vits14_reg4_pretrain", "dinov2_vits14_pretrain"),
        arch="small", patch_size=14, channels=3, images=142_000_000,
        paper=_paper(82.84, 68.63, 78.62, 93.59, 74.95), notes="di",
    ),
    Row(
        "dinov2_vitb14", "DINOv2 B/14", "teacher",
        weights=("dinov2_vitb14_reg4_pretrain", "dinov2_vitb14_pretrain"),
        arch="base", patch_size=14, channels=3, images=142_000_000,
        paper=_paper(83.55, 69.11, 79.26, 94.00, 76.61), notes="di",
    ),
    Row(
        "usfm_vitb16", "USFM B/16", "teacher",
        weights=("USFM_latest", "usfm_latest_unwrapped"), arch="base", patch_size=16,
        channels=3, images=2_000_000, overrides=LONG,
        paper=_paper(83.05, 66.48, 78.86, 93.94, 42.78), notes="ui",
    ),
    Row(
        "ultradino_vits16", "UltraDINO S/16", "teacher",
        weights=("ultradino_vits16",), arch="small", patch_size=16, channels=1,
        images=2_000_000, paper=_paper(85.58, 73.29, 79.14, 94.74, 94.17), notes="w",
    ),
    Row(
        "ultradino_vitb16", "UltraDINO B/16", "teacher",
        weights=("ultradino_vitb16",), arch="base", patch_size=16, channels=1,
        images=2_000_000, paper=_paper(86.01, 74.24, 79.51, 94.54, 95.06), notes="w",
    ),
)  # fmt: skip

# Known deviations; '*' holds for every row.
NOTES = {
    "*": "The paper's FASS and JNU-IFM splits and its validation patients of "
    "FETAL_PLANES_DB are unpublished; these are this project's (a hash of the "
    "patient's name). Mean Dice is over the structures; a second table has the "
    "background in it, since the paper does not say which it prints. Fine-tuning keeps "
    "the epoch of highest validation macro F1; the release's rule keeps the lowest "
    "accuracy. Seeds are fixed. Test images get the backbone's own mean and std; the "
    "release gives all backbones the ultrasound ones.",
    "p": "The paper's figures of this row are not in this table.",
    "n": "Learning rate and weight decay of the network's own paper, batches, "
    "augmentation and loss of the other rows; the paper's settings are unpublished.",
    "a": "nnU-Net plans, augments and trains by its own rules; only the split and the "
    "scoring are shared.",
    "b": "Segmentation starts with LayerScale 1, as the release's model does.",
    "r": "No register tokens; the release's classification adds four random ones.",
    "d": "Positions are interpolated; the release's FASS runs leave them random.",
    "u": "With the relative position bias in every task, no absolute positions and "
    "LayerNorm eps 1e-6; the release's probe and segmentation run without the bias. "
    "Recipe of the other rows.",
    "i": "Tested with ImageNet mean and std.",
    "w": "Whatever file or run of this name is given: the authors' weights, or an own "
    "pretraining.",
}


def note_text(row: Row) -> list[str]:
    """The deviations of a row, one sentence each."""
    return [NOTES[key] for key in row.notes]
