"""The reference's train step: its state, batch and schedules as ours.

From golden/train_step.npz, two steps of facebookresearch/dinov2 on a small network.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.sizes import below, dino_head_of, vit_of
from ultradino_jax.optimizer import make_optimizer
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.pretraining.objective import Objective
from ultradino_jax.pretraining.step import init_state, make_train_step
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.meta import dino_head_params, vit_params

GOLDEN = np.load(Path(__file__).parent / "golden" / "train_step.npz")
# LayerScale 1: at the recipe's 1e-5 the CLS tokens of a fresh model differ by rounding,
# and KoLeo's gradients are large and cancel.
BACKBONE = vit_of(below(GOLDEN, "init/backbone."), num_heads=2, layerscale=1.0)
HEAD = dino_head_of(below(GOLDEN, "init/dino_head."))
MODULES = Modules(BACKBONE, HEAD)
SIDE = BACKBONE.image_size
GRID = (SIDE // BACKBONE.patch_size) ** 2


def reference_tree(sub, arrays, prefix):
    state = sub(arrays, prefix)
    return {
        "backbone": vit_params(sub(state, "backbone.")),
        "dino_head": dino_head_params(sub(state, "dino_head.")),
    }


def table(values):
    """Schedule reading the reference's steps."""
    return lambda step: jnp.asarray(values, jnp.float32)[step]


def hyper(g, name):
    return table([g[f"hyper/step{i}/{name}"] for i in range(num_steps(g))])


def num_steps(g):
    return len([k for k in g if k.startswith("hyper/step") and k.endswith("/lr")])


def reference_batch(g, *, flipped):
    """The reference's batch as one group; its crops are normalised already."""

    b = len(g["batch/collated_global_crops"]) // 2

    def crops(name):
        x = g[f"batch/collated_{name}_crops"]
        x = x[::-1] if flipped else x
        return rearrange(x * 255, "(v b) c h w -> 1 v b h w c", b=b)

    n, m = int(g["batch/n_masked_patches"][0]), int(g["batch/upperbound"])
    indices, weights = np.zeros((1, m), np.int32), np.zeros((1, m), np.float32)
    indices[0, :n] = g["batch/mask_indices_list"]
    weights[0, :n] = g["batch/masks_weight"]
    return {
        "global_crops": crops("global"),
        "local_crops": crops("local"),
        "masks": rearrange(g["batch/collated_masks"], "(v b) n -> 1 v b n", b=b),
        "mask_indices": indices,
        "mask_weights": weights,
    }


def reference_setup(g, sub, centering, modules=MODULES, **options):
    """(jitted step, its state of step 0), as the reference began."""
    optimizer = make_optimizer(
        learning_rate=hyper(g, "lr"),
        last_layer_learning_rate=hyper(g, "last_layer_lr"),
        weight_decay=hyper(g, "wd"),
    )
    objective = Objective((0.0,), (1.0,), centering=centering, **options)
    step = make_train_step(
        modules,
        objective,
        optimizer,
        schedules={"teacher_temp": hyper(g, "temp"), "ema_momentum": hyper(g, "mom")},
    )
    student = jax.tree.map(jnp.asarray, reference_tree(sub, g, "init/"))
    state = init_state(modules, optimizer, jax.random.key(0), 1)
    return jax.jit(step), state.replace(
        student=student,
        teacher=jax.tree.map(lambda x: 0.9 * x, student),
        opt_state=optimizer.init(student),
    )


def gradient_of(state):
    """Adam's first moments, which after one step are 0.1 x the clipped gradient."""
    return flat_names(state.opt_state[1].mu)


def first_gradient(state, metrics):
    """The gradient of the first step before clipping, by name."""
    gradients = {}
    for name, moment in gradient_of(state).items():
        norm = float(metrics[f"grad_norm/{name.split('/')[0]}"])
        gradients[name] = moment / np.float32(0.1) / min(1.0, 3.0 / (norm + 1e-6))
    return gradients
