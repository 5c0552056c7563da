"""USFM's ViT: BEiT blocks with a relative-position bias, no absolute positions.

Behaviour follows openmedlab/USFM `usdsgen/modules/backbone/vision_transformer.py`:
pre-norm blocks with LayerScale, a learned bias on the attention logits that depends on
the offset between two patches only, no final norm, and the mean of the patch tokens as
the image's representation. Every block owns a bias table, as in USFM's fine-tuning; the
published weights share one, and copying it to every block computes the same.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from scipy.interpolate import make_interp_spline

from ultradino_jax.models.block import Attention, Block
from ultradino_jax.models.ops import Dense, trunc_normal
from ultradino_jax.models.packing import layout_of, pack, unpack, unpack_last
from ultradino_jax.models.vit import ViTOutput, image_patches


def relative_position_index(grid: tuple[int, int]) -> np.ndarray:
    """Rows of the bias table for (query, key): int [1+N,1+N], N = h*w, CLS first.

    Of the (2h-1)(2w-1)+3 rows the last three serve CLS -> patches, patches -> CLS and
    CLS -> CLS; the others an offset (dy, dx) each. Source: BEiT `gen_relative...index`.
    """
    h, w = grid
    rows, cols = (x.ravel() for x in np.indices(grid))
    dy = rows[:, None] - rows[None] + h - 1
    dx = cols[:, None] - cols[None] + w - 1
    offsets = (2 * h - 1) * (2 * w - 1)
    index = np.empty((1 + h * w, 1 + h * w), np.int64)
    index[1:, 1:] = dy * (2 * w - 1) + dx
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def _source_axis(window: int, target: int) -> np.ndarray:
    """Offsets, in patches of the target, at which the source's entries are placed.

    A geometric progression: entries stay dense around offset 0, and the outermost lands
    at the target's outermost. Source: BEiT `run_class_finetuning.py`.
    """
    low, high, ratio = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (window - 1)) / (1 - ratio)
        low, high = (low, ratio) if reach > target - 1 else (ratio, high)
    positive = np.cumsum(ratio ** np.arange(window - 1))
    return np.concatenate([-positive[::-1], [0.0], positive])


def table_resize_matrix(window: int, target: int) -> np.ndarray:
    """Weights [2*target-1, 2*window-1] of one axis of the bias table's resize.

    Cubic spline through the source's entries. The official loader swaps the two axes of
    its result and returns NaN where rounding puts the last offset outside the source's
    range (14 -> 16, 21, 24, ..); here axes stay and the range is clamped.
    """
    if window == target:
        return np.eye(2 * window - 1, dtype=np.float32)
    if window == 1:
        return np.ones((2 * target - 1, 1), np.float32)
    source = _source_axis(window, target)
    wanted = np.arange(2 * target - 1, dtype=float) - (target - 1)
    degree = min(3, len(source) - 1)
    spline = make_interp_spline(source, np.eye(len(source)), k=degree)
    return spline(np.clip(wanted, source[0], source[-1])).astype(np.float32)


def resize_table(table, window: tuple[int, int], grid: tuple[int, int]):
    """Bias table of a window of patches -> that of another grid.

    [(2h-1)(2w-1)+3, A] for `window` [h,w] -> the same for `grid`. The three rows of the
    class token are kept.
    """
    if window == grid:
        return table
    offsets, extra = table[:-3], table[-3:]
    rows, cols = (
        table_resize_matrix(*sizes) for sizes in zip(window, grid, strict=True)
    )
    offsets = rearrange(offsets, "(y x) a -> y x a", y=2 * window[0] - 1)
    offsets = jnp.einsum("iy,jx,yxa->ija", rows, cols, offsets, precision="highest")
    return jnp.concatenate([rearrange(offsets, "i j a -> (i j) a"), extra])


def relative_bias(table, window: tuple[int, int], grid: tuple[int, int]):
    """Table of a window -> bias on the logits [A,1+N,1+N] for a grid [h,w], N = h*w."""
    table = resize_table(table, window, grid)
    return rearrange(table[relative_position_index(grid)], "q k a -> a q k")


class RelativeAttention(Attention):
    """Self-attention on [B,T,D] whose logits get the relative-position bias.

    window: grid [h,w] the table was trained for. grid: the one of these tokens. The
    original has no key bias, which softmax could not see; here it is zero.
    """

    window: tuple[int, int]
    grid: tuple[int, int]

    def logit_bias(self):
        """[A,T,T] of these tokens' grid."""
        h, w = self.window
        entries = (2 * h - 1) * (2 * w - 1) + 3
        shape = (entries, self.num_heads)
        table = self.param("rel_pos_table", nn.initializers.zeros, shape)
        return relative_bias(table, self.window, self.grid)


class RelativeBlock(Block):
    """A ViT block with that attention."""

    window: tuple[int, int]
    grid: tuple[int, int]

    def attention(self) -> RelativeAttention:
        """The block's attention module."""
        return RelativeAttention(
            self.num_heads, self.dtype, self.implementation, self.window, self.grid
        )


class USFM(nn.Module):
    """USFM's backbone, called and read like `ViT`.

    Attributes:
      embed_dim, depth, num_heads, patch_size: D, number of blocks, A, P (pixels).
      image_size: side in pixels of the window that the bias tables belong to; other
        sizes use resized tables.
      layerscale: initial LayerScale gain. drop_path: as in `ViT`.
      dtype: compute dtype of the branches; parameters and residuals are float32.
      num_registers: 0, for code that cuts tokens.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: int = 4
    layerscale: float = 0.1
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    unroll: int = 1
    num_registers: int = 0

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        masks: None = None,
        *,
        groups: int = 1,
        train: bool = False,
        layers: Sequence[int] | None = None,
        norm_layers: bool = True,
    ) -> ViTOutput:
        """Run the model on images [B,H,W,C], normalised.

        Returns a ViTOutput whose `cls_token` [B,D] is the MEAN OF THE PATCH TOKENS, the
        representation this model was built for; there is no final norm, so tokens and
        the taps asked for with `layers` are the residual stream whatever `norm_layers`
        says. Taps [n,B,1+N,D] start with the class token itself and were computed with
        the position bias (the UltraDINO code leaves it out of its probe features).
        Raises ValueError when the image is not divisible by the patch size, or when
        masks are given: the published weights have no use for them.
        """
        if masks is not None:
            raise ValueError("USFM takes no masks: it is not pretrained here")
        b, d = len(images), self.embed_dim
        patches, grid = image_patches(images, self.patch_size)
        x = Dense(d, self.dtype, name="patch_embed")(patches).astype(jnp.float32)
        cls_token = self.param("cls_token", trunc_normal, (1, 1, d))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (b, 1, d)), x], axis=1)
        side = self.image_size // self.patch_size
        layout = layout_of([(b, x.shape[1])], groups)
        blocks = nn.scan(
            RelativeBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "drop_path": True},
            length=self.depth,
            unroll=self.unroll,
        )(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            layerscale=self.layerscale,
            drop_path=self.drop_path if train else 0.0,
            layout=layout,
            taps=layers is not None,
            dtype=self.dtype,
            implementation="xla",  # the others know no bias
            window=(side, side),
            grid=grid,
            name="blocks",
        )
        x, taps = blocks(pack([x], layout), None)
        [x] = unpack(x, layout)
        if layers is not None:
            taps = unpack_last(taps[np.asarray(layers)], layout)
        return ViTOutput(x[:, 1:].mean(axis=1), x[:, 1:1], x[:, 1:], x, taps)
