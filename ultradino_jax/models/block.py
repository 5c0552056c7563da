"""The transformer block of the ViTs, on rows of tokens packed together.

Behaviour follows facebookresearch/dinov2 `layers/block.py` (pre-norm, LayerScale,
batch-subset drop path, lists of crops of several sizes).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ultradino_jax.models.attention import keeps, packed_attention, split_heads
from ultradino_jax.models.ops import Dense, LayerNorm, gelu_product, product
from ultradino_jax.models.packing import Layout, random_subset, unpack

# What each setting of `remat` keeps for the backward pass, besides parameters.
NORMS = ("normalised", "norm_inverse")
MATMULS = (*NORMS, "qkv", "attention", "lse", "fc1")


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    num_heads: int
    dtype: Any
    implementation: str

    def logit_bias(self) -> Any:
        """What is added to the attention logits: [A,T,T], or None for nothing."""
        return None

    @nn.compact
    def __call__(self, x, layout: Layout, affine=None, gain=None):
        """Packed [W,R,D] -> [W,R,D]; affine, gain: see `Dense.weights`.

        Sows softmax maps [B,A,T,T] of each view when asked to.
        """
        d = x.shape[-1]
        qkv = Dense(3 * d, self.dtype, name="qkv")(x, affine)
        qkv = checkpoint_name(qkv, "qkv")
        bias = self.logit_bias()
        if self.is_mutable_collection("intermediates"):
            for part in unpack(qkv, layout):
                q, k, _ = split_heads(part, self.num_heads)
                logits = jnp.einsum("btae,bsae->bats", q, k).astype(jnp.float32)
                logits = logits * q.shape[-1] ** -0.5
                logits = logits if bias is None else logits + bias
                self.sow("intermediates", "attention", nn.softmax(logits))
        y = packed_attention(qkv, layout, self.num_heads, self.implementation, bias)
        return Dense(d, self.dtype, name="proj")(y, gain=gain)


class Mlp(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x, affine=None, gain=None):
        """[..,D] -> [..,D]; affine, gain: see `Dense.weights`."""
        d = x.shape[-1]
        kernel, bias = Dense(self.ratio * d, self.dtype, name="fc1").weights(d, affine)
        x = checkpoint_name(product(x.astype(self.dtype), kernel), "fc1")
        last = Dense(d, self.dtype, name="fc2")
        kernel, last_bias = last.weights(self.ratio * d, gain=gain)
        return gelu_product(x, bias, kernel) + last_bias.astype(self.dtype)


class LayerScale(nn.Module):
    """Per-channel gain on a residual branch, as its parameter alone."""

    start: float

    @nn.compact
    def __call__(self, features: int):
        """-> gamma float32 [features]."""
        return self.param("gamma", nn.initializers.constant(self.start), (features,))


class Block(nn.Module):
    """Pre-norm transformer block; a scan body, hence the (carry, tap) return.

    The residual stream stays float32 whatever the compute dtype: with LayerScale at
    1e-5 a branch's first updates would vanish in bfloat16's 8 bits.
    """

    num_heads: int
    mlp_ratio: int
    layerscale: float | None
    drop_path: float
    layout: Layout
    taps: bool
    dtype: Any
    implementation: str

    def attention(self) -> Attention:
        """The block's attention module."""
        return Attention(self.num_heads, self.dtype, self.implementation)

    def setup(self):
        """Name the parameters as the reference does."""
        self.norm1, self.norm2 = LayerNorm(self.dtype), LayerNorm(self.dtype)
        self.attn = self.attention()
        self.mlp = Mlp(self.mlp_ratio, self.dtype)
        if self.layerscale is not None:
            self.ls1 = LayerScale(self.layerscale)
            self.ls2 = LayerScale(self.layerscale)

    def __call__(self, x, rate) -> tuple[Any, Any]:
        """x: packed float32 [W,R,D] -> (the same, x or None as the stack).

        rate: this block's own drop path rate, or None where all blocks share one.
        """
        scaled, d = self.layerscale is not None, x.shape[-1]

        def attention(y, layout):
            y, affine = self.norm1(y)
            return self.attn(y, layout, affine, self.ls1(d) if scaled else None)

        def mlp(y, layout):
            del layout
            return self.mlp(*self.norm2(y), self.ls2(d) if scaled else None)

        for branch in (attention, mlp):
            x = self.residual(x, branch, rate)
        return x, (x if self.taps else None)

    def residual(self, x, branch, rate):
        """x + branch(x), with drop path."""
        layout = self.layout
        if rate is None and self.drop_path == 0:
            return x + branch(x, layout).astype(x.dtype)
        key, views = self.make_rng("drop_path"), len(layout.views)
        keys = [key] if views == 1 else jax.random.split(key, views)
        if rate is None:
            subset = random_subset(keys, layout, self.drop_path)
            update = branch(subset.of(x), subset.layout)
            return x + subset.back(update.astype(x.dtype))
        kept: list[Any] = [
            np.zeros((layout.groups, layout.rows - layout.used, 1), np.float32)
        ]
        for k, (r, t) in zip(reversed(keys), reversed(layout.views), strict=True):
            shape = (layout.groups * r, 1, 1)
            scale = jax.random.bernoulli(k, 1 - rate, shape) / (1 - rate)
            kept.insert(0, jnp.repeat(scale.reshape(layout.groups, r, 1), t, axis=1))
        update = branch(x, layout)
        return x + (update * jnp.concatenate(kept, axis=1)).astype(x.dtype)


def rematerialised(block, remat: str, *, unrolled: bool):
    """The block class with a choice of what its backward pass computes anew.

    remat: 'none' keeps all; 'matmuls' keeps enough to compute no product with a weight
    twice; 'norms' keeps the normalised inputs of both branches alone.
    Raises ValueError for another one.
    """
    saved = {"none": None, "matmuls": MATMULS, "norms": NORMS}
    if remat not in saved:
        raise ValueError(f"remat must be one of {', '.join(saved)}, not {remat!r}")
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(*saved[remat])
    if remat == "matmuls":
        policy = policies.save_from_both_policies(policy, keeps)
    # A loop keeps XLA from joining what is computed anew with the first computation.
    return nn.remat(block, policy=policy, prevent_cse=unrolled)
