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
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.tree import flat_names

TERMS = {  # the reference displays half of the last two
    "dino_local": ("dino_local_crops_loss", 1),
    "dino_global": ("dino_global_crops_loss", 1),
    "koleo": ("koleo_loss", 2),
    "ibot": ("ibot_loss", 2),
    "total": ("total", 1),
}
# Tokens of the crops of 224 and 96 pixels with 4 registers: images of a ViT-B's step.
TOKENS = {201: 512, 41: 2048}


def relative(value, reference) -> float:
    """|value - reference| over |reference|, Euclidean norms in float64."""
    value, reference = (np.asarray(x, np.float64) for x in (value, reference))
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def golden_row(g, modules, precision: str | None) -> dict:
    """Two steps against the reference's: relative differences."""
    row = {}
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
    cases = {
        "float32, highest precision": ({}, "highest"),
        "bfloat16": (half, None),
    }
    if hasattr(MODULES.backbone, "attention"):
        for name in ("xla", "cudnn", "triton"):
            cases[f"bfloat16, {name}"] = ({**half, "attention": name}, None)
    rows = {}
    for name, (changes, precision) in cases.items():
        head = {k: v for k, v in changes.items() if k == "dtype"}
        modules = Modules(
            MODULES.backbone.clone(**changes), MODULES.dino_head.clone(**head)
        )
        rows[name] = kept(golden_row, g, modules, precision)
    return {"rows": rows}


def xla(q, k, v):
    """[B,T,A,E] -> [B,T,A,E]."""
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def cudnn(q, k, v):
    """[B,T,A,E] -> [B,T,A,E]; padded to 8s: the gradient wants an even T."""
    b, t = q.shape[:2]
    padding = ((0, 0), (0, -t % 8), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    lengths = jnp.full((b,), t, jnp.int32)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return y[:, :t]


VARIANTS = {"xla": xla, "cudnn": cudnn}


def exact_attention(q, k, v, cotangent):
    """(output, gradients of q, k and v) in float64 by numpy."""
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


def random_heads(batch: int, tokens: int, heads: int) -> list:
    """q, k, v and a cotangent, bfloat16 [B,T,A,64] of the unit normal distribution."""
    rng = np.random.default_rng(tokens)
    shape = (batch, tokens, heads, 64)
    return [
        rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for _ in range(4)
    ]


def attention_row(function, tokens: int, batch: int, heads: int) -> dict:
    """Errors against float64, and milliseconds forward and backward."""

    @functools.partial(jax.jit)
    def both(q, k, v, cotangent):
        y, pull = jax.vjp(function, q, k, v)
        return (y, *pull(cotangent))

    few = random_heads(4, tokens, 2)
    names = ("output", "dq", "dk", "dv")
    row = {
        name: relative(ours, exact)
        for name, ours, exact in zip(
            names, both(*few), exact_attention(*few), strict=True
        )
    }
    many = jax.device_put(random_heads(batch, tokens, heads))
    jax.block_until_ready(both(*many))
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        result = both(*many)
    jax.block_until_ready(result)
    return row | {"ms": 1e3 * (time.perf_counter() - start) / repeats}


def attention(spec: dict) -> dict:
    """Every variant at both numbers of tokens."""
    rows = {}
    for tokens, images in TOKENS.items():
        batch, heads = (2, 2) if spec.get("tiny") else (images, 12)
        for name, function in VARIANTS.items():
            key = f"{name}, {tokens} tokens"
            rows[key] = kept(attention_row, function, tokens, batch, heads)
            rows[key]["shape"] = [batch, tokens, heads, 64]
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
