"""Is it right on this device? The golden train step and the attention variants.

    python -m experiments.benchmarks.gpu_checks SPEC OUT

SPEC is JSON: {'check': a key of CHECKS, 'tiny': false}. Part of gpu.py. Feature
extraction is timed here, too.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from experiments.benchmarks.extract import random_backbone
from experiments.benchmarks.gpu_worker import kept, work
from tests import golden_step
from tests.golden_step import GOLDEN, MODULES, first_gradient
from tests.sizes import below
from ultradino_jax.evaluators.features import extract_features
from ultradino_jax.models.attention import packed_attention
from ultradino_jax.models.packing import Layout, unpack
from ultradino_jax.models.triton_attention import triton_attention
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.tree import flat_names

TERMS = {  # the reference displays half of the last two
    "dino_local": ("dino_local_crops_loss", 1),
    "dino_global": ("dino_global_crops_loss", 1),
    "koleo": ("koleo_loss", 2),
    "ibot": ("ibot_loss", 2),
    "total": ("total", 1),
}
# Tokens of the crops of 224 and 96 pixels with 4 registers.
TOKENS = (201, 41)
HEAD_DIM = 64
# A ViT-B's block at 256 images, drop path 0.3.
VITB = (Layout(1, ((358, 201), (1433, 41))), 12)


def relative(value, reference) -> float:
    """|value - reference| over |reference|, Euclidean norms in float64."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def golden_row(g, modules, precision: str | None) -> dict:
    """Two steps against the reference's: relative differences."""
    row, found = {}, {}
    with jax.default_matmul_precision(precision):
        step, state = golden_step.reference_setup(g, below, "centering", modules)
        for i in range(golden_step.num_steps(g)):
            batch = golden_step.reference_batch(g, flipped=bool(i % 2))
            state, metrics = step(state, batch)
            loss = below(g, f"centering/step{i}/loss/")
            row[f"losses of step {i}"] = {
                ours: float(metrics[ours]) / float(times * loss[theirs]) - 1
                for ours, (theirs, times) in TERMS.items()
            }
            if i == 0:
                found = first_gradient(state, metrics)
    arrays = below(g, "centering/step0/grad_unclipped/")
    tree = golden_step.reference_tree(lambda state, p: below(state, p), arrays, "")
    theirs = flat_names(tree)
    for part in ("backbone", "dino_head"):
        names = [n for n in theirs if n.startswith(part)]
        pairs = [(np.ravel(found[n]), np.ravel(theirs[n])) for n in names]
        ours, reference = (np.concatenate(x) for x in zip(*pairs, strict=True))
        row[f"gradient, {part}"] = relative(ours, reference)
    return row


def golden(spec: dict) -> dict:
    """The golden step in every precision and with every attention there is."""
    del spec
    g = dict(GOLDEN)
    half = {"dtype": jnp.bfloat16}
    cases: dict[str, tuple] = {"float32, highest precision": ({}, "highest")}
    for name in VARIANTS:
        cases[f"bfloat16, {name}"] = ({**half, "attention": name}, None)
    rows = {}
    for name, (changes, precision) in cases.items():
        head = {k: v for k, v in changes.items() if k == "dtype"}
        modules = Modules(
            MODULES.backbone.clone(**changes), MODULES.dino_head.clone(**head)
        )
        rows[name] = kept(golden_row, g, modules, precision)
    return {"rows": rows}


def packed(name: str):
    """packed_attention by that implementation, as f(qkv, layout, heads)."""
    return functools.partial(packed_attention, implementation=name, bias=None)


# f(qkv [W,R,3D], layout, heads) -> [W,R,D].
VARIANTS = {
    "xla": packed("xla"),
    "cudnn": packed("cudnn"),
    "triton": triton_attention,
}


