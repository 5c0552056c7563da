"""What is learnt: DINO + iBOT + KoLeo (+ Gram) from a teacher, on groups of images.

The batch is cut into W groups of b images. A group is what a GPU is in the reference:
KoLeo looks for neighbours, masks are allotted and drop path picks its rows within it.
A device holds whole groups, so the result does not depend on the number of devices.

    global_crops  uint8   [W,G,b,S,S,C]     masks         bool    [W,G,b,N]
    local_crops   uint8   [W,L,b,s,s,C]     mask_indices  int32   [W,M]
                                            mask_weights  float32 [W,M]

mask_indices point into a group's flattened [G*b*N] patches; padding has weight 0.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.models.dino_head import prototype_logits
from ultradino_jax.pretraining import chunks, losses
from ultradino_jax.pretraining.networks import (
    features_of,
    forward_crops,
    gather_tokens,
    kernel_of,
)

CENTERINGS = ("centering", "sinkhorn_knopp")


@dataclass(frozen=True)
class Objective:
    """Weights and constants of the loss, and how pixels become network input.

    mean, std: per-channel statistics on the [0,1] scale. chunk_rows: about how many
    rows of a group have their student logits [rows,K] in memory at once.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    gram_weight: float = 0.0
    student_temp: float = 0.1
    centering: str = "centering"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    chunk_rows: int = 1024

    def __post_init__(self):
        if self.centering not in CENTERINGS:
            names = ", ".join(CENTERINGS)
            raise ValueError(f"centering {self.centering!r} is none of {names}")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the terms by name; a schedule of the same name goes first."""
        return {k: v for k, v in vars(self).items() if k.endswith("_weight")}

    def normalise(self, crops):
        """uint8 [..,C] -> float32 (x/255 - mean)/std."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return (crops.astype(jnp.float32) / 255 - mean) / std


class TeacherHead(NamedTuple):
    """What turns the teacher's features into targets: softmax(z/tau - sum u)."""

    kernel: jax.Array  # the head's prototypes [E,K]
    offsets: jax.Array  # u [I,K]: the center over tau, or those of Sinkhorn-Knopp
    temp: jax.Array  # tau

    def log_probs(self, features, dtype):
        """Logarithm of the targets of unit features [..,E] -> [..,K]."""
        logits = prototype_logits(features, self.kernel, dtype)
        return losses.teacher_log_probs(logits, self.offsets, self.temp)


class Constants(NamedTuple):
    """What all chunks of a loss share; num_rows: the rows in all it is a mean over."""

    teacher: TeacherHead
    weight: jax.Array
    student_temp: float
    num_rows: int


class DinoRows(NamedTuple):
    """The student's features of images: [..,G,E] and [..,L,E]."""

    global_crops: jax.Array
    local_crops: jax.Array


class IbotTargets(NamedTuple):
    """The teacher's features of masked patches [..,E] and the weight of each."""

    features: jax.Array
    weights: jax.Array


class Targets(NamedTuple):
    """What the student is to predict; the features are cut into chunks [n,W,c,..]."""

    dino: jax.Array  # the teacher's features of the global crops [n,W,c,G,E]
    dino_head: TeacherHead
    ibot: IbotTargets
    ibot_head: TeacherHead
    patch_tokens: jax.Array  # of the global crops [W,G*b*N,D]


class Losses(NamedTuple):
    """What a batch, or a chunk of it, is found to cost.

    terms: the weighted losses by name, as they are optimised (the reference displays
    half of koleo and ibot); a term is called as its weight (see `terms`). total: their
    sum. watched: what is looked at and not optimised.
    """

    total: jax.Array
    terms: dict[str, jax.Array]
    watched: dict[str, jax.Array]


