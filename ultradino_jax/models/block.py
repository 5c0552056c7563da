"""The transformer block of the ViTs, on one batch of tokens or several packed together.

Behaviour follows facebookresearch/dinov2 `layers/block.py` (pre-norm, LayerScale,
batch-subset drop path, lists of crops of several sizes).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

trunc_normal = nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


def subset_residual(views, branch, keys, *, rate: float, groups: int):
    """x + branch(x) on a random subset of the rows of each group (drop path).

    views: arrays [B,T,D], B a multiple of `groups`; branch: such a tuple -> updates of
    the same shapes; keys: one for each view. Of the r = B/groups rows of a group
    exactly m = max(int(r(1-rate)),1) run through the branch, their result scaled by
    r/m; the others pass unchanged and cost nothing. Indices never leave a group, so a
    group that lives on one device needs no communication. Source: DINOv2
    `drop_add_residual_stochastic_depth`, where a group is a GPU.
    """
    grouped = [rearrange(x, "(w r) t d -> w r t d", w=groups) for x in views]
    chosen, subsets = [], []
    for x, key in zip(grouped, keys, strict=True):
        r = x.shape[1]
        m = max(int(r * (1 - rate)), 1)
        rows = jnp.argsort(jax.random.uniform(key, (groups, r)), axis=1)[:, :m]
        subset = jnp.take_along_axis(x, rows[:, :, None, None], axis=1)
        chosen.append(rows)
        subsets.append(rearrange(subset, "w m t d -> (w m) t d"))
    out = []
    for x, rows, update in zip(grouped, chosen, branch(tuple(subsets)), strict=True):
        update = update * (x.shape[1] / rows.shape[1])
        update = rearrange(update, "(w m) t d -> w m t d", w=groups).astype(x.dtype)
        x = jax.vmap(lambda a, i, u: a.at[i].add(u, unique_indices=True))(
            x, rows, update
        )
        out.append(rearrange(x, "w r t d -> (w r) t d"))
    return tuple(out)


def pack(views, groups: int):
    """Arrays [B,T,D] of W groups -> [W,R,D], a group's tokens one after the other.

    Crops of two sizes then share every matrix product: half the launches, and one
    gradient of each weight to send between devices. A single array stays as it is.
    """
    if len(views) == 1:
        return views[0]
    flat = [rearrange(x, "(w r) t d -> w (r t) d", w=groups) for x in views]
    return jnp.concatenate(flat, axis=1)


def unpack(x, shapes, groups: int):
    """The inverse of `pack` for views of these (B,T): [W,R,F] -> arrays [B,T,F]."""
    if len(shapes) == 1:
        return (x,)
    ends = np.cumsum([b * t // groups for b, t in shapes])[:-1]
    parts = jnp.split(x, ends, axis=1)
    return tuple(
        rearrange(part, "w (r t) f -> (w r) t f", t=t)
        for part, (_, t) in zip(parts, shapes, strict=True)
    )


@jax.custom_vjp
def gelu(x):
    """x Phi(x), exact, in float32 whatever x is; same shape and dtype.

    By erf as torch has it; JAX's own goes through erfc, which costs XLA several times
    as much. The backward pass keeps x alone and computes Phi(x) + x phi(x) from it.
    """
    z = x.astype(jnp.float32)
    return (0.5 * z * (1 + jax.lax.erf(z * 2**-0.5))).astype(x.dtype)


def _gelu_backward(x, cotangent):
    z = x.astype(jnp.float32)
    slope = 0.5 * (1 + jax.lax.erf(z * 2**-0.5))
    slope = slope + z * jnp.exp(-0.5 * z * z) * (2 * np.pi) ** -0.5
    return ((cotangent * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Attention(nn.Module):
    """Multi-head self-attention on [B,T,D] with a fused qkv projection."""

    num_heads: int
    dtype: Any

    def logit_bias(self) -> Any:
        """What is added to the attention logits: [A,T,T], or None for nothing."""
        return None

    @nn.compact
    def __call__(self, x, shapes=None, groups: int = 1):
        """[B,T,D] -> [B,T,D], or packed views of these `shapes` (B,T) -> the same.

        Tokens attend to those of their own row. Sows softmax maps [B,A,T,T] when asked
        to.
        """
        d = x.shape[-1]
        shapes = shapes or (x.shape[:2],)
        qkv = nn.Dense(3 * d, dtype=self.dtype, kernel_init=trunc_normal, name="qkv")(x)
        bias = self.logit_bias()
        out = []
        for part in unpack(qkv, shapes, groups):
            q, k, v = rearrange(
                part, "b t (three a e) -> three b t a e", three=3, a=self.num_heads
            )
            if self.is_mutable_collection("intermediates"):
                logits = jnp.einsum("btae,bsae->bats", q, k).astype(jnp.float32)
                logits = logits * q.shape[-1] ** -0.5
                logits = logits if bias is None else logits + bias
                self.sow("intermediates", "attention", nn.softmax(logits))
            added = None if bias is None else bias[None].astype(q.dtype)
            y = jax.nn.dot_product_attention(q, k, v, bias=added)
            out.append(rearrange(y, "b t a e -> b t (a e)"))
        x = pack(out, groups)
        return nn.Dense(d, dtype=self.dtype, kernel_init=trunc_normal, name="proj")(x)


class Mlp(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    ratio: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[B,T,D] -> [B,T,D]."""
        d = x.shape[-1]
        x = nn.Dense(
            self.ratio * d, dtype=self.dtype, kernel_init=trunc_normal, name="fc1"
        )(x)
        return nn.Dense(d, dtype=self.dtype, kernel_init=trunc_normal, name="fc2")(
            gelu(x)
        )


