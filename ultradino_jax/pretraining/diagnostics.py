"""Numbers of a training step that are shown and not optimised."""

import jax
import jax.numpy as jnp

from ultradino_jax.optimizer import submodule_norms
from ultradino_jax.pretraining import losses


def watch(watched, grads, updates, student, teacher, centers) -> dict[str, jax.Array]:
    """Scalars that tell how a step went and change nothing in it.

    watched: of `objective.Losses`; teacher_mean [K] and log_distance become
    marginal_entropy and neighbour_distance, the others are passed on.

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
    watched = dict(watched)
    return {
        "marginal_entropy": losses.entropy(watched.pop("teacher_mean")),
        "neighbour_distance": jnp.exp(watched.pop("log_distance")),
        **watched,
        **norms,
        **{f"center_norm/{k}": jnp.linalg.norm(v) for k, v in centers.items()},
    }
