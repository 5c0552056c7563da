"""Projection head shared by the DINO and iBOT losses."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultradino_jax.models.ops import Dense, gelu_product, product


def _column_sums(x):
    """[E,K] -> [K]. A product with ones: XLA's own sum over rows is far slower on a
    CPU, 240 of 300 ms for the recipe's prototypes."""
    return jnp.matmul(jnp.ones((1, x.shape[0])), x, precision="highest")[0]


@jax.custom_vjp
def weight_norm(v, g):
    """g_k v_k / ||v_k||, column by column: [E,K], [K] -> [E,K].

    Salimans and Kingma 2016, eq. 2; the backward pass is their eq. 3.
    """
    return _weight_norm_forward(v, g)[0]


def _weight_norm_forward(v, g):
    inverse = jax.lax.rsqrt(_column_sums(v * v))
    return v * (g * inverse), (v, g, inverse)


def _weight_norm_backward(kept, cotangent):
    v, g, inverse = kept
    dot = _column_sums(v * cotangent)
    return cotangent * (g * inverse) - v * (dot * g * inverse**3), dot * inverse


weight_norm.defvjp(_weight_norm_forward, _weight_norm_backward)


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias, given as its kernel [E,K].

    The weight of prototype k is g_k v_k / ||v_k||. g starts at 1 and is trained, v
    keeps torch's Linear default U(-1/sqrt(E), 1/sqrt(E)): the reference's init pass
    runs before this layer exists.
    """

    bottleneck_dim: int
    num_prototypes: int

    @nn.compact
    def __call__(self):
        """-> kernel float32 [E,K]."""
        bound = self.bottleneck_dim**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        v = self.param("v", uniform, (self.bottleneck_dim, self.num_prototypes))
        g = self.param("g", nn.initializers.ones, (self.num_prototypes,))
        return weight_norm(v, g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def prototype_logits(features, kernel, dtype) -> Any:
    """Unit features [..,E] times a head's kernel [E,K] -> logits [..,K], float32.

    Both operands are cast to `dtype`, in the backward pass the gradient of the logits
    too; the sums are float32.
    """
    return _prototype_logits(features, kernel, dtype)


def _prototype_logits(features, kernel, dtype):
    return jnp.matmul(
        features.astype(dtype),
        kernel.astype(dtype),
        preferred_element_type=jnp.float32,
    )


def _prototype_logits_backward(dtype, kept, g):
    features, kernel = kept
    rows, g = features.astype(dtype), g.astype(dtype)
    for_rows = jnp.matmul(g, kernel.astype(dtype).T, preferred_element_type=jnp.float32)
    rows, g = rows.reshape(-1, rows.shape[-1]), g.reshape(-1, g.shape[-1])
    for_kernel = jnp.matmul(rows.T, g, preferred_element_type=jnp.float32)
    return for_rows.astype(features.dtype), for_kernel.astype(kernel.dtype)


prototype_logits.defvjp(
    lambda features, kernel, dtype: (
        _prototype_logits(features, kernel, dtype),
        (features, kernel),
    ),
    _prototype_logits_backward,
)


class DINOHead(nn.Module):
    """MLP, L2 normalisation, prototypes (DINOv2 `layers/dino_head.py`).

    The logits of many rows do not fit into memory at once, so training asks for
    `features` and `kernel` and multiplies them in parts (`chunks.summed`).
    """

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_prototypes: int = 65536
    num_layers: int = 3
    dtype: Any = jnp.float32

    def setup(self):
        """Layers mlp_0.. and last_layer."""
        sizes = [self.hidden_dim] * (self.num_layers - 1) + [self.bottleneck_dim]
        self.mlp = [Dense(size, self.dtype) for size in sizes]
        self.last_layer = Prototypes(self.bottleneck_dim, self.num_prototypes)

    def features(self, x):
        """Backbone tokens [..,D] -> unit vectors [..,E] in float32."""
        x, bias = x.astype(self.dtype), None
        for i, layer in enumerate(self.mlp):
            kernel, next_bias = layer.weights(x.shape[-1])
            x = gelu_product(x, bias, kernel) if i else product(x, kernel)
            bias = next_bias
        x = x.astype(jnp.float32) + bias
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    def kernel(self):
        """The prototypes, float32 [E,K]."""
        return self.last_layer()

    def __call__(self, x):
        """Backbone tokens [..,D] -> logits [..,K] in float32."""
        return prototype_logits(self.features(x), self.kernel(), self.dtype)


def head_flops(head: DINOHead, embed_dim: int) -> float:
    """Floating-point operations of one token's forward pass, multiply-add = 2."""
    h, b = head.hidden_dim, head.bottleneck_dim
    hidden = (head.num_layers - 2) * h * h
    return 2.0 * (embed_dim * h + hidden + h * b + b * head.num_prototypes)
