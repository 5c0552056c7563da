"""Operations of the transformer with a backward pass of their own.

Each is exact in float32. What they keep for the backward pass is named, so that `remat`
can choose among it (`block.rematerialised`).
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
    return jnp.matmul(g, kernel.T), _over_rows(x, g)


def _over_rows(x, g):
    """Gradient of a kernel: [..,D], [..,F] -> float32 [D,F]."""
    x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return jnp.matmul(x.T, g, preferred_element_type=jnp.float32)


product.defvjp(_product_forward, _product_backward)


def _gelu(x, bias):
    """x + bias = z float32, and Phi(z). By erf, as torch has it; JAX's own goes through
    erfc, which costs XLA several times as much."""
    z = x.astype(jnp.float32) + bias
    return z, 0.5 * (1 + jax.lax.erf(z * 2**-0.5))


@jax.custom_vjp
def gelu_product(x, bias, kernel):
    """gelu(x + bias) times the kernel: [..,F], [F], [F,D] -> [..,D] in x's dtype.

    gelu(z) = z Phi(z), exact, in float32 whatever the dtype. The backward pass keeps x
    alone and makes gelu(z) and its slope Phi(z) + z phi(z) in one go.
    """
    return _gelu_product_forward(x, bias, kernel)[0]


def _gelu_product_forward(x, bias, kernel):
    kernel = kernel.astype(x.dtype)
    z, phi = _gelu(x, bias)
    return jnp.matmul((z * phi).astype(x.dtype), kernel), (x, bias, kernel)


def _gelu_product_backward(kept, g):
    x, bias, kernel = kept
    z, phi = _gelu(x, bias)
    slope = phi + z * jnp.exp(-0.5 * z * z) * (2 * np.pi) ** -0.5
    for_z = jnp.matmul(g, kernel.T).astype(jnp.float32) * slope
    for_bias = for_z.sum(tuple(range(x.ndim - 1)))
    return for_z.astype(x.dtype), for_bias, _over_rows((z * phi).astype(x.dtype), g)


gelu_product.defvjp(_gelu_product_forward, _gelu_product_backward)


class Dense(nn.Module):
    """Linear layer in `dtype` with float32 parameters and gradients."""

    features: int
    dtype: Any
    kernel_init: Any = trunc_normal
    bias_init: Any = nn.initializers.zeros

    def __call__(self, x, affine=None, gain=None):
        """[..,D] -> [..,features]; `weights` says what the others are."""
        kernel, bias = self.weights(x.shape[-1], affine, gain)
        return product(x.astype(self.dtype), kernel) + bias.astype(self.dtype)

    @nn.compact
    def weights(self, inputs: int, affine=None, gain=None):
        """(kernel [inputs,features], bias [features]), float32.

        affine: (scale, bias) [inputs] of a norm before it; gain [features]: of a
        LayerScale after it. Both are put into the weights, so that no array of the
        activations' size is made for them, nor for their gradients.
        """
        kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        if affine is not None:
            scale, shift = affine
            bias = bias + jnp.matmul(shift, kernel, precision="highest")
            kernel = scale[:, None] * kernel
        if gain is not None:
            kernel, bias = kernel * gain, bias * gain
        return kernel, bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(x, dtype, epsilon: float):
    """(x - mean)/sqrt(var + epsilon) over the last axis of float32 [..,D], in `dtype`.

    The backward pass keeps this and 1/sqrt(..), not x: with bfloat16 that is half the
    memory, and one rounding more.
    """
    return _normalise_forward(x, dtype, epsilon)[0]


def _normalise_forward(x, dtype, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    var = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(var + epsilon), "norm_inverse")
    normalised = checkpoint_name((centred * inverse).astype(dtype), "normalised")
    return normalised, (normalised, inverse)


def _normalise_backward(dtype, epsilon, kept, g):
    del dtype, epsilon
    normalised, inverse = kept
    g, normalised = g.astype(jnp.float32), normalised.astype(jnp.float32)
    along = (g * normalised).mean(axis=-1, keepdims=True)
    return (inverse * (g - g.mean(axis=-1, keepdims=True) - normalised * along),)


normalise.defvjp(_normalise_forward, _normalise_backward)


class LayerNorm(nn.Module):
    """LayerNorm in two parts: what it does to each row, and its parameters."""

    dtype: Any
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        """float32 [..,D] -> (normalised [..,D] in `dtype`, (scale, bias) [D]).

        The norm's result is normalised * scale + bias; `Dense` takes the pair as it is.
        """
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalise(x, self.dtype, self.epsilon), (scale, bias)
