"""What is learnt: DINO + iBOT + KoLeo between a student and a teacher, on groups.

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

import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.models.dino_head import DINOHead, prototype_logits
from ultradino_jax.models.vit import ViT
from ultradino_jax.pretraining import chunks, losses


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

    def ibot(self, params):
        """(head, its parameters) of the patch tokens: the tied or the separate one."""
        if self.ibot_head is None:
            return self.dino_head, params["dino_head"]
        return self.ibot_head, params["ibot_head"]


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
    student_temp: float = 0.1
    centering: str = "centering"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    chunk_rows: int = 1024

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


def forward_crops(modules, objective, params, *crops, masks=None, key=None):
    """Backbone on crops [W,V,b,S,S,C], of one size or of several together.

    Returns (CLS [W,V,b,D], patches [W,V*b*N,D]) for each size. masks [W,V,b,N] belong
    to the first. With a key the pass is a training pass (drop path), without it a plain
    one.
    """
    w = crops[0].shape[0]
    flat = "w v b ... -> (w v b) ..."
    if masks is not None:
        masks = rearrange(masks, flat)
    images = tuple(rearrange(objective.normalise(c), flat) for c in crops)
    outputs = modules.backbone.apply(
        {"params": params["backbone"]},
        images,
        (masks, *[None] * (len(crops) - 1)),
        groups=w,
        train=key is not None,
        rngs=None if key is None else {"drop_path": key},
    )
    results = []
    for crop, out in zip(crops, outputs, strict=True):
        v, b = crop.shape[1:3]
        cls_token = rearrange(out.cls_token, "(w v b) d -> w v b d", w=w, v=v, b=b)
        patches = rearrange(out.patch_tokens, "(w r) n d -> w (r n) d", w=w)
        results.append((cls_token, patches))
    return results


def gather_tokens(patch_tokens, mask_indices):
    """Masked tokens of each group: [W,R,D], [W,M] -> [W,M,D]."""
    return jnp.take_along_axis(patch_tokens, mask_indices[..., None], axis=1)


def dino_chunk(kernel, rows, targets, *, head, objective):
    """DINO loss of c images of a group, as `chunks.summed_over_chunks` wants it.

    rows: student features {'global' [c,G,E], 'local' [c,L,E]}; targets: (the teacher's
    global features [c,G,E], (its kernel, offsets [I,K], temperature, share c/b)).
    """
    features, (teacher_kernel, offsets, teacher_temp, share) = targets
    logits = functools.partial(prototype_logits, dtype=head.dtype)
    views_first = functools.partial(rearrange, pattern="c v k -> 1 v c k")
    log_probs = losses.teacher_log_probs(
        logits(features, teacher_kernel), offsets, teacher_temp
    )
    probs = jnp.exp(log_probs)
    global_logits = logits(rows["global"], kernel)
    local_logits = None
    if rows["local"].shape[1]:
        local_logits = views_first(logits(rows["local"], kernel))
    temp = objective.student_temp
    local, across = losses.dino_loss(
        views_first(probs), views_first(global_logits), local_logits, temp
    )
    student_entropy = losses.entropy_of_log(jax.nn.log_softmax(global_logits / temp))
    terms = {
        "dino_local": objective.dino_weight * local,
        "dino_global": objective.dino_weight * across,
        "student_entropy": student_entropy.mean(),
        "teacher_entropy": losses.entropy_of_log(log_probs).mean(),
        "teacher_mean": probs.mean(axis=(0, 1)),  # [K]
    }
    terms = {k: v * share for k, v in terms.items()}
    return terms["dino_local"] + terms["dino_global"], terms


def ibot_chunk(kernel, rows, targets, *, head, objective):
    """iBOT loss of c masked patches of a group: student features [c,E] -> (loss, aux).

    targets: ((teacher features [c,E], weights [c]), (its kernel, offsets [I,K],
    temperature, number of crops of the group)).
    """
    (features, weights), (teacher_kernel, offsets, teacher_temp, num_crops) = targets
    logits = functools.partial(prototype_logits, dtype=head.dtype)
    probs = jnp.exp(
        losses.teacher_log_probs(
            logits(features, teacher_kernel), offsets, teacher_temp
        )
    )
    ibot = objective.ibot_weight * losses.ibot_loss(
        probs[None], logits(rows, kernel)[None], weights[None], num_crops,
        student_temp=objective.student_temp,
    )  # fmt: skip
    return ibot, {"ibot": ibot}


def teacher_targets(modules, objective, teacher, centers, batch, teacher_temp):
    """What the student is to predict, and the centers after this batch.

    Returns (dino, ibot, centers): `targets` of dino_chunk and ibot_chunk, their arrays
    cut into chunks [n,W,c,..]. The probabilities are softmax(z/tau - sum u) in either
    mode; centering takes u from earlier steps only (the reference applies the mean of
    a batch before its next use), Sinkhorn-Knopp from this batch.
    """
    [(cls_token, patches)] = forward_crops(
        modules, objective, teacher, batch["global_crops"]
    )
    _, g, b, _ = cls_token.shape
    weights = batch["mask_weights"]
    ibot_head, ibot_params = modules.ibot(teacher)
    dino = features_of(modules.dino_head, teacher["dino_head"], cls_token)
    ibot = features_of(
        ibot_head, ibot_params, gather_tokens(patches, batch["mask_indices"])
    )
    dino = rearrange(dino, "w g b e -> w b g e")
    images, masked = chunk_sizes(objective, batch)
    dino_chunks = chunks.in_chunks(dino, images)
    ibot_chunks, weight_chunks = chunks.in_chunks((ibot, weights), masked)
    parts = {}
    for name, head, params, features, pieces, real in (
        ("dino", modules.dino_head, teacher["dino_head"], dino, dino_chunks, None),
        ("ibot", ibot_head, ibot_params, ibot, ibot_chunks, weight_chunks),
    ):
        kernel = kernel_of(head, params)
        if objective.centering == "sinkhorn_knopp":
            real = jnp.ones(pieces.shape[:-1]) if real is None else real
            offsets = losses.sinkhorn_offsets(
                functools.partial(prototype_logits, kernel=kernel, dtype=head.dtype),
                pieces,
                real,
                teacher_temp,
                objective.sinkhorn_iterations,
            )
        else:
            # The iBOT batch center is the mean over groups of each group's mean, not
            # weighted by how many patches a group masks (`ibot_patch_loss.py`).
            real = jnp.ones(features.shape[:-1]) if name == "dino" else weights > 0
            offsets = centers[name][None] / teacher_temp
            centers = centers | {
                name: losses.update_center(
                    centers[name],
                    mean_logits(features, real, kernel, head.dtype),
                    objective.center_momentum,
                )
            }
        parts[name] = kernel, offsets, teacher_temp
    dino = dino_chunks, (*parts["dino"], images / b)
    ibot = (ibot_chunks, weight_chunks), (*parts["ibot"], g * b)
    return dino, ibot, centers


def features_of(head, params, tokens):
    """Unit features of a head: [..,D] -> [..,E]."""
    return head.apply({"params": params}, tokens, method="features")


def kernel_of(head, params):
    """A head's prototypes [E,K]."""
    return head.apply({"params": params}, method="kernel")


