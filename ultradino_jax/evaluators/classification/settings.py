"""What a classification config says; the ConfigDict stops here."""

from dataclasses import dataclass

from ml_collections import ConfigDict

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.finetune import Recipe
from ultradino_jax.evaluators.evaluation import check_rows
from ultradino_jax.evaluators.load import Wanted

MODES = ("linear", "finetune", "knn", "logreg", "fewshot")
ROWS = ("teacher", "random init", "raw pixels")


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
    """Raises UserError for an unknown mode or row."""
    if config.mode not in MODES:
        raise UserError(f"mode {config.mode!r}: choose one of {', '.join(MODES)}")
    check_rows(config.rows, ROWS)
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
