"""Layers that several segmentation models share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1
NORMS = ("none", "batch")


def batch_norm(x, mean, var, *, train: bool, eps: float, momentum=NORM_MOMENTUM):
    """Batch norm of [..,C] over all but the last axis, with torch's bookkeeping.

    mean, var [C]: the running statistics. Returns (normalised, mean, var), these two
    changed when training. A batch is normalised by its biased variance; the running
    variance takes the unbiased one (Flax's own takes the biased). On a global array the
    statistics are those of the whole batch, as SyncBatchNorm's.
    """
    used_mean, used_var = mean, var
    if train:
        axes = tuple(range(x.ndim - 1))
        used_mean, used_var = x.mean(axes), x.var(axes)
        n, keep = x.size // x.shape[-1], 1 - momentum
        mean = keep * mean + momentum * used_mean
        var = keep * var + momentum * (used_var * n / max(n - 1, 1))
    return (x - used_mean) * jax.lax.rsqrt(used_var + eps), mean, var


class BatchNorm(nn.Module):
    """`batch_norm` with a bias; use_scale: whether there is a gain."""

    use_scale: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        """[..,C] -> [..,C]; updates the collection 'batch_stats' when training."""
        d = x.shape[-1]
        scale = 1.0
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (d,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (d,))
        before = running_mean.value, running_var.value
        x, mean, var = batch_norm(x, *before, train=train, eps=NORM_EPS)
        if train and not self.is_initializing():
            running_mean.value, running_var.value = mean, var
        return x * scale + bias


class Upsample(nn.Module):
    """Transposed 2x2 convolution of stride 2: every pixel becomes a 2x2 block.

    features: channels out, None for as many as come in. init: of the [D,4 features]
    kernel, with a bias of zero; by default both as torch's ConvTranspose2d.
    """

    features: int | None = None
    use_bias: bool = True
    init: Any = None

    @nn.compact
    def __call__(self, x):
        """[B,h,w,D] -> [B,2h,2w,features]."""
        d, e = x.shape[-1], self.features or x.shape[-1]
        bound = (4 * e) ** -0.5

        def uniform(key, shape):
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        def matrix(key, shape):
            return self.init(key, (d, 4 * e)).reshape(shape)

        kernel = self.param("kernel", matrix if self.init else uniform, (d, 2, 2, e))
        y = jnp.einsum("bhwd,dpqe->bhpwqe", x, kernel)
        y = rearrange(y, "b h p w q e -> b (h p) (w q) e")
        if not self.use_bias:
            return y
        zeros = nn.initializers.zeros
        return y + self.param("bias", zeros if self.init else uniform, (e,))
