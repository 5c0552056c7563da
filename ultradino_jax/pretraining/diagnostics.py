"""Numbers of a training step that nobody optimises, for people and alarms."""

import jax
import jax.numpy as jnp

from ultradino_jax.optimizer import submodule_norms
from ultradino_jax.pretraining import losses


def watch(terms, grads, updates, student, teacher, centers) -> dict[str, jax.Array]:
    """Scalars that tell how a step went and change nothing in it.

    Takes teacher_mean [K] and log_distance out of `terms`, which is its own dict.

    marginal_entropy: entropy of the teacher's mean answer, in nats. Minus
    teacher_entropy it is how much the answer says about the image (0: collapsed).
    neighbour_distance: geometric mean distance of unit CLS tokens to their nearest
    neighbour. Per sub-module: grad_norm before clipping, update_norm, weight_norm and
    ema_distance = ||teacher - student||. center_norm: of the new centers.
    """
    apart = jax.tree.map(jnp.subtract, teacher, student)
    trees = {
        "grad_norm": grads,
        "update_norm": updates,
        "weight_norm": student,
        "ema_distance": apart,
    }
    norms = {
        f"{kind}/{name}": norm
        for kind, tree in trees.items()
        for name, norm in submodule_norms(tree).items()
    }
    return {
        "marginal_entropy": losses.entropy(terms.pop("teacher_mean")),
        "neighbour_distance": jnp.exp(terms.pop("log_distance")),
        **norms,
        **{f"center_norm/{k}": jnp.linalg.norm(v) for k, v in centers.items()},
    }