def dino_chunk(kernel, rows: DinoRows, features, constants: Constants, *, dtype):
    """DINO loss of c images of a group, as `chunks.summed` wants it.

    features: the teacher's [c,G,E]. Watches student_entropy and teacher_entropy (nats,
    of the global crops) and teacher_mean [K], the teacher's mean answer.
    """
    teacher, weight, temp, num_images = constants
    views_first = functools.partial(rearrange, pattern="c v k -> 1 v c k")
    log_probs = teacher.log_probs(features, dtype)
    probs = jnp.exp(log_probs)
    global_logits: Any = prototype_logits(rows.global_crops, kernel, dtype)
    local_logits = None
    if rows.local_crops.shape[1]:
        local_logits = views_first(prototype_logits(rows.local_crops, kernel, dtype))
    local, across = losses.dino_loss(
        views_first(probs), views_first(global_logits), local_logits, temp
    )
    student_entropy = losses.entropy_of_log(jax.nn.log_softmax(global_logits / temp))
    terms = {"dino_local": weight * local, "dino_global": weight * across}
    watched = {
        "student_entropy": student_entropy.mean(),
        "teacher_entropy": losses.entropy_of_log(log_probs).mean(),
        "teacher_mean": probs.mean(axis=(0, 1)),  # [K]
    }
    share = len(features) / num_images
    terms, watched = jax.tree.map(lambda x: x * share, (terms, watched))
    total = terms["dino_local"] + terms["dino_global"]
    return total, Losses(total, terms, watched)


def ibot_chunk(kernel, rows, targets: IbotTargets, constants: Constants, *, dtype):
    """iBOT loss of c masked patches of a group; rows: the student's features [c,E]."""
    teacher, weight, temp, num_crops = constants
    probs = jnp.exp(teacher.log_probs(targets.features, dtype))
    logits: Any = prototype_logits(rows, kernel, dtype)
    ibot = weight * losses.ibot_loss(
        probs[None], logits[None], targets.weights[None], num_crops, student_temp=temp
    )
    return ibot, Losses(ibot, {"ibot": ibot}, {})


def teacher_targets(
    modules, objective, teacher, centers, batch, scheduled
) -> tuple[Targets, dict[str, jax.Array]]:
    """What the student is to predict, and the centers after this batch.

    The probabilities are softmax(z/tau - sum u) in either mode: centering takes u from
    earlier steps only (the reference applies the mean of a batch before its next use),
    Sinkhorn-Knopp from this batch.
    """
    [(cls_token, patches)] = forward_crops(
        modules, objective, teacher, batch["global_crops"]
    )
    weights = batch["mask_weights"]
    dino_head, dino_params = modules.dino_head, teacher["dino_head"]
    ibot_head, ibot_params = modules.ibot(teacher)
    dino = features_of(dino_head, dino_params, cls_token)
    dino = rearrange(dino, "w g b e -> w b g e")
    masked_patches = gather_tokens(patches, batch["mask_indices"], weights)
    ibot = features_of(ibot_head, ibot_params, masked_patches)
    images, masked = chunk_sizes(objective, batch)

    def head(module, params, features, real, size, center):
        """(TeacherHead, next center); features [W,R,..,E], real [W,R,..]."""
        kernel, temp = kernel_of(module, params), scheduled["teacher_temp"]
        if objective.centering == "sinkhorn_knopp":
            logits = functools.partial(
                prototype_logits, kernel=kernel, dtype=module.dtype
            )
            pieces, real = chunks.in_chunks((features, real), size)
            offsets = losses.sinkhorn_offsets(
                logits, pieces, real, temp, objective.sinkhorn_iterations
            )
            return TeacherHead(kernel, offsets, temp), center
        # The iBOT batch center is the mean over groups of each group's mean, not
        # weighted by how many patches a group masks (`ibot_patch_loss.py`).
        mean = losses.mean_logits(features, real, kernel, module.dtype)
        after = losses.update_center(center, mean, objective.center_momentum)
        return TeacherHead(kernel, center[None] / temp, temp), after

    every = jnp.ones(dino.shape[:-1])
    dino_teacher, dino_center = head(
        dino_head, dino_params, dino, every, images, centers["dino"]
    )
    ibot_teacher, ibot_center = head(
        ibot_head, ibot_params, ibot, weights > 0, masked, centers["ibot"]
    )
    targets = Targets(
        dino=chunks.in_chunks(dino, images),
        dino_head=dino_teacher,
        ibot=chunks.in_chunks(IbotTargets(ibot, weights), masked),
        ibot_head=ibot_teacher,
        patch_tokens=patches,
    )
    return targets, {"dino": dino_center, "ibot": ibot_center}


