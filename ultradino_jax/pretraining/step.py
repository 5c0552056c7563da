"""One step of self-distillation: gradients, AdamW, EMA of the teacher.

Batches are those of `objective`: W groups of b images, all arrays with W in front.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ultradino_jax.pretraining.diagnostics import watch
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.pretraining.objective import (
    Objective,
    compute_losses,
    pad_mask_buffer,
    teacher_targets,
)
from ultradino_jax.schedules import Schedule


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes, arrays only.

    student, teacher: {'backbone', 'dino_head'[, 'ibot_head']} parameter trees.
    centers: {'dino' [K], 'ibot' [K]}, the means subtracted from the NEXT step's
    teacher logits.
    """

    step: jax.Array
    student: Any
    teacher: Any
    opt_state: Any
    centers: dict[str, jax.Array]


def micro_batches(batch, accum_steps: int):
    """Leading axis W -> [accum_steps, W/accum_steps, ..] by taking every a-th group.

    Strided, so that groups sharded contiguously over devices stay where they are.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(
            x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:]), 1, 0
        ),
        batch,
    )


def averaged(gradients, accum_steps: int):
    """gradients(state, scheduled, batch, key), as a mean over micro-batches.

    Raises ValueError (on tracing) when the groups cannot be cut into that many.
    """

    def mean_gradients(state, scheduled, batch, key):
        num_groups = batch["mask_weights"].shape[0]
        if num_groups % accum_steps:
            raise ValueError(
                f"{num_groups} groups cannot be cut into {accum_steps} micro-batches"
            )

        def body(total, xs):
            i, micro = xs
            parts = gradients(state, scheduled, micro, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, parts), None

        micro = micro_batches(batch, accum_steps)
        first = jax.tree.map(lambda x: x[0], micro)
        # Not as an argument of eval_shape: a constant weight stays a number.
        one = functools.partial(gradients, state, scheduled)
        shapes = jax.eval_shape(one, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(accum_steps), micro))
        return jax.tree.map(lambda x: x / accum_steps, total)

    return mean_gradients if accum_steps > 1 else gradients


def make_train_step(
    modules: Modules,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedules: dict[str, Schedule],
    seed: int = 0,
    accum_steps: int = 1,
    whole=lambda params: params,
):
    """Build train_step(state, batch) -> (state, metrics), pure and ready for jit.

    schedules: 'teacher_temp', 'ema_momentum' and whichever weights of the objective
    change over the run, by the names they have there; others are not looked at.

    accum_steps cuts the W groups into that many micro-batches and averages their
    gradients. Every loss is a mean over groups, so the result equals the large batch,
    with one exception: Sinkhorn-Knopp normalises over the rows it sees, hence over a
    micro-batch. Raises ValueError (on tracing) when W is not divisible.

    whole(params) puts parameters that are sharded over devices, and their gradients, in
    one piece on each of them. Used as shards, a product's sharding spreads into the
    activations, which are then sent instead: some ten times the bytes, growing with the
    devices; gradients as shards spread into the folded weights of every block.
    """

    def loss_and_grads(state, scheduled, batch, key):
        batch = pad_mask_buffer(batch, objective.chunk_rows)
        targets, centers = teacher_targets(
            modules, objective, state.teacher, state.centers, batch, scheduled
        )
        targets = jax.lax.stop_gradient(targets)
        (_, found), grads = jax.value_and_grad(
            lambda student: compute_losses(
                modules, objective, student, batch, targets, scheduled, key
            ),
            has_aux=True,
        )(state.student)
        return whole(grads), centers, found

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        now = {name: schedule(state.step) for name, schedule in schedules.items()}
        scheduled = objective.weights | now
        arrays = {k: v for k, v in batch.items() if k not in ("index", "bad")}
        gathered = state.replace(
            student=whole(state.student), teacher=whole(state.teacher)
        )
        grads, centers, found = averaged(loss_and_grads, accum_steps)(
            gathered, scheduled, arrays, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        m = scheduled["ema_momentum"]
        # m t + (1-m) s, in the form that leaves equal weights equal to the last bit.
        teacher = jax.tree.map(
            lambda t, s: t + (1 - m) * (s - t), state.teacher, student
        )
        watched = watch(found.watched, grads, updates, student, teacher, centers)
        metrics = {"total": found.total, **found.terms, **watched}
        return (
            TrainState(state.step + 1, student, teacher, opt_state, centers),
            metrics,
        )

    return train_step


def init_state(
    modules: Modules,
    optimizer: optax.GradientTransformation,
    key,
    num_channels: int,
    backbone=None,
) -> TrainState:
    """Fresh state; the teacher starts as a copy of the student.

    backbone: parameters to start from instead of random ones (heads are fresh).
    """
    student = modules.init(key, num_channels)
    if backbone is not None:
        student["backbone"] = jax.tree.map(jnp.asarray, backbone)
    k = modules.dino_head.num_prototypes
    k_ibot = (modules.ibot_head or modules.dino_head).num_prototypes
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        opt_state=optimizer.init(student),
        centers={"dino": jnp.zeros(k), "ibot": jnp.zeros(k_ibot)},
    )
