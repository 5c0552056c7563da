"""What a classification config says; the ConfigDict stops here."""

from dataclasses import dataclass

from ml_collections import ConfigDict

from ultradino_jax.data.datasets.open import LABELLED
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators import evaluation
from ultradino_jax.evaluators.classification.finetune import WEIGHT_DECAY, Recipe
from ultradino_jax.evaluators.evaluation import COUNT
from ultradino_jax.evaluators.load import Wanted
from ultradino_jax.limits import (
    FLAG,
    SEED,
    TEXT,
    Limit,
    check,
    choice,
    integer,
    number,
    positive,
    several,
)

MODES = ("linear", "finetune", "knn", "logreg", "fewshot")
ROWS = ("teacher", "random init", "raw pixels")
METHODS = ("linear", "logreg", "knn")
# Half of a batch is mixed with the other half.
BATCH = integer(2)


def _is_grid(value) -> bool:
    listed = isinstance(value, tuple | list) and len(value) == 3
    return (
        listed
        and all(map(number(-300, 300).allows, value[:2]))
        and (COUNT.allows(value[2]))
    )


_DATA = {
    **{k: v for k, v in evaluation.LIMITS.items() if k.startswith("data.")},
    "data.name": choice(LABELLED),
    "data.split_files": Limit(
        lambda value: several(TEXT).allows(value) and len(value) in (0, 3),
        "no or three files: train, val, test",
    ),
    "data.mask_corner": FLAG,
}
LIMITS = {
    **evaluation.LIMITS,
    **_DATA,
    **{f"external.{k.removeprefix('data.')}": v for k, v in _DATA.items()},
    "external.name": choice(("", *LABELLED)),
    "task": choice(("classification",)),
    "mode": choice(MODES),
    "rows": several(choice(ROWS), least=1),
    "model.antialias": FLAG,
    "batch_size": COUNT,
    "linear.recipe": choice(("paper", "cached")),
    "linear.batch_size": BATCH,
    "linear.epochs": COUNT,
    "linear.warmup_epochs": integer(0),
    "finetune.layerwise": choice(WEIGHT_DECAY),
    "finetune.learning_rate": positive(),
    "finetune.layerwise_decay": positive(1),
    "finetune.batch_size": BATCH,
    "finetune.epochs": COUNT,
    "finetune.warmup_epochs": integer(0),
    "finetune.checkpoint_every": COUNT,
    "knn.ks": several(COUNT, least=1),
    "knn.temperature": positive(),
    "logreg.log10_c": Limit(_is_grid, "three numbers: powers from, to, and how many"),
    "logreg.max_iter": COUNT,
    "fewshot.shots": several(COUNT, least=1),
    "fewshot.unit": choice(("images", "patients")),
    "fewshot.seeds": several(SEED, least=1),
    "fewshot.methods": several(choice(METHODS), least=1),
    "fewshot.linear_steps": COUNT,
}


@dataclass(frozen=True)
class Linear:
    """config.linear: 'paper' or 'cached', and how long."""

    recipe: str
    batch_size: int
    epochs: int
    warmup_epochs: int


@dataclass(frozen=True)
class Logreg:
    """config.logreg: (from, to, how many) powers of ten, and iterations."""

    log10_c: tuple[float, float, int]
    max_iter: int


@dataclass(frozen=True)
class Neighbours:
    """config.knn."""

    ks: tuple[int, ...]
    temperature: float


@dataclass(frozen=True)
class FewShot:
    """config.fewshot."""

    shots: tuple[int, ...]
    unit: str
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    linear_steps: int


@dataclass(frozen=True)
class Settings:
    """A whole config but for its data."""

    mode: str
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    batch_size: int
    replicates: int
    antialias: bool
    wanted: Wanted
    linear: Linear
    finetune: Recipe
    knn: Neighbours
    logreg: Logreg
    fewshot: FewShot

    @property
    def few(self) -> bool:
        """Whether only a few labels are trained on."""
        return self.mode == "fewshot"

    @property
    def augmented(self) -> bool:
        """Whether the linear probe sees augmented images at every step."""
        return self.mode == "linear" and self.linear.recipe == "paper"


def read_settings(config: ConfigDict) -> Settings:
    """Raises UserError for a value that cannot be, as `limits.check`."""
    check(config, LIMITS)
    for name in ("linear", "finetune"):
        c = config[name]
        if c.warmup_epochs > c.epochs:
            raise UserError(
                f"config.{name}: {c.warmup_epochs} warm-up epochs do not fit "
                f"{c.epochs} epochs"
            )
    m = config.model
    return Settings(
        mode=config.mode,
        rows=tuple(config.rows),
        seeds=tuple(config.seeds),
        batch_size=config.batch_size,
        replicates=config.replicates,
        antialias=m.antialias,
        wanted=Wanted(
            m.arch, m.image_size, m.channels, m.patch_size, config.random_init_seed
        ),
        linear=Linear(**config.linear),
        finetune=Recipe(**config.finetune),
        knn=Neighbours(**config.knn),
        logreg=Logreg(**config.logreg),
        fewshot=FewShot(**config.fewshot),
    )