class LayerScale(nn.Module):
    """Per-channel gain on a residual branch."""

    start: float

    @nn.compact
    def __call__(self, x):
        """[B,T,D] -> [B,T,D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:])
        return x * gamma.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block; a scan body, hence the (carry, tap) return.

    The residual stream stays float32 whatever the compute dtype: with LayerScale at
    1e-5 a branch's first updates would vanish in bfloat16's 8 bits.
    """

    num_heads: int
    mlp_ratio: int
    layerscale: float | None
    drop_path: float
    groups: int
    taps: bool
    dtype: Any

    def attention(self) -> Attention:
        """The block's attention module."""
        return Attention(self.num_heads, self.dtype)

    def setup(self):
        """Name the parameters as the reference does."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=jnp.float32)
        self.norm1, self.norm2 = norm(), norm()
        self.attn = self.attention()
        self.mlp = Mlp(self.mlp_ratio, self.dtype)
        if self.layerscale is not None:
            self.ls1 = LayerScale(self.layerscale)
            self.ls2 = LayerScale(self.layerscale)

    def __call__(self, x, rate) -> tuple[Any, Any]:
        """x: [B,T,D] or a tuple of such views -> (the same, x or None as the stack).

        rate: this block's own drop path rate, or None where all blocks share one.
        """
        views = x if isinstance(x, tuple) else (x,)

        def attention(views):
            shapes = tuple(v.shape[:2] for v in views)
            y = self.norm1(pack(views, self.groups)).astype(self.dtype)
            y = self.attn(y, shapes, self.groups)
            y = self.ls1(y) if self.layerscale is not None else y
            return unpack(y, shapes, self.groups)

        def mlp(views):
            y = self.norm2(pack(views, self.groups)).astype(self.dtype)
            y = self.mlp(y)
            y = self.ls2(y) if self.layerscale is not None else y
            return unpack(y, tuple(v.shape[:2] for v in views), self.groups)

        for branch in (attention, mlp):
            if rate is None and self.drop_path == 0:
                updates = branch(views)
                views = tuple(
                    v + u.astype(v.dtype) for v, u in zip(views, updates, strict=True)
                )
                continue
            key = self.make_rng("drop_path")
            keys = [key] if len(views) == 1 else jax.random.split(key, len(views))
            if rate is None:
                views = subset_residual(
                    views, branch, keys, rate=self.drop_path, groups=self.groups
                )
                continue
            kept = [
                jax.random.bernoulli(k, 1 - rate, (len(v), 1, 1)) / (1 - rate)
                for k, v in zip(keys, views, strict=True)
            ]
            views = tuple(
                v + (u * scale).astype(v.dtype)
                for v, u, scale in zip(views, branch(views), kept, strict=True)
            )
        x = views if isinstance(x, tuple) else views[0]
        return x, (x if self.taps else None)
