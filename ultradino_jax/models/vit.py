"""Vision Transformer of DINOv2: one forward path for student, teacher and evaluators.

Behaviour follows facebookresearch/dinov2 `models/vision_transformer.py` (registers,
interpolated positions, mask tokens). The blocks are one scanned module, so every block
parameter carries a leading depth axis.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ultradino_jax.models.block import Block, rematerialised
from ultradino_jax.models.ops import Dense, LayerNorm, trunc_normal
from ultradino_jax.models.packing import layout_of, pack, unpack, unpack_last
from ultradino_jax.models.pos_embed import interpolate_pos_embed

# embed_dim, depth, num_heads. `tiny` is the smoke and test size, not a published model.
VARIANTS = {
    "tiny": (128, 4, 4),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@flax.struct.dataclass
class ViTOutput:
    """Tokens of one forward pass.

    cls_token [B,D], register_tokens [B,R,D] and patch_tokens [B,N,D] are final-normed;
    prenorm [B,T,D] is not. `layers` holds the taps asked for, oldest first:
    [n,B,T,D], final-normed unless the caller said otherwise, or None.
    """

    cls_token: jax.Array
    register_tokens: jax.Array
    patch_tokens: jax.Array
    prenorm: jax.Array
    layers: jax.Array | None


def image_patches(images, patch_size: int):
    """Images [B,H,W,C] -> (patches [B,N,P*P*C], their grid (H/P, W/P)).

    Raises ValueError when the image is not divisible by the patch size.
    """
    height, width = images.shape[1:3]
    p = patch_size
    if height % p or width % p:
        raise ValueError(
            f"image of {height}x{width} pixels is not divisible by patch size {p}"
        )
    patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
    return patches, (height // p, width // p)


class ViT(nn.Module):
    """DINOv2's Vision Transformer.

    Attributes:
      embed_dim, depth, num_heads, patch_size: D, number of blocks, A, P (pixels).
      image_size: side in pixels of the native position grid (N0 = (image_size/P)^2).
      num_registers: R register tokens, which get no position (Darcet et al. 2023).
      layerscale: initial LayerScale gain, None for a model without it (iBOT).
      drop_path: rate of every block when training, in batch-subset form; or a rate per
        block, each below 1: every row is computed, whole branches of a row are zeroed
        and the others scaled by 1/(1-rate). Fine-tuning lets the rate grow linearly.
      pos_offset, pos_antialias: how positions are interpolated; (0.1, False) is the
        pretraining default, (0.0, True) belongs to the published register models.
      dtype: compute dtype of the branches; parameters and residuals are float32.
      attention: 'xla', 'cudnn' or 'triton'; see `models.attention`.
      unroll: scan unroll factor. remat: 'none', 'matmuls' or 'norms'; see
        `block.rematerialised`.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int = 224
    num_registers: int = 4
    mlp_ratio: int = 4
    layerscale: float | None = 1e-5
    drop_path: float | tuple[float, ...] = 0.0
    pos_offset: float = 0.1
    pos_antialias: bool = False
    dtype: Any = jnp.float32
    attention: str = "xla"
    unroll: int = 1
    remat: str = "none"

    def _tokens(self, views, masks):
        """Images [B,H,W,C] -> tokens [B,T,D] = [CLS, registers, patches], each."""
        p, d = self.patch_size, self.embed_dim
        bound = (views[0].shape[-1] * p * p) ** -0.5  # torch's Conv2d default

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        embed = Dense(d, self.dtype, uniform, uniform, name="patch_embed")
        token_init = nn.initializers.normal(1e-6)
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, d))
        n0 = (self.image_size // p) ** 2
        pos_embed = self.param("pos_embed", trunc_normal, (1, 1 + n0, d))
        cls_token = self.param("cls_token", token_init, (1, 1, d))
        registers = jnp.zeros((1, 0, d))
        if self.num_registers:
            shape = (1, self.num_registers, d)
            registers = self.param("register_tokens", token_init, shape)
        tokens = []
        for images, mask in zip(views, masks, strict=True):
            patches, grid = image_patches(images, p)
            x = embed(patches).astype(jnp.float32)
            if mask is not None:
                x = jnp.where(mask[..., None], mask_token, x)
            first = jnp.broadcast_to(cls_token, (len(x), 1, d))
            x = jnp.concatenate([first, x], axis=1)
            x = x + interpolate_pos_embed(
                pos_embed, grid, offset=self.pos_offset, antialias=self.pos_antialias
            )
            if self.num_registers:
                shape = (len(x), self.num_registers, d)
                parts = [x[:, :1], jnp.broadcast_to(registers, shape), x[:, 1:]]
                x = jnp.concatenate(parts, axis=1)
            tokens.append(x)
        return tuple(tokens)

    @nn.compact
    def __call__(
        self,
        images: jax.Array | tuple[jax.Array, ...],
        masks: jax.Array | tuple[jax.Array | None, ...] | None = None,
        *,
        groups: int = 1,
        train: bool = False,
        layers: Sequence[int] | None = None,
        norm_layers: bool = True,
    ) -> ViTOutput | tuple[ViTOutput, ...]:
        """Run the model.

        images: [B,H,W,C], normalised. masks: bool [B,N], True where the patch is
        replaced by the mask token. groups: number of row groups for drop path.
        Tuples of both, images of several sizes, go through the blocks together (see
        `pack`) and give a tuple; then there are no `layers`.
        layers: block indices (negative from the end) whose outputs are returned.
        Needs the rng stream 'drop_path' when train and drop_path > 0.
        Raises ValueError when the image is not divisible by the patch size.
        """
        several = isinstance(images, tuple)
        tokens = self._tokens(
            images if several else (images,), masks if several else (masks,)
        )
        layout = layout_of([x.shape[:2] for x in tokens], groups)
        block = rematerialised(Block, self.remat, unrolled=self.unroll > 1)
        drop_path = self.drop_path
        per_block = not isinstance(drop_path, int | float)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "drop_path": True},
            length=self.depth,
            unroll=self.unroll,
        )(
            self.num_heads,
            self.mlp_ratio,
            self.layerscale,
            0.0 if per_block or not train else drop_path,
            layout,
            layers is not None,
            self.dtype,
            self.attention,
            name="blocks",
        )
        rates = None
        if per_block and train:
            if len(drop_path) != self.depth:
                raise ValueError(
                    f"{len(drop_path)} drop path rates for {self.depth} blocks"
                )
            rates = jnp.asarray(drop_path, jnp.float32)
        x, taps = blocks(pack(tokens, layout), rates)
        final_norm = LayerNorm(jnp.float32, name="norm")

        def norm(x):
            normalised, (scale, bias) = final_norm(x)
            return jnp.asarray(normalised) * scale + bias

        if layers is not None:
            taps = unpack_last(taps[np.asarray(layers)], layout)
            taps = norm(taps) if norm_layers else taps
        first = 1 + self.num_registers

        def output(prenorm):
            x = norm(prenorm)
            return ViTOutput(x[:, 0], x[:, 1:first], x[:, first:], prenorm, taps)

        outputs = tuple(map(output, unpack(x, layout)))
        return outputs if several else outputs[0]


def build_vit(variant: str, **overrides) -> ViT:
    """ViT of a named size: 'tiny', 'small', 'base' or 'large'.

    Raises ValueError naming the choices when the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(
            f"unknown ViT variant {variant!r}; choose one of {', '.join(VARIANTS)}"
        )
    embed_dim, depth, num_heads = VARIANTS[variant]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return ViT(**{**sizes, **overrides})


def forward_flops(model: ViT, tokens: int, channels: int, kept: float = 1.0) -> float:
    """Floating-point operations of one image's forward pass, multiply-add = 2.

    tokens: T. kept: fraction of rows that run each residual branch (drop path).
    """
    d, t, patches = model.embed_dim, tokens, tokens - 1 - model.num_registers
    block = (8 + 4 * model.mlp_ratio) * d * d * t + 4 * t * t * d
    embed = 2 * model.patch_size**2 * channels * d * patches
    return kept * model.depth * block + embed
