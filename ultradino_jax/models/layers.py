"""Layers that several segmentation models share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

NORM_EPS, NORM_MOMENTUM = 1e-5, 0.1
NORMS = ("none", "batch")


def batch_norm(x, mean, var, *, train: bool, eps: float, momentum: float):
    """Batch norm of [..,C] without gain: (normalised, running mean, running var).

    mean, var: running statistics [C], used when not training. A batch is normalised by
    its biased variance; the running variance takes the unbiased one, as torch's
    (Flax's own takes the biased). On a global array the statistics are those of the
    whole batch, as SyncBatchNorm's.
    """
    if not train:
        return (x - mean) * jax.lax.rsqrt(var + eps), mean, var
    axes = tuple(range(x.ndim - 1))
    now, spread = x.mean(axes), x.var(axes)
    n, keep = x.size // x.shape[-1], 1 - momentum
    unbiased = spread * n / max(n - 1, 1)
    return (
        (x - now) * jax.lax.rsqrt(spread + eps),
        keep * mean + momentum * now,
        keep * var + momentum * unbiased,
    )


class BatchNorm(nn.Module):
    """`batch_norm` with its own statistics, bias and, by use_scale, gain."""

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
        y, mean, var = batch_norm(
            x,
            running_mean.value,
            running_var.value,
            train=train,
            eps=NORM_EPS,
            momentum=NORM_MOMENTUM,
        )
        if train and not self.is_initializing():
            running_mean.value, running_var.value = mean, var
        return y * scale + bias


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
