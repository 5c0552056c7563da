"""Vision Transformer of DINOv2: one forward path for student, teacher and evaluators.

Behaviour follows facebookresearch/dinov2 `models/vision_transformer.py` (pre-norm
blocks, LayerScale, registers, interpolated positions, batch-subset drop path). The
blocks are one scanned module, so every block parameter carries a leading depth axis.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ultradino_jax.models.pos_embed import interpolate_pos_embed

# embed_dim, depth, num_heads. `tiny` is the smoke and test size, not a published model.
VARIANTS = {
    "tiny": (128, 4, 4),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

trunc_normal = nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


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


def subset_residual(x, branch, key, *, rate: float, groups: int):
    """x + branch(x) on a random subset of the rows of each group (drop path).

    x: [B,T,D], B a multiple of `groups`. Of the r = B/groups rows of a group exactly
    m = max(int(r(1-rate)),1) run through the branch, their result scaled by r/m; the
    others pass unchanged and cost nothing. Indices never leave a group, so a group
    that lives on one device needs no communication. Source: DINOv2
    `drop_add_residual_stochastic_depth`, where a group is a GPU.
    """
    x = rearrange(x, "(w r) t d -> w r t d", w=groups)
    r = x.shape[1]
    m = max(int(r * (1 - rate)), 1)
    rows = jnp.argsort(jax.random.uniform(key, (groups, r)), axis=1)[:, :m]
    subset = jnp.take_along_axis(x, rows[:, :, None, None], axis=1)
    update = branch(rearrange(subset, "w m t d -> (w m) t d")) * (r / m)
    update = rearrange(update, "(w m) t d -> w m t d", w=groups).astype(x.dtype)
    x = jax.vmap(lambda a, i, u: a.at[i].add(u, unique_indices=True))(x, rows, update)
    return rearrange(x, "w r t d -> (w r) t d")


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
    def __call__(self, x):
        """[B,T,D] -> [B,T,D]. Sows softmax maps [B,A,T,T] when asked to."""
        d = x.shape[-1]
        qkv = nn.Dense(3 * d, dtype=self.dtype, kernel_init=trunc_normal, name="qkv")(x)
        q, k, v = rearrange(
            qkv, "b t (three a e) -> three b t a e", three=3, a=self.num_heads
        )
        bias = self.logit_bias()
        if self.is_mutable_collection("intermediates"):
            logits = jnp.einsum("btae,bsae->bats", q, k).astype(jnp.float32)
            logits = logits * q.shape[-1] ** -0.5
            logits = logits if bias is None else logits + bias
            self.sow("intermediates", "attention", nn.softmax(logits))
        bias = None if bias is None else bias[None].astype(q.dtype)
        x = jax.nn.dot_product_attention(q, k, v, bias=bias)
        x = rearrange(x, "b t a e -> b t (a e)")
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

    init: float

    @nn.compact
    def __call__(self, x):
        """[B,T,D] -> [B,T,D]."""
        gamma = self.param("gamma", nn.initializers.constant(self.init), x.shape[-1:])
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
        norm = dict(epsilon=1e-6, dtype=jnp.float32)
        self.norm1, self.norm2 = nn.LayerNorm(**norm), nn.LayerNorm(**norm)
        self.attn = self.attention()
        self.mlp = Mlp(self.mlp_ratio, self.dtype)
        if self.layerscale is not None:
            self.ls1 = LayerScale(self.layerscale)
            self.ls2 = LayerScale(self.layerscale)

    def __call__(self, x, rate):
        """x [B,T,D] -> (x [B,T,D], x or None as the scan's stacked output).

        rate: this block's own drop path rate, or None where all blocks share one.
        """

        def attention(y):
            y = self.attn(self.norm1(y).astype(self.dtype))
            return self.ls1(y) if self.layerscale is not None else y

        def mlp(y):
            y = self.mlp(self.norm2(y).astype(self.dtype))
            return self.ls2(y) if self.layerscale is not None else y

        for branch in (attention, mlp):
            if rate is not None:
                key = self.make_rng("drop_path")
                kept = jax.random.bernoulli(key, 1 - rate, (len(x), 1, 1))
                x = x + (branch(x) * (kept / (1 - rate))).astype(x.dtype)
            elif self.drop_path > 0:
                key = self.make_rng("drop_path")
                x = subset_residual(
                    x, branch, key, rate=self.drop_path, groups=self.groups
                )
            else:
                x = x + branch(x).astype(x.dtype)
        return x, (x if self.taps else None)


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
      unroll: scan unroll factor. remat: 'none', 'dots' (keep weight matmuls), 'full'.
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
    unroll: int = 1
    remat: str = "none"

    def _tokens(self, images, masks):
        """Images [B,H,W,C] -> tokens [B,T,D] = [CLS, registers, patches]."""
        (b, *_, c), p = images.shape, self.patch_size
        patches, grid = image_patches(images, p)
        bound = (c * p * p) ** -0.5  # torch's Conv2d default, weight and bias alike

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        x = nn.Dense(
            self.embed_dim,
            dtype=self.dtype,
            kernel_init=uniform,
            bias_init=uniform,
            name="patch_embed",
        )(patches.astype(self.dtype)).astype(jnp.float32)
        token_init = nn.initializers.normal(1e-6)
        d = self.embed_dim
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, d))
        if masks is not None:
            x = jnp.where(masks[..., None], mask_token, x)
        n0 = (self.image_size // p) ** 2
        pos_embed = self.param("pos_embed", trunc_normal, (1, 1 + n0, d))
        cls_token = self.param("cls_token", token_init, (1, 1, d))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (b, 1, d)), x], axis=1)
        x = x + interpolate_pos_embed(
            pos_embed, grid, offset=self.pos_offset, antialias=self.pos_antialias
        )
        if self.num_registers:
            shape = (1, self.num_registers, d)
            registers = self.param("register_tokens", token_init, shape)
            registers = jnp.broadcast_to(registers, (b, *shape[1:]))
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        masks: jax.Array | None = None,
        *,
        groups: int = 1,
        train: bool = False,
        layers: Sequence[int] | None = None,
        norm_layers: bool = True,
    ) -> ViTOutput:
        """Run the model.

        images: [B,H,W,C], normalised. masks: bool [B,N], True where the patch is
        replaced by the mask token. groups: number of row groups for drop path.
        layers: block indices (negative from the end) whose outputs are returned.
        Needs the rng stream 'drop_path' when train and drop_path > 0.
        Raises ValueError when the image is not divisible by the patch size.
        """
        x = self._tokens(images, masks)
        block = Block
        if self.remat != "none":
            policy = {
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
                "full": jax.checkpoint_policies.nothing_saveable,
            }[self.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        per_block = not isinstance(self.drop_path, int | float)
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
            0.0 if per_block or not train else self.drop_path,
            groups,
            layers is not None,
            self.dtype,
            name="blocks",
        )
        rates = None
        if per_block and train:
            if len(self.drop_path) != self.depth:
                raise ValueError(
                    f"{len(self.drop_path)} drop path rates for {self.depth} blocks"
                )
            rates = jnp.asarray(self.drop_path, jnp.float32)
        prenorm, taps = blocks(x, rates)
        norm = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")
        x = norm(prenorm)
        if layers is not None:
            taps = taps[np.asarray(layers)]
            taps = norm(taps) if norm_layers else taps
        first = 1 + self.num_registers
        return ViTOutput(x[:, 0], x[:, 1:first], x[:, first:], prenorm, taps)


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
