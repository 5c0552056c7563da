"""One step of DINOv2 self-distillation: DINO + iBOT + KoLeo with an EMA teacher.

The batch is cut into W groups of b images. A group is what a GPU is in the reference:
KoLeo looks for neighbours, masks are allotted and drop path picks its rows within it.
A device holds whole groups, so the result does not depend on the number of devices.

    global_crops  uint8   [W,G,b,S,S,C]     masks         bool    [W,G,b,N]
    local_crops   uint8   [W,L,b,s,s,C]     mask_indices  int32   [W,M]
                                            mask_weights  float32 [W,M]

mask_indices point into a group's flattened [G*b*N] patches; padding has weight 0.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from ultradino_jax import losses
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.vit import ViT
from ultradino_jax.schedules import Schedule
from ultradino_jax.watch import watch


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


@dataclass(frozen=True)
class Modules:
    """The networks. ibot_head None ties the iBOT loss to the DINO head."""

    backbone: ViT
    dino_head: DINOHead
    ibot_head: DINOHead | None = None

    def init(self, key, num_channels: int):
        """Random parameters for both students and teachers."""
        keys = jax.random.split(key, 3)
        side = self.backbone.image_size
        images = jnp.zeros((1, side, side, num_channels))
        tokens = jnp.zeros((1, self.backbone.embed_dim))
        params = {
            "backbone": self.backbone.init(keys[0], images)["params"],
            "dino_head": self.dino_head.init(keys[1], tokens)["params"],
        }
        if self.ibot_head is not None:
            params["ibot_head"] = self.ibot_head.init(keys[2], tokens)["params"]
        return params

    def dino_logits(self, params, tokens):
        """CLS tokens [..,D] -> [..,K]."""
        return self.dino_head.apply({"params": params["dino_head"]}, tokens)

    def ibot_logits(self, params, tokens):
        """Patch tokens [..,D] -> [..,K], through the tied or the separate head."""
        if self.ibot_head is None:
            return self.dino_logits(params, tokens)
        return self.ibot_head.apply({"params": params["ibot_head"]}, tokens)


@dataclass(frozen=True)
class Objective:
    """Weights and constants of the loss, and how pixels become network input.

    mean, std: per-channel statistics on the [0,1] scale.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temp: float = 0.1
    centering: str = "centering"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3

    def __post_init__(self):
        if self.centering not in ("centering", "sinkhorn_knopp"):
            raise ValueError(
                f"centering must be 'centering' or 'sinkhorn_knopp', "
                f"not {self.centering!r}"
            )

    def normalise(self, crops):
        """uint8 [..,C] -> float32 (x/255 - mean)/std."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return (crops.astype(jnp.float32) / 255 - mean) / std


def forward_crops(modules, objective, params, crops, masks=None, *, key=None):
    """Backbone on crops [W,V,b,S,S,C] -> CLS [W,V,b,D] and patches [W,V*b*N,D].

    With a key the pass is a training pass (drop path), without it a plain one.
    """
    w, v, b = crops.shape[:3]
    images = rearrange(objective.normalise(crops), "w v b h x c -> (w v b) h x c")
    if masks is not None:
        masks = rearrange(masks, "w v b n -> (w v b) n")
    out = modules.backbone.apply(
        {"params": params["backbone"]},
        images,
        masks,
        groups=w,
        train=key is not None,
        rngs=None if key is None else {"drop_path": key},
    )
    cls_token = rearrange(out.cls_token, "(w v b) d -> w v b d", w=w, v=v, b=b)
    patches = rearrange(out.patch_tokens, "(w r) n d -> w (r n) d", w=w)
    return cls_token, patches


def gather_tokens(patch_tokens, mask_indices):
    """Masked tokens of each group: [W,R,D], [W,M] -> [W,M,D]."""
    return jnp.take_along_axis(patch_tokens, mask_indices[..., None], axis=1)


def teacher_outputs(modules, objective, teacher, centers, batch, teacher_temp):
    """Targets of the unmasked global crops and the centers after this batch.

    Returns (dino_probs [W,G,b,K], ibot_probs [W,M,K], centers). The center used here
    holds earlier steps only: the reference applies a batch's mean before its next use.
    The iBOT batch center is the mean over groups of each group's mean, not weighted by
    how many patches a group masks (DINOv2 `ibot_patch_loss.py`).
    """
    cls_token, patches = forward_crops(
        modules, objective, teacher, batch["global_crops"]
    )
    dino_logits = modules.dino_logits(teacher, cls_token)
    ibot_logits = modules.ibot_logits(
        teacher, gather_tokens(patches, batch["mask_indices"])
    )
    real = batch["mask_weights"] > 0
    if objective.centering == "sinkhorn_knopp":
        iterations = {"num_iterations": objective.sinkhorn_iterations}
        dino_probs = losses.sinkhorn_knopp(
            rearrange(dino_logits, "w g b k -> (w g b) k"), teacher_temp, **iterations
        ).reshape(dino_logits.shape)
        ibot_probs = losses.sinkhorn_knopp(
            rearrange(ibot_logits, "w m k -> (w m) k"),
            teacher_temp,
            weights=rearrange(real, "w m -> (w m)"),
            **iterations,
        ).reshape(ibot_logits.shape)
        return dino_probs, ibot_probs, centers
    dino_probs = losses.center_probs(dino_logits, centers["dino"], teacher_temp)
    ibot_probs = losses.center_probs(ibot_logits, centers["ibot"], teacher_temp)
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    group_means = jnp.einsum("wmk,wm->wk", ibot_logits, real / count)
    momentum = objective.center_momentum
    new_centers = {
        "dino": losses.update_center(
            centers["dino"], dino_logits.mean(axis=(0, 1, 2)), momentum
        ),
        "ibot": losses.update_center(
            centers["ibot"], group_means.mean(axis=0), momentum
        ),
    }
    return dino_probs, ibot_probs, new_centers


def student_outputs(modules, objective, student, batch, key):
    """Student's view of all crops, global ones masked.

    Returns (cls_token [W,G,b,D], global_logits [W,G,b,K], local_logits [W,L,b,K] or
    None, patch_logits [W,M,K]).
    """
    key_global, key_local = jax.random.split(key)
    cls_token, patches = forward_crops(
        modules,
        objective,
        student,
        batch["global_crops"],
        batch["masks"],
        key=key_global,
    )
    local_logits = None
    if batch["local_crops"].shape[1]:
        local_cls, _ = forward_crops(
            modules, objective, student, batch["local_crops"], key=key_local
        )
        local_logits = modules.dino_logits(student, local_cls)
    masked = gather_tokens(patches, batch["mask_indices"])
    return (
        cls_token,
        modules.dino_logits(student, cls_token),
        local_logits,
        modules.ibot_logits(student, masked),
    )


def compute_losses(modules, objective, student, batch, targets, key):
    """(total, terms): the optimised loss, its weighted parts and what to watch.

    total = dino_local + dino_global + koleo + ibot; each term is logged as it is
    optimised (the reference displays half of koleo and ibot). Besides them `terms`
    holds student_entropy (nats, of the global crops) and log_distance, the mean log
    distance of a CLS token to its nearest neighbour within the group (KoLeo's).
    """
    dino_probs, ibot_probs = targets
    cls_token, global_logits, local_logits, patch_logits = student_outputs(
        modules, objective, student, batch, key
    )
    temp = {"student_temp": objective.student_temp}
    local, across = losses.dino_loss(dino_probs, global_logits, local_logits, **temp)
    _, g, b, _ = cls_token.shape
    koleo = jax.vmap(jax.vmap(losses.koleo_loss))(cls_token)
    ibot = losses.ibot_loss(
        ibot_probs, patch_logits, batch["mask_weights"], g * b, **temp
    )
    terms = {
        "dino_local": objective.dino_weight * local,
        "dino_global": objective.dino_weight * across,
        "koleo": objective.koleo_weight * koleo.mean(axis=0).sum(),
        "ibot": objective.ibot_weight * ibot,
    }
    total = sum(terms.values())
    logits = jax.lax.stop_gradient(global_logits).astype(jnp.float32)
    student_probs = jax.nn.softmax(logits / objective.student_temp)
    terms["student_entropy"] = losses.entropy(student_probs).mean()
    terms["log_distance"] = -jax.lax.stop_gradient(koleo).mean()
    return total, terms


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


def make_train_step(
    modules: Modules,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    teacher_temp: Schedule,
    ema_momentum: Schedule,
    seed: int = 0,
    accum_steps: int = 1,
):
    """Build train_step(state, batch) -> (state, metrics), pure and ready for jit.

    accum_steps cuts the W groups into that many micro-batches and averages their
    gradients. Every loss is a mean over groups, so the result equals the large batch,
    with one exception: Sinkhorn-Knopp normalises over the rows it sees, hence over a
    micro-batch. Raises ValueError (on tracing) when W is not divisible.
    """

    def loss_and_grads(state, batch, key):
        temp = teacher_temp(state.step)
        *targets, centers = teacher_outputs(
            modules, objective, state.teacher, state.centers, batch, temp
        )
        targets = jax.lax.stop_gradient(targets)
        (_, terms), grads = jax.value_and_grad(
            lambda student: compute_losses(
                modules, objective, student, batch, targets, key
            ),
            has_aux=True,
        )(state.student)
        terms["teacher_entropy"] = losses.entropy(targets[0]).mean()
        terms["teacher_mean"] = targets[0].mean(axis=(0, 1, 2))  # [K]
        return grads, centers, terms

    def accumulate(state, batch, key):
        num_groups = batch["mask_weights"].shape[0]
        if num_groups % accum_steps:
            raise ValueError(
                f"{num_groups} groups cannot be cut into {accum_steps} micro-batches"
            )

        def body(total, xs):
            i, micro = xs
            parts = loss_and_grads(state, micro, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, parts), None

        micro = micro_batches(batch, accum_steps)
        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(loss_and_grads, state, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(accum_steps), micro))
        return jax.tree.map(lambda x: x / accum_steps, total)

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        arrays = {k: v for k, v in batch.items() if k not in ("index", "bad")}
        gradients = accumulate if accum_steps > 1 else loss_and_grads
        grads, centers, terms = gradients(state, arrays, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        m = ema_momentum(state.step)
        # m t + (1-m) s, in the form that leaves equal weights equal to the last bit.
        teacher = jax.tree.map(
            lambda t, s: t + (1 - m) * (s - t), state.teacher, student
        )
        names = ("dino_local", "dino_global", "koleo", "ibot")
        watched = watch(terms, grads, updates, student, teacher, centers)
        metrics = {"total": sum(terms[n] for n in names), **terms, **watched}
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