def mean_logits(features, real, kernel, dtype):
    """Mean over groups of a group's mean logits: [W,..,E], real [W,..] -> [K].

    Logits are linear in the features, so the mean is taken of those: the logits of all
    rows would not fit.
    """
    features = features.astype(dtype).astype(jnp.float32)
    axes = tuple(range(1, real.ndim))
    count = jnp.maximum(real.sum(axis=axes), 1)
    means = (features * real[..., None]).sum(axis=axes) / count[:, None]
    kernel = kernel.astype(dtype).astype(jnp.float32)
    return jnp.matmul(means.mean(axis=0), kernel, precision="highest")


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


def student_features(modules, objective, student, batch, key):
    """Student's view of all crops, global ones masked.

    Returns (cls_token [W,G,b,D], rows of dino_chunk, rows of ibot_chunk), the rows cut
    into chunks [n,W,c,..].
    """
    forward = functools.partial(forward_crops, modules, objective, student)
    large, small, masks = (batch[k] for k in ("global_crops", "local_crops", "masks"))
    if small.shape[1] == 0:
        outputs = forward(large, masks=masks, key=key)
    elif large.shape[0] > 1:
        # Together: a weight's gradient is one sum, sent between devices once.
        outputs = forward(large, small, masks=masks, key=key)
    else:
        # One group is on one device. Packing is for nothing, and costs a CPU a fifth.
        keys = jax.random.split(key)
        outputs = forward(large, masks=masks, key=keys[0])
        outputs += forward(small, key=keys[1])
    cls_token, patches = outputs[0]
    local_cls = outputs[1][0] if small.shape[1] else cls_token[:, :0]
    images, masked = chunk_sizes(objective, batch)
    crops = {
        name: rearrange(
            features_of(modules.dino_head, student["dino_head"], cls),
            "w v b e -> w b v e",
        )
        for name, cls in (("global", cls_token), ("local", local_cls))
    }
    tokens = gather_tokens(patches, batch["mask_indices"])
    patch_rows = features_of(*modules.ibot(student), tokens)
    return (
        cls_token,
        chunks.in_chunks(crops, images),
        chunks.in_chunks(patch_rows, masked),
    )


def compute_losses(modules, objective, student, batch, targets, key):
    """(total, terms): the optimised loss, its weighted parts and what to watch.

    total = dino_local + dino_global + koleo + ibot; each term is logged as it is
    optimised (the reference displays half of koleo and ibot). Besides them `terms`
    holds student_entropy and teacher_entropy (nats, of the global crops), teacher_mean
    [K], the teacher's mean answer, and log_distance, the mean log distance of a CLS
    token to its nearest neighbour within the group (KoLeo's).
    """
    cls_token, *rows = student_features(modules, objective, student, batch, key)
    rows, targets = tuple(rows), tuple(targets)
    koleo = jax.vmap(jax.vmap(losses.koleo_loss))(cls_token)
    ibot_head, ibot_params = modules.ibot(student)
    dino = functools.partial(dino_chunk, head=modules.dino_head, objective=objective)
    ibot = functools.partial(ibot_chunk, head=ibot_head, objective=objective)
    kernel = kernel_of(modules.dino_head, student["dino_head"])
    if modules.ibot_head is None:  # in one go: one gradient of the shared prototypes
        total, terms = chunks.summed_over_chunks((dino, ibot), kernel, rows, targets)
    else:
        total, terms = 0.0, ()
        kernels = kernel, kernel_of(ibot_head, ibot_params)
        for f, k, r, t in zip((dino, ibot), kernels, rows, targets, strict=True):
            part, extra = chunks.summed_over_chunks((f,), k, (r,), (t,))
            total, terms = total + part, terms + extra
    terms = terms[0] | terms[1]
    terms["koleo"] = objective.koleo_weight * koleo.mean(axis=0).sum()
    terms["log_distance"] = -jax.lax.stop_gradient(koleo).mean()
    return total + terms["koleo"], terms
