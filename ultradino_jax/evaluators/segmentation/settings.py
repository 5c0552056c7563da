"""What a segmentation config says; the ConfigDict stops here."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from ultradino_jax.data.datasets.jnu_ifm import GROUPS
from ultradino_jax.data.datasets.open import SEGMENTED
from ultradino_jax.data.datasets.segmented import SegmentedImages, make_splits
from ultradino_jax.evaluators import evaluation
from ultradino_jax.evaluators.evaluation import COUNT
from ultradino_jax.evaluators.load import Wanted
from ultradino_jax.evaluators.segmentation.augment import TRANSLATIONS
from ultradino_jax.evaluators.segmentation.loss import DICE_KINDS
from ultradino_jax.evaluators.segmentation.networks import NETWORKS
from ultradino_jax.evaluators.segmentation.segmenter import REGISTERS
from ultradino_jax.evaluators.segmentation.train import Recipe
from ultradino_jax.limits import (
    TEXT,
    below,
    check,
    choice,
    integer,
    number,
    positive,
    several,
)
from ultradino_jax.models.layers import NORMS

ROWS = ("teacher", "random init", *NETWORKS)
BUDGETS = ("paper", "equal")
RESIZES = ("stretch", "letterbox")
# What a network's section says beside the fields of its module.
OWN_RECIPE = ("learning_rate", "weight_decay", "steps")
LIMITS = {
    **evaluation.LIMITS,
    "task": choice(("segmentation",)),
    "subset": TEXT,
    "rows": several(choice(ROWS), least=1),
    "data.name": choice(SEGMENTED),
    "data.split_file": TEXT,
    "data.max_images": COUNT,
    "data.group_by": choice(GROUPS),
    "model.resize": choice(RESIZES),
    "model.registers": choice(REGISTERS),
    "model.norm": choice(NORMS),
    "model.head_channels": integer(0),
    "train.steps": COUNT,
    "train.scratch_steps": COUNT,
    "train.budget": choice(BUDGETS),
    "train.warmup_steps": COUNT,
    "train.batch_size": COUNT,
    "train.learning_rate": positive(),
    "train.drop_path": below(1),
    "train.dice": choice(DICE_KINDS),
    "train.translation": choice(TRANSLATIONS),
    "train.validate_every": COUNT,
    "train.checkpoint_every": COUNT,
    **{f"{row}.learning_rate": positive() for row in NETWORKS},
    **{f"{row}.weight_decay": number(0) for row in NETWORKS},
    **{f"{row}.{key}": COUNT for row in NETWORKS for key in ("steps", "width")},
    "unet.norm": choice(NORMS),
    "unetr.embed_dim": COUNT,
    "unetr.depth": COUNT,
    "unetr.num_heads": COUNT,
}


@dataclass(frozen=True)
class Settings:
    """A whole config but for its data.

    registers: of `usable_backbone`. recipes: of every row; networks: fields of the
    modules of NETWORKS. splits: arguments of `make_splits`.
    """

    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    replicates: int
    subset: str
    letterbox: bool
    registers: str
    wanted: Wanted
    recipes: dict[str, Recipe]
    networks: dict[str, tuple[tuple[str, Any], ...]]
    splits: dict[str, Any]

    def split(self, data: SegmentedImages, seed: int) -> SegmentedImages:
        """The data as run `seed` trains, validates and tests on them."""
        return make_splits(data, self.subset, seed, **self.splits)


def read_settings(config: ConfigDict) -> Settings:
    """Raises UserError for a value that cannot be, as `limits.check`."""
    check(config, LIMITS)
    m, d = config.model, config.data
    return Settings(
        rows=tuple(config.rows),
        seeds=tuple(config.seeds),
        replicates=config.replicates,
        subset=config.subset,
        letterbox=m.resize == "letterbox",
        registers=m.registers,
        wanted=Wanted(
            m.arch, m.image_size, m.channels, m.patch_size, config.random_init_seed
        ),
        recipes={row: _recipe(config, row) for row in ROWS},
        networks={
            row: tuple(
                (k, config[row][k]) for k in sorted(config[row]) if k not in OWN_RECIPE
            )
            for row in NETWORKS
        },
        splits=dict(
            test_fraction=d.test_fraction,
            val_fraction=d.val_fraction,
            split_seed=d.split_seed,
            split_file=d.split_file,
            max_images=d.max_images,
        ),
    )


def _recipe(config: ConfigDict, row: str) -> Recipe:
    """Of config.train, with what a network's own section says instead."""
    c = config.train
    if row in NETWORKS:
        own = {key: config[row][key] for key in OWN_RECIPE}
    else:
        own = {
            "learning_rate": c.learning_rate,
            "drop_path": c.drop_path,
            "norm": config.model.norm,
            "head_channels": config.model.head_channels,
            "steps": c.steps if row == "teacher" else c.scratch_steps,
        }
    if c.budget == "equal":
        own["steps"] = c.steps
    return Recipe(
        warmup_steps=c.warmup_steps,
        batch_size=c.batch_size,
        dice=c.dice,
        translation=c.translation,
        validate_every=c.validate_every,
        checkpoint_every=c.checkpoint_every,
        letterbox=config.model.resize == "letterbox",
        **own,
    )
