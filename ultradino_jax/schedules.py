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
