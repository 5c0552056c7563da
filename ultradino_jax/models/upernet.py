"""UperNet (Xiao et al. 2018) on the patch tokens of a Vision Transformer.

Behaviour follows the paper's segmentation code, which is mmsegmentation's UPerHead
without normalisation layers behind four taps of the backbone: four scales made by
transposed convolutions and pooling, pyramid pooling on the coarsest, a feature pyramid,
fusion at the finest. There is no auxiliary head.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from ultradino_jax.models.layers import NORMS, BatchNorm, Upsample

POOL_SCALES = (1, 2, 3, 6)

kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def resize(x, height: int, width: int):
    """Bilinear [B,h,w,C] -> [B,height,width,C]; pixel centres, no antialiasing."""
    shape = (x.shape[0], height, width, x.shape[3])
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def pooling_matrix(size: int, out: int) -> np.ndarray:
    """Weights [out,size] of adaptive average pooling along one axis.

    Cell i averages floor(i size/out) .. ceil((i+1) size/out) - 1, as torch does: cells
    overlap where the division leaves a rest.
    """
    weights = np.zeros((out, size), np.float32)
    for i in range(out):
        start, end = i * size // out, -(-(i + 1) * size // out)
        weights[i, start:end] = 1 / (end - start)
    return weights


class Neck(nn.Module):
    """Four maps of one resolution -> x4, x2, x1 and half of it."""

    @nn.compact
    def __call__(self, taps, train: bool):
        """Maps 4 x [B,h,w,D] -> [B,4h,4w,D], [B,2h,2w,D], [B,h,w,D], [B,h/2,w/2,D]."""
        x = Upsample(name="up1a")(taps[0])
        x = nn.gelu(BatchNorm(name="norm")(x, train), approximate=False)
        finest = Upsample(name="up1b")(x)
        coarsest = nn.max_pool(taps[3], (2, 2), strides=(2, 2))
        return finest, Upsample(name="up2")(taps[1]), taps[2], coarsest


class ConvReLU(nn.Module):
    """Convolution of `side` x `side`, an optional batch norm, ReLU."""

    features: int
    side: int
    norm: str

    @nn.compact
    def __call__(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,features]."""
        side = (self.side, self.side)
        x = nn.Conv(self.features, side, kernel_init=kaiming, name="conv")(x)
        if self.norm == "batch":
            x = BatchNorm(name="norm")(x, train)
        return nn.relu(x)


class UPerHead(nn.Module):
    """Maps of four scales -> logits at the resolution of the finest.

    channels: width of the head. dropout: rate at which whole channels are dropped
    before the classifier. norm: 'none' (the reference) or 'batch'.
    """

    num_classes: int
    channels: int
    dropout: float = 0.1
    norm: str = "none"

    def setup(self):
        """Name the layers by what they do."""
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: choose one of {', '.join(NORMS)}")

        def conv(side):
            return ConvReLU(self.channels, side, self.norm)

        self.pool = [conv(1) for _ in POOL_SCALES]
        self.bottleneck = conv(3)
        self.lateral = [conv(1) for _ in range(3)]
        self.fpn = [conv(3) for _ in range(3)]
        self.fusion = conv(3)
        self.drop = nn.Dropout(self.dropout, broadcast_dims=(1, 2))
        self.classifier = nn.Conv(
            self.num_classes, (1, 1), kernel_init=nn.initializers.normal(0.01)
        )

    def pyramid_pooling(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,channels]: context of the whole image at every pixel."""
        height, width = x.shape[1:3]
        maps = [x]
        for scale, conv in zip(POOL_SCALES, self.pool, strict=True):
            rows, columns = (pooling_matrix(n, scale) for n in (height, width))
            pooled = jnp.einsum("ih,jw,bhwd->bijd", rows, columns, x)
            maps.append(resize(conv(pooled, train), height, width))
        return self.bottleneck(jnp.concatenate(maps, axis=-1), train)

    def features(self, levels, train: bool):
        """Four maps, finest first -> the fused map [B,h1,w1,channels]."""
        laterals = [
            conv(x, train) for conv, x in zip(self.lateral, levels[:3], strict=True)
        ]
        laterals.append(self.pyramid_pooling(levels[3], train))
        for i in (2, 1, 0):
            below = resize(laterals[i + 1], *laterals[i].shape[1:3])
            laterals[i] = laterals[i] + below
        maps = [conv(x, train) for conv, x in zip(self.fpn, laterals[:3], strict=True)]
        maps.append(laterals[3])
        size = maps[0].shape[1:3]
        maps = [maps[0], *(resize(x, *size) for x in maps[1:])]
        return self.fusion(jnp.concatenate(maps, axis=-1), train)

    def __call__(self, levels, train: bool):
        """Four maps [B,h,w,D], finest first -> logits [B,h1,w1,Y]."""
        x = self.features(levels, train)
        return self.classifier(self.drop(x, deterministic=not train))


class UperNet(nn.Module):
    """A backbone with neck and head; parameters 'backbone', 'neck' and 'head'.

    backbone: a ViT or USFM of this project. taps: four block indices. channels: width
    of the head, None for the backbone's D, as in the paper.
    """

    backbone: Any
    num_classes: int
    taps: tuple[int, ...] = (3, 5, 7, 11)
    channels: int | None = None
    dropout: float = 0.1
    norm: str = "none"

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Normalised images [B,H,W,C] -> logits [B,H,W,Y].

        Training needs the rng streams 'dropout' and 'drop_path' and the collection
        'batch_stats' mutable. Raises ValueError unless there are four taps.
        """
        if len(self.taps) != 4:
            raise ValueError(f"UperNet needs four taps, got {self.taps}")
        height, width = images.shape[1:3]
        out = self.backbone(images, layers=self.taps, train=train)
        first = 1 + self.backbone.num_registers
        maps = rearrange(
            out.layers[:, :, first:].astype(jnp.float32),
            "n b (h w) d -> n b h w d",
            h=height // self.backbone.patch_size,
        )
        levels = Neck(name="neck")(maps, train)
        head = UPerHead(
            self.num_classes,
            self.channels or maps.shape[-1],
            self.dropout,
            self.norm,
            name="head",
        )
        return resize(head(levels, train), height, width)


def default_taps(depth: int) -> tuple[int, ...]:
    """Blocks 3, 5, 7 and 11 of 12, and the same shares of another depth."""
    return tuple(max(round(depth * share / 12), 1) - 1 for share in (4, 6, 8, 12))
