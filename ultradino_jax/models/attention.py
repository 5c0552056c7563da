"""Self-attention on packed rows, by whichever kernel suits the device."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from ultradino_jax.models.packing import Layout, pack, unpack

# cuDNN's kernels need an even number of tokens to train; 8 fills a 16-byte load.
CUDNN_MULTIPLE = 8
IMPLEMENTATIONS = ("xla", "cudnn", "triton")


def dot_product_attention(q, k, v, bias, implementation: str):
    """softmax(q k' / sqrt(E) + bias) v of [B,T,A,E] each; bias [1,A,T,T] or None.

    implementation: 'xla', or 'cudnn' (bfloat16 or float16 on CUDA, no bias; tokens are
    padded inside and masked).
    """
    if implementation == "xla" or bias is not None:
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

    wanted: 'auto' takes cuDNN's kernel where it can run, XLA's otherwise; 'cudnn' falls
    back to XLA's where cuDNN is missing or too old. platform: 'cpu', 'gpu', ..
    Raises ValueError for an unknown name, or a kernel that cannot run on this device or
    in this dtype.
    """
    if wanted not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"model.attention {wanted!r} is none of {names}")
    cuda, half = platform in ("gpu", "cuda"), dtype == jnp.bfloat16
    if wanted in ("cudnn", "triton"):
        if not cuda:
            raise ValueError(f"model.attention={wanted!r} needs a CUDA GPU")
        if not half:
            raise ValueError(f"model.attention={wanted!r} needs model.dtype='bfloat16'")
    if wanted == "auto" and not (cuda and half):
        return "xla", "bfloat16 on a CUDA GPU would use cuDNN's"
    if wanted in ("xla", "triton"):
        return wanted, "as the config says"
    if problem := _cudnn_problem():
        return "xla", f"cuDNN's cannot be used: {problem}"
    return "cudnn", "bfloat16 on a CUDA GPU"


def _cudnn_problem() -> str | None:
    """Why cuDNN's attention cannot be trained with here, found by compiling a small
    one."""

    def loss(q):
        return dot_product_attention(q, q, q, None, "cudnn").astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((1, CUDNN_MULTIPLE + 1, 1, 64), jnp.bfloat16)
    try:
        jax.jit(jax.grad(loss)).lower(q).compile()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def keeps(primitive, *_, **__) -> bool:
    """Rematerialisation policy: keep what cuDNN's forward pass returns."""
    return "dot_product_attention_fwd" in primitive.name
