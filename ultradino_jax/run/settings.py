"""What the parts of a run must know of its config, as small frozen records."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """How often a run logs and saves, and what it keeps.

    log_every, checkpoint_every: steps. keep_last, keep_every, keep_best: see
    `checkpoint.Retention`. max_bad_fraction: of the images may be unreadable.
    restart: at step 0 when none of the checkpoints that are there is usable.
    """

    log_every: int
    checkpoint_every: int
    keep_last: int
    keep_every: int
    keep_best: bool
    max_bad_fraction: float
    restart: bool


@dataclasses.dataclass(frozen=True)
class FeedSettings:
    """The keyword arguments of `data.pipeline.build_pipeline` that a config decides."""

    batch_size: int
    groups: int
    patch_size: int
    canvas: int | None
    mask_probability: float
    mask_ratio: tuple[float, float]
    mask_style: str
    seed: int
    num_workers: int
    num_threads: int
    prefetch: int


@dataclasses.dataclass(frozen=True)
class NanPolicy:
    """policy: 'stop' at a step that is not finite, or 'skip' it, max_skips times."""

    policy: str = "stop"
    max_skips: int = 10
