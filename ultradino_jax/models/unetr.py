"""UNETR (Hatamizadeh et al., WACV 2022; arXiv:2103.10504) in two dimensions.

A Vision Transformer without class token reads patches of 16 x 16 pixels; its states
z3, z6, z9 and z12 (equation 5 and figure 2 of the paper) feed a convolutional decoder
that doubles the resolution four times. Blocks are residual with instance norm and leaky
ReLU, the queries, keys and values have no bias and the last state is normed, as in the
authors' release (MONAI). That release taps z4, z7 and z10, counting from zero; here the
paper's z3, z6 and z9 are the default (of 12 blocks).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.models.block import Mlp
from ultradino_jax.models.layers import Upsample
from ultradino_jax.models.ops import trunc_normal
from ultradino_jax.models.unet import pad_to_multiple

PATCH = 16
NORM_EPS = 1e-5
# torch's default of a convolution: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def default_states(depth: int) -> tuple[int, ...]:
    """The paper's 3, 6 and 9 of 12 blocks, and the same shares of another depth."""
    return tuple(max(round(depth * k / 4), 1) for k in (1, 2, 3))


def instance_norm(x):
    """[B,h,w,D] with zero mean and unit variance over h and w; nothing is learnt."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    var = x.var(axis=(1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + NORM_EPS)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block; a scan body, hence the (carry, tap) return."""

    num_heads: int

    @nn.compact
    def __call__(self, x, _):
        """[B,N,D] -> ([B,N,D], the same as the scan's stacked output)."""
        d = x.shape[-1]
        y = nn.LayerNorm(epsilon=NORM_EPS, name="norm1")(x)
        qkv = nn.Dense(3 * d, use_bias=False, kernel_init=trunc_normal, name="qkv")(y)
        q, k, v = rearrange(
            qkv, "b n (three a e) -> three b n a e", three=3, a=self.num_heads
        )
        y = rearrange(jax.nn.dot_product_attention(q, k, v), "b n a e -> b n (a e)")
        x = x + nn.Dense(d, kernel_init=trunc_normal, name="proj")(y)
        y = nn.LayerNorm(epsilon=NORM_EPS, name="norm2")(x)
        x = x + Mlp(4, jnp.float32, name="mlp")(y)
        return x, x


class ResBlock(nn.Module):
    """Two 3x3 convolutions with instance norm around a shortcut, leaky ReLU."""

    features: int

    def setup(self):
        """Name the convolutions; the shortcut's exists where the width changes."""

        def conv(side):
            return nn.Conv(
                self.features,
                (side, side),
                use_bias=False,
                kernel_init=torch_uniform,
            )

        self.conv1, self.conv2, self.shortcut = conv(3), conv(3), conv(1)

    def __call__(self, x):
        """[B,h,w,D] -> [B,h,w,features]."""
        y = nn.leaky_relu(instance_norm(self.conv1(x)), 0.01)
        y = instance_norm(self.conv2(y))
        if x.shape[-1] != self.features:
            x = instance_norm(self.shortcut(x))
        return nn.leaky_relu(y + x, 0.01)


class UNETR(nn.Module):
    """The network.

    image_size: side in pixels of the native position grid; positions are interpolated
    for others. width: channels of the finest decoder level (16 in the release).
    embed_dim, depth, num_heads: D, blocks and A of the encoder, ViT-B's in the paper.
    taps: which three states (1 is the first block's) feed the decoder beside the last
    one; None for `default_states`.
    """

    num_classes: int
    image_size: int = 224
    width: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    taps: tuple[int, ...] | None = None

    def _encode(self, images, taps):
        """[B,H,W,C] -> states 3 x [B,h,w,D] of the taps and the normed last one."""
        grid = tuple(n // PATCH for n in images.shape[1:3])
        patches = rearrange(
            images, "b (h p) (w q) c -> b (h w) (p q c)", p=PATCH, q=PATCH
        )
        x = nn.Dense(self.embed_dim, kernel_init=torch_uniform, name="patch_embed")(
            patches
        )
        native = -(-self.image_size // PATCH)
        shape = (1, native, native, self.embed_dim)
        pos_embed = self.param("pos_embed", trunc_normal, shape)
        if grid != (native, native):
            pos_embed = jax.image.resize(
                pos_embed, (1, *grid, self.embed_dim), "bicubic", antialias=False
            )
        x = x + rearrange(pos_embed, "1 h w d -> 1 (h w) d")
        blocks = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )(self.num_heads, name="blocks")
        x, states = blocks(x, None)
        last = nn.LayerNorm(epsilon=NORM_EPS, name="norm")(x)
        return [
            rearrange(z, "b (h w) d -> b h w d", h=grid[0])
            for z in (*(states[i - 1] for i in taps), last)
        ]

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Normalised images [B,H,W,C] of any size -> logits [B,H,W,Y].

        Nothing in it depends on `train`. Raises ValueError for taps that are no block.
        """
        taps = self.taps or default_states(self.depth)
        if len(taps) != 3 or not all(1 <= i <= self.depth for i in taps):
            raise ValueError(
                f"UNETR needs three taps from 1 to {self.depth}, got {taps}"
            )
        height, width = images.shape[1:3]
        x = pad_to_multiple(images, PATCH)
        *states, last = self._encode(x, taps)

        def upsample(features, name):
            return Upsample(features, use_bias=False, init=torch_uniform, name=name)

        skips = [ResBlock(self.width, name="skip0")(x)]
        # z3 rises three times, z6 twice, z9 once: to 8, 4 and 2 times the grid.
        for level, z in enumerate(states, start=1):
            features = self.width * 2**level
            z = upsample(features, f"skip{level}_up0")(z)
            for i in range(1, 4 - level):
                z = upsample(features, f"skip{level}_up{i}")(z)
                z = ResBlock(features, name=f"skip{level}_block{i}")(z)
            skips.append(z)
        x = last
        for level in (3, 2, 1, 0):
            features = self.width * 2**level
            x = upsample(features, f"up{level}")(x)
            x = jnp.concatenate([x, skips[level]], axis=-1)
            x = ResBlock(features, name=f"block{level}")(x)
        logits = nn.Conv(
            self.num_classes, (1, 1), kernel_init=torch_uniform, name="classifier"
        )(x)
        return logits[:, :height, :width]
