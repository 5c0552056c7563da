"""What a segmentation config says; the ConfigDict stops here."""

from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from ultradino_jax.data.datasets.segmented import SegmentedImages, make_splits
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.evaluation import check_rows
from ultradino_jax.evaluators.load import Wanted
from ultradino_jax.evaluators.segmentation.networks import NETWORKS
from ultradino_jax.evaluators.segmentation.train import Recipe

ROWS = ("teacher", "random init", *NETWORKS)
BUDGETS = ("paper", "equal")
RESIZES = ("stretch", "letterbox")
# What a network's section says beside the fields of its module.
OWN_RECIPE = ("learning_rate", "weight_decay", "steps")


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
    """Raises UserError for an unknown row, budget or way to resize."""
    check_rows(config.rows, ROWS)
    m, d = config.model, config.data
    if m.resize not in RESIZES:
        raise UserError(
            f"model.resize={m.resize!r}: choose one of {', '.join(RESIZES)}"
        )
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
    if c.budget not in BUDGETS:
        raise UserError(f"budget {c.budget!r}: choose one of {', '.join(BUDGETS)}")
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
