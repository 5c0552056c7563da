"""Cross entropy and Dice loss as the reference combines them, and the learning rate."""

import jax
import jax.numpy as jnp

IGNORE = 255
SMOOTH = 1e-3
DICE_KINDS = ("reference", "softmax_dice")


def one_hot(labels, num_classes: int):
    """[B,H,W] -> float32 [B,H,W,Y]; all zero where the label is IGNORE."""
    return jax.nn.one_hot(jnp.where(labels == IGNORE, -1, labels), num_classes)


def cross_entropy(logits, labels):
    """Mean over ALL pixels, ignored ones included: they only enlarge the divisor.

    logits [B,H,W,Y], labels [B,H,W].
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    targets = one_hot(labels, logits.shape[-1])
    return -jnp.sum(targets * log_probs) / labels.size


def dice_loss(logits, labels, kind: str = "reference"):
    """1 - 2 sum(p t) / (sum p^2 + s + sum t^2 + s), mean over images, s = 1e-3.

    The sums run over pixels and classes of an image together, background included.
    'reference': p is the SIGMOID of each logit, as the paper's configs leave it (they
    omit a switch); 'softmax_dice': p is the softmax. Ignored pixels have no target but
    their p^2 stays in the sum. Raises ValueError for another kind.
    """
    if kind not in DICE_KINDS:
        raise ValueError(f"dice {kind!r}: choose one of {', '.join(DICE_KINDS)}")
    squash = jax.nn.sigmoid if kind == "reference" else jax.nn.softmax
    p = squash(logits.astype(jnp.float32))
    t = one_hot(labels, logits.shape[-1])
    axes = (1, 2, 3)
    union = (p * p).sum(axes) + SMOOTH + (t * t).sum(axes) + SMOOTH
    return jnp.mean(1 - 2 * (p * t).sum(axes) / union)


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