def exact_attention(q, k, v, cotangent):
    """(output, gradients of q, k and v) of [B,T,A,E] in float64 by numpy."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("btae,bsae->bats", q, k) * scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btae,bsae->bats", cotangent, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bats,bsae->btae", p, v),
        np.einsum("bats,bsae->btae", ds, k),
        np.einsum("bats,btae->bsae", ds, q),
        np.einsum("bats,btae->bsae", p, cotangent),
    )


def random_rows(layout: Layout, heads: int):
    """(qkv, cotangent of the output), bfloat16 rows of unit normal numbers."""
    rng = np.random.default_rng(layout.rows)
    parts = []
    for columns in (3 * HEAD_DIM * heads, HEAD_DIM * heads):
        shape = (layout.groups, layout.rows, columns)
        rows = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        rows[:, layout.used :] = 0
        parts.append(rows)
    return parts


def forward_and_backward(function, layout: Layout, heads: int):
    """Jitted (qkv, cotangent) -> (output, gradient of qkv)."""

    def both(qkv, cotangent):
        y, pull = jax.vjp(lambda x: function(x, layout, heads), qkv)
        return y, pull(cotangent)[0]

    return jax.jit(both)


def attention_errors(function, tokens: int) -> dict:
    """Relative errors against float64, 4 sequences of 2 heads."""
    layout, heads = Layout(1, ((4, tokens),)), 2
    qkv, cotangent = random_rows(layout, heads)
    out, gradient = forward_and_backward(function, layout, heads)(qkv, cotangent)

    def heads_of(rows, parts):
        [x] = unpack(np.asarray(rows), layout)
        shape = (4, tokens, parts, heads, HEAD_DIM)
        return np.moveaxis(x.reshape(shape), 2, 0)

    exact = exact_attention(*heads_of(qkv, 3), *heads_of(cotangent, 1))
    ours = (*heads_of(out, 1), *heads_of(gradient, 3))
    names = ("output", "dq", "dk", "dv")
    return {n: relative(*pair) for n, *pair in zip(names, ours, exact, strict=True)}


def attention_time(function, layout: Layout, heads: int) -> dict:
    """Milliseconds forward and backward."""
    both = forward_and_backward(function, layout, heads)
    rows = jax.device_put(random_rows(layout, heads))
    jax.block_until_ready(both(*rows))
    start, repeats, result = time.perf_counter(), 20, None
    for _ in range(repeats):
        result = both(*rows)
    jax.block_until_ready(result)
    return {"ms": 1e3 * (time.perf_counter() - start) / repeats}


def attention(spec: dict) -> dict:
    """Every variant: errors at both lengths, and the time of a ViT-B's block."""
    rows = {}
    layout, heads = (Layout(1, ((2, 9), (3, 5))), 2) if spec.get("tiny") else VITB
    for name, function in VARIANTS.items():
        for tokens in TOKENS:
            rows[f"{name}, {tokens} tokens"] = kept(attention_errors, function, tokens)
        views = " and ".join(f"{r} x {t}" for r, t in layout.views)
        key = f"{name}, {views} tokens, {heads} heads"
        rows[key] = kept(attention_time, function, layout, heads)
    return {"rows": rows}


def extraction(spec: dict) -> dict:
    """Images per second of extract_features, grey 512 x 384 in memory."""
    count, batch = (8, 4) if spec.get("tiny") else (2048, 256)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 384, 512), dtype=np.uint8)
    rows = {}
    for variant in ("tiny",) if spec.get("tiny") else ("small", "base"):
        for dtype in (jnp.float32, jnp.bfloat16):
            name = f"ViT-{variant}, {jnp.dtype(dtype).name}, batches of {batch}"
            rows[name] = kept(extraction_row, variant, dtype, images, batch)
    return {"rows": rows}


def extraction_row(variant: str, dtype, images, batch: int) -> dict:
    """Best of three passes after one that compiles."""
    backbone = random_backbone(variant, dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        extract_features(backbone, images, batch_size=batch)
        seconds.append(time.perf_counter() - start)
    rates = [len(images) / s for s in seconds[1:]]
    return {"img/s": round(max(rates), 1), "least": round(min(rates), 1)}


CHECKS = {"golden": golden, "attention": attention, "extraction": extraction}


def check(spec: dict) -> dict:
    """The check that was asked for."""
    return CHECKS[spec["check"]](spec)


if __name__ == "__main__":
    work(check, sys.argv)
