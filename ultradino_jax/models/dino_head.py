"""Projection head shared by the DINO and iBOT losses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultradino_jax.models.vit import trunc_normal


class Prototypes(nn.Module):
    """Weight-normalised linear layer [.., E] -> [.., K] without bias.

    The weight of prototype k is g_k v_k / ||v_k||. g starts at 1 and is trained, v
    keeps torch's Linear default U(-1/sqrt(E), 1/sqrt(E)): the reference's init pass
    runs before this layer exists.
    """

    num_prototypes: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """[.., bottleneck_dim] -> logits [.., K] in float32."""
        bound = x.shape[-1] ** -0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        v = self.param("v", uniform, (x.shape[-1], self.num_prototypes))
        g = self.param("g", nn.initializers.ones, (self.num_prototypes,))
        kernel = v * (g * jax.lax.rsqrt(jnp.sum(v * v, axis=0)))
        return jnp.matmul(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


class DINOHead(nn.Module):
    """MLP, L2 normalisation, prototypes (DINOv2 `layers/dino_head.py`)."""

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_prototypes: int = 65536
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Backbone tokens [.., D] -> logits [.., K] in float32."""
        sizes = [self.hidden_dim] * (self.num_layers - 1) + [self.bottleneck_dim]
        for i, size in enumerate(sizes):
            x = nn.Dense(
                size, dtype=self.dtype, kernel_init=trunc_normal, name=f"mlp_{i}"
            )(x)
            if i < len(sizes) - 1:
                x = nn.gelu(x, approximate=False)
        x = x.astype(jnp.float32)
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return Prototypes(self.num_prototypes, self.dtype, name="last_layer")(x)


def head_flops(head: DINOHead, embed_dim: int) -> float:
    """Floating-point operations of one token's forward pass, multiply-add = 2."""
    h, b = head.hidden_dim, head.bottleneck_dim
    hidden = (head.num_layers - 2) * h * h
    return 2.0 * (embed_dim * h + hidden + h * b + b * head.num_prototypes)
