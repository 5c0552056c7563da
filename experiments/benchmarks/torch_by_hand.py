"""DINOv2's PyTorch step on an H100 by hand, by the constants of tests/roofline.py.

Nothing is run: the kernels of facebookresearch/dinov2 are counted with the bytes and
operations they cannot do without. Assumed, as its recipe has it:

- float16 through FSDP without sharding, the residual stream too; float32 masters.
- xformers: both crop sizes in one product (nested tensors), memory-efficient attention
  that never writes the T x T weights, batch-subset drop path on a copy of the rows.
- No activation checkpointing, whole logits, losses in float32, no torch.compile: a
  kernel reads its inputs from memory and writes its result back.
- Collectives hidden behind the backward pass.
"""

import math

from tests.roofline import BANDWIDTH, LAUNCH, PEAK
from ultradino_jax.models.dino_head import head_flops
from ultradino_jax.run.plan import Plan

HALF = 2  # bytes

# Passes over a [tokens, D] array in float16 that a block's elementwise kernels make,
# reads and writes, on the rows drop path keeps. Two branches.
STUDENT_FORWARD = (
    2 * 2  # rows gathered
    + 2 * 2  # LayerNorm
    + 2 * 3  # result scaled and added to its rows in place
    + 4 + 4  # GELU
)  # fmt: skip
STUDENT_BACKWARD = (
    2 * 2  # the rows' gradient gathered, times gamma
    + 2 * 2  # gamma's gradient: two reads
    + 4 + 4 + 4  # GELU: input, gradient, result
    + 2 * 3  # LayerNorm: input, gradient, result
    + 3 + 1 + 4 + 1  # bias gradients of qkv, proj, fc1, fc2
    + 2 * 2  # the subset's gradient added to its rows
)  # fmt: skip
# On all rows: zeros for the gather's gradient, and residual additions.
STUDENT_BACKWARD_ALL = 2 * 1 + 2 * 3
# LayerNorm, LayerScale, residual addition, GELU.
TEACHER = 2 * 2 + 2 * 2 + 2 * 3 + 8
# Kept for the backward pass, on the kept rows. Attention: gathered rows, normalised,
# qkv, output, proj's output (for gamma); MLP: the same with fc1 and GELU between.
SAVED = (1 + 1 + 3 + 1 + 1) + (1 + 1 + 4 + 4 + 1)
# Bytes per logit. Student: cast and divided by the temperature (6), log-softmax (8),
# cast (4), times the targets (12), summed (4), as much backward, gemms write and read
# it (4). Teacher: center taken off, divided, softmax, cast (22), center updated (2),
# gemm (2).
STUDENT_LOGIT, TEACHER_LOGIT = 34 + 34 + 4, 22 + 2 + 2
# Bytes kept per logit: float16, and divided, log-softmax, product in float32; targets.
STUDENT_LOGIT_SAVED, TEACHER_LOGIT_SAVED = 2 + 3 * 4, 4
# Bytes per parameter. Gradient, parameter, moments read (16), three written (12); norm,
# clipping (12); EMA (12); both networks cast (2 x 6); float16 gradients to float32 (2).
OPTIMIZER = 16 + 12 + 12 + 12 + 2 * 6 + 2
# Parameter, moments, teacher, gradient, the float16 copy.
STATE = 4 + 2 * 4 + 4 + 4 + 2
# Kernels of a block: student forward, backward, teacher; and of all the rest.
LAUNCHES, LAUNCHES_REST = 22 + 48 + 16, 250


def torch_step(plan: Plan, parameters: int, images: int) -> dict:
    """Predicted {'ms', 'gb', 'parts' (ms), 'gb_parts'} of the PyTorch step.

    parameters: of the student. images: per GPU.
    """
    model, head = plan.modules.backbone, plan.modules.dino_head
    assert not isinstance(model.drop_path, tuple)
    d, depth, ratio = model.embed_dim, model.depth, model.mlp_ratio
    kept = 1 - model.drop_path

    def patches(side):
        return (side // model.patch_size) ** 2

    whole, part = patches(plan.crops.global_size), patches(plan.crops.local_size)
    views = [(2 * images, whole), (plan.crops.num_local * images, part)]
    views = [(rows, n + 1 + model.num_registers) for rows, n in views]
    tokens = sum(rows * t for rows, t in views)
    teacher = math.prod(views[0])

    def gemm(rows, i, o, times):
        """A linear layer: forward alone or also both gradients (times 3)."""
        work = 2 * rows * i * o / PEAK["bf16"]
        moved = HALF * (rows * (i + o) + i * o) / BANDWIDTH
        return times * max(work, moved)

    def block(rows, times):
        layers = [(d, 3 * d), (d, d), (d, ratio * d), (ratio * d, d)]
        return sum(gemm(rows, i, o, times) for i, o in layers)

    gemms = depth * (block(kept * tokens, 3) + block(teacher, 1))
    passes = kept * tokens * (STUDENT_FORWARD + STUDENT_BACKWARD)
    passes += tokens * STUDENT_BACKWARD_ALL + teacher * TEACHER
    elementwise = depth * passes * d * HALF / BANDWIDTH

    # q, k, v, output forward; those, the output's and their own gradients backward.
    moved = depth * d * HALF * (teacher * 4 + kept * tokens * (4 + 8)) / BANDWIDTH
    squares = sum(rows * t * t for rows, t in views)
    work = 4 * views[0][0] * views[0][1] ** 2 + (4 + 10) * kept * squares
    attention = max(moved, depth * d * work / PEAK["cudnn"])

    feed = plan.feed
    ratio = sum(feed.mask_ratio) / 2
    masked = 2 * images * feed.mask_probability * ratio * whole  # patches
    rows, targets = sum(r for r, _ in views) + masked, views[0][0] + masked
    k, b = head.num_prototypes, head.bottleneck_dim
    logits = k * (rows * STUDENT_LOGIT + targets * TEACHER_LOGIT) / BANDWIDTH
    logits += 2 * b * k * (3 * rows + targets) / PEAK["bf16"]
    mlp = (head_flops(head, d) - 2 * b * k) * (3 * rows + targets) / PEAK["bf16"]

    seconds = {
        "block gemms": gemms,
        "attention": attention,
        "LayerNorm, residual, elementwise": elementwise,
        "prototypes and losses": logits,
        "head MLP": mlp,
        "optimiser, EMA, rest": parameters * OPTIMIZER / BANDWIDTH,
        "launches": (depth * LAUNCHES + LAUNCHES_REST) * LAUNCH,
    }
    kept_logits = rows * STUDENT_LOGIT_SAVED + targets * TEACHER_LOGIT_SAVED
    memory = {
        "activations": depth * d * kept * tokens * SAVED * HALF / 1e9,
        "logits": k * kept_logits / 1e9,
        "state": parameters * STATE / 1e9,
    }
    return {
        "ms": 1e3 * sum(seconds.values()),
        "gb": sum(memory.values()),
        "parts": {name: 1e3 * s for name, s in seconds.items()},
        "gb_parts": memory,
    }