def chunk_sizes(objective, batch):
    """(images, masked patches) of a chunk, as they divide b and the padded M."""
    _, g, b = batch["global_crops"].shape[:3]
    crops = g + batch["local_crops"].shape[1]
    masked = batch["mask_indices"].shape[1]
    images = chunks.chunk_size(b, objective.chunk_rows // crops)
    return images, masked // -(-masked // objective.chunk_rows)


def pad_mask_buffer(batch, chunk_rows: int):
    """The batch with M grown to fill its chunks evenly; padding weighs 0."""
    masked = batch["mask_indices"].shape[1]
    more = -masked % -(-masked // chunk_rows)
    padded = {
        name: jnp.pad(batch[name], ((0, 0), (0, more)))
        for name in ("mask_indices", "mask_weights")
    }
    return batch | padded


class StudentRows(NamedTuple):
    """The student's features, cut into chunks [n,W,c,..], and its tokens."""

    cls_token: jax.Array  # of the global crops [W,G,b,D]
    patch_tokens: jax.Array  # of the same [W,G*b*N,D]
    dino: DinoRows
    ibot: jax.Array  # of the masked patches [n,W,c,E]


def student_rows(modules, objective, student, batch, key) -> StudentRows:
    """Student's view of all crops, global ones masked."""
    forward = functools.partial(forward_crops, modules, objective, student)
    large, small, masks = (batch[k] for k in ("global_crops", "local_crops", "masks"))
    crops = (large, small) if small.shape[1] else (large,)
    outputs = forward(*crops, masks=masks, key=key)
    cls_token, patches = outputs[0]
    local_cls = outputs[1][0] if small.shape[1] else cls_token[:, :0]
    images, masked = chunk_sizes(objective, batch)

    def image_features(cls):
        features = features_of(modules.dino_head, student["dino_head"], cls)
        return rearrange(features, "w v b e -> w b v e")

    dino = DinoRows(image_features(cls_token), image_features(local_cls))
    tokens = gather_tokens(patches, batch["mask_indices"], batch["mask_weights"])
    ibot_head, ibot_params = modules.ibot(student)
    ibot = features_of(ibot_head, ibot_params, tokens)
    dino, ibot = chunks.in_chunks(dino, images), chunks.in_chunks(ibot, masked)
    return StudentRows(cls_token, patches, dino, ibot)


def compute_losses(
    modules, objective, student, batch, targets: Targets, scheduled, key
) -> tuple[jax.Array, Losses]:
    """(loss to differentiate, the same with its terms and what to watch).

    scheduled: this step's values, with every weight of the objective among them. Terms:
    dino_local, dino_global, koleo, ibot and, unless its weight is 0, gram. Besides what
    dino_chunk watches there is log_distance, the mean log distance of a CLS token to
    its nearest neighbour within the group (KoLeo's). `Losses` carries no gradient.
    """
    _, g, b = batch["global_crops"].shape[:3]
    rows = student_rows(modules, objective, student, batch, key)
    temp = objective.student_temp
    ibot_head, ibot_params = modules.ibot(student)
    dino = chunks.Part(
        functools.partial(dino_chunk, dtype=modules.dino_head.dtype),
        rows.dino,
        targets.dino,
        Constants(targets.dino_head, scheduled["dino_weight"], temp, b),
    )
    ibot = chunks.Part(
        functools.partial(ibot_chunk, dtype=ibot_head.dtype),
        rows.ibot,
        targets.ibot,
        Constants(targets.ibot_head, scheduled["ibot_weight"], temp, g * b),
    )
    kernel = kernel_of(modules.dino_head, student["dino_head"])
    if modules.ibot_head is None:  # in one go: one gradient of the shared prototypes
        loss, (of_dino, of_ibot) = chunks.summed(kernel, dino, ibot)
    else:
        loss, (of_dino,) = chunks.summed(kernel, dino)
        more, (of_ibot,) = chunks.summed(kernel_of(ibot_head, ibot_params), ibot)
        loss = loss + more

    log_distances = -jax.vmap(jax.vmap(losses.koleo_loss))(rows.cls_token)
    koleo = scheduled["koleo_weight"] * -log_distances.mean(axis=0).sum()
    loss = loss + koleo

    terms = {**of_dino.terms, "koleo": koleo, **of_ibot.terms}
    weight = scheduled["gram_weight"]
    if isinstance(weight, jax.Array) or weight:  # a constant 0 costs nothing
        by_crop = functools.partial(
            rearrange, pattern="w (r n) d -> w r n d", n=batch["masks"].shape[-1]
        )
        tokens = by_crop(rows.patch_tokens), by_crop(targets.patch_tokens)
        terms["gram"] = weight * losses.gram_loss(*tokens)
        loss = loss + terms["gram"]

    watched = {**of_dino.watched, "log_distance": log_distances.mean()}
    total = functools.reduce(jnp.add, terms.values())
    return loss, Losses(total, terms, watched)
