"""Hyper-parameter schedules: closed formulas of the step, usable under jit.

They reproduce the arrays of DINOv2's `CosineScheduler`, endpoints included: the
warm-up reaches its start at step 0 and its end at step warmup-1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def cosine_schedule(
    base: float,
    final: float,
    total: int,
    *,
    warmup: int = 0,
    start: float = 0.0,
    freeze: int = 0,
) -> Schedule:
    """Linear warm-up from `start` to `base`, then a half cosine to `final`.

    All lengths are in steps. The first `freeze` steps return 0 (the last layer's
    learning rate), steps at or past `total` return `final`.
    Raises ValueError when the warm-up is longer than the run.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warm-up of {warmup} steps does not fit a run of {total}")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        ramp = start + (base - start) * step / max(warmup - 1, 1)
        rest = (total - step) / max(total - warmup, 1)
        # 1 + cos(pi x) written as 2 sin^2(pi (1-x)/2): no cancellation near the end.
        cosine = final + (base - final) * jnp.sin(0.5 * jnp.pi * rest) ** 2
        value = jnp.where(step < warmup, ramp, cosine)
        value = jnp.where(step >= total, final, value)
        return jnp.where(step < freeze, 0.0, value)

    return schedule


def linear_schedule(start: float, end: float, steps: int) -> Schedule:
    """Linear from `start` at step 0 to `end` at step steps-1, constant after.

    The teacher temperature of DINOv2, in steps.
    """

    def schedule(step):
        x = jnp.asarray(step, jnp.float32) / max(steps - 1, 1)
        return start + (end - start) * jnp.clip(x, 0.0, 1.0)

    return schedule


def warmup_linear(
    step, *, warmup: int, total: int, start: float = 1e-6, decay_from: int | None = None
):
    """Learning-rate factor: from `start` up to 1 at step warmup-1, then down to 0.

    The line down begins at `decay_from` (the end of the warm-up when None) and reaches
    0 at the last step, total-1: the two schedulers the reference chains.
    """
    decay_from = warmup if decay_from is None else decay_from
    step = jnp.asarray(step, jnp.float32)
    up = start + (1 - start) * jnp.minimum(step / max(warmup - 1, 1), 1.0)
    down = 1 - (step - decay_from) / max(total - 1 - decay_from, 1)
    return jnp.where(step < decay_from, up, jnp.clip(down, 0.0, 1.0))


def warmup_cosine(step, warmup: int, total: int):
    """Learning-rate factor: step/warmup below `warmup`, then half a cosine to 0.

    The first step of a run with a warm-up has factor 0. Steps past `total` stay at 0,
    where the reference's formula would rise again.
    """
    step = jnp.asarray(step, jnp.float32)
    x = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * x))
    return jnp.where(step < warmup, step / max(warmup, 1), cosine)
