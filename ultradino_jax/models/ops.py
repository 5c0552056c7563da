"""Operations of the transformer with a backward pass of their own.

Each is exact in float32. What they keep for the backward pass is named, so that `remat`
can choose among it (`block.SAVED`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

trunc_normal = nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


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


@jax.custom_vjp
def product(x, kernel):
    """[..,D] times float32 [D,F] in x's dtype -> [..,F].

    The kernel's gradient is summed and stays in float32, also between devices: autodiff
    would round it to x's dtype first.
    """
    return jnp.matmul(x, kernel.astype(x.dtype))


def _product_forward(x, kernel):
    kernel = kernel.astype(x.dtype)
    return jnp.matmul(x, kernel), (x, kernel)


def _product_backward(kept, g):
    x, kernel = kept
    rows, g_rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    for_kernel = jnp.matmul(rows.T, g_rows, preferred_element_type=jnp.float32)
    return jnp.matmul(g, kernel.T), for_kernel


product.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
    """Linear layer in `dtype` with float32 parameters and gradients."""

    features: int
    dtype: Any
    kernel_init: Any = trunc_normal
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x, gain=None):
        """[..,D] -> [..,features].

        gain [features]: the result is multiplied by it (LayerScale). It goes into the
        weights, so that no array of the result's size is needed for its gradient.
        """
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", self.bias_init, shape[1:])
        if gain is not None:
            kernel, bias = kernel * gain, bias * gain
        return product(x.astype(self.dtype), kernel) + bias.astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, dtype, epsilon):
    """(x - mean)/sqrt(var + epsilon) scale + bias over the last axis of float32 [..,D].

    Returns `dtype`. The backward pass keeps the normalised x in `dtype` and 1/sqrt(..),
    not x: with bfloat16 that is one rounding more, for half the memory.
    """
    return _layer_norm_forward(x, scale, bias, dtype, epsilon)[0]


def _layer_norm_forward(x, scale, bias, dtype, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    var = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(var + epsilon), "norm_inverse")
    normalised = checkpoint_name((centred * inverse).astype(dtype), "normalised")
    y = (normalised.astype(jnp.float32) * scale + bias).astype(dtype)
    return y, (normalised, inverse, scale)


def _layer_norm_backward(dtype, epsilon, kept, g):
    del dtype, epsilon
    normalised, inverse, scale = kept
    g, normalised = g.astype(jnp.float32), normalised.astype(jnp.float32)
    h = g * scale
    along = (h * normalised).mean(axis=-1, keepdims=True)
    for_x = inverse * (h - h.mean(axis=-1, keepdims=True) - normalised * along)
    axes = tuple(range(g.ndim - 1))
    return for_x, (g * normalised).sum(axes), g.sum(axes)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters; statistics in float32."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        """float32 [..,D] -> [..,D] in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, scale, bias, self.dtype, self.epsilon)
