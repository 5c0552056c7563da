"""Cross entropy and Dice loss as the reference combines them."""

import jax
import jax.numpy as jnp

from ultradino_jax.errors import UserError

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
    their p^2 stays in the sum. Raises UserError for another kind.
    """
    if kind not in DICE_KINDS:
        raise UserError(f"dice {kind!r}: choose one of {', '.join(DICE_KINDS)}")
    squash = jax.nn.sigmoid if kind == "reference" else jax.nn.softmax
    p = squash(logits.astype(jnp.float32))
    t = one_hot(labels, logits.shape[-1])
    axes = (1, 2, 3)
    union = (p * p).sum(axes) + SMOOTH + (t * t).sum(axes) + SMOOTH
    return jnp.mean(1 - 2 * (p * t).sum(axes) / union)
