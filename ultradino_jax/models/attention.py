"""Self-attention on packed rows, by whichever kernel suits the device."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from ultradino_jax.models.packing import Layout, pack, unpack
from ultradino_jax.models.triton_attention import triton_attention

# cuDNN's kernels need an even number of tokens to train; 8 fills a 16-byte load.
CUDNN_MULTIPLE = 8
IMPLEMENTATIONS = ("xla", "cudnn", "triton")


def dot_product_attention(q, k, v, bias, implementation: str):
    """softmax(q k' / sqrt(E) + bias) v of [B,T,A,E] each; bias [1,A,T,T] or None.

    implementation: 'xla', or 'cudnn' (bfloat16 or float16 on CUDA, no bias; tokens are
    padded inside and masked).
    """
    if implementation != "cudnn" or bias is not None:
        return jax.nn.dot_product_attention(q, k, v, bias=bias)
    b, t = q.shape[:2]
    padding = -t % CUDNN_MULTIPLE
    lengths = None
    if padding:
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v)
        )
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


def split_heads(qkv, num_heads: int):
    """[B,T,3D] -> q, k, v [B,T,A,E]."""
    return rearrange(qkv, "b t (three a e) -> three b t a e", three=3, a=num_heads)


def packed_attention(qkv, layout: Layout, num_heads: int, implementation: str, bias):
    """Packed qkv [W,R,3D] -> [W,R,D]; tokens attend to those of their own sequence.

    bias [A,T,T], added to the logits, or None.
    """
    if implementation == "triton" and bias is None:
        return triton_attention(qkv, layout, num_heads)
    added = None if bias is None else bias[None].astype(qkv.dtype)
    out = []
    for part in unpack(qkv, layout):
        q, k, v = split_heads(part, num_heads)
        y = dot_product_attention(q, k, v, added, implementation)
        out.append(rearrange(y, "b t a e -> b t (a e)"))
    y = pack(out, layout)
    # cuDNN's own result is kept instead (`keeps` below): the backward pass asks for it.
    return y if implementation == "cudnn" else checkpoint_name(y, "attention")


def choose(wanted: str, dtype, platform: str) -> tuple[str, str]:
    """(implementation, why) for config.model.attention and the device at hand.

    wanted: 'auto' takes the fastest that can run here: our Triton kernel, cuDNN's, or
    XLA's. 'cudnn' and 'triton' fall back to the next where theirs cannot be compiled.
    platform: 'cpu', 'gpu', ..
    Raises ValueError for an unknown name, or a kernel that is not for this kind of
    device or this dtype.
    """
    if wanted not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"model.attention {wanted!r} is none of {names}")
    if wanted == "xla":
        return "xla", "as the config says"
    fits = platform in ("gpu", "cuda") and dtype == jnp.bfloat16
    if not fits and wanted == "auto":
        return "xla", "others need bfloat16 on a CUDA GPU"
    if not fits:
        raise ValueError(
            f"model.attention={wanted!r} needs model.dtype='bfloat16' and a CUDA GPU"
        )
    problems = []
    for name in ("cudnn",) if wanted == "cudnn" else ("triton", "cudnn"):
        problem = _problem(name)
        if problem is None:
            return name, "; ".join(problems) or "bfloat16 on a CUDA GPU"
        problems.append(f"{name} cannot be used: {problem}")
    return "xla", "; ".join(problems)


def _problem(implementation: str) -> str | None:
    """Why an attention cannot be trained with here, found by compiling a small one."""
    layout = Layout(1, ((1, 9),))

    def loss(qkv):
        y: Any = packed_attention(qkv, layout, 1, implementation, None)
        return y.astype(jnp.float32).sum()

    qkv = jax.ShapeDtypeStruct((1, layout.rows, 3 * 64), jnp.bfloat16)
    try:
        jax.jit(jax.grad(loss)).lower(qkv).compile()
    except Exception as error:  # whatever a missing or other version of it raises
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def keeps(primitive, *_, **__) -> bool:
    """Rematerialisation policy: keep what cuDNN's forward pass returns."""
    return "dot_product_attention_fwd" in primitive.name
