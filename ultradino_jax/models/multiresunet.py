"""MultiResUNet (Ibtehaz and Rahman, Neural Networks 121, 2020; arXiv:1902.04049).

A U-Net whose levels are MultiRes blocks (3x3 convolutions in a row, whose outputs are
concatenated and added to a 1x1 projection of the input) and whose skips are Res paths.
Order of layers and widths follow the authors' Keras release; epsilon and momentum of
the batch norms are those of their later PyTorch release. The output layer is a plain
1x1 convolution, as the paper says; their code also normalises it.
"""

import flax.linen as nn
import jax.numpy as jnp

from ultradino_jax.models.layers import BatchNorm, Upsample
from ultradino_jax.models.unet import pad_to_multiple

LEVELS = 4
glorot = nn.initializers.glorot_uniform()


def block_widths(features: int, alpha: float = 1.67) -> tuple[int, int, int]:
    """Channels of a block's three convolutions: W/6, W/3 and W/2 of W = alpha U.

    features: U, the channels of the U-Net level that the block stands for. Section 4.1
    of the paper, with the shares and the rounding down of its code.
    """
    w = alpha * features
    return int(w * 0.167), int(w * 0.333), int(w * 0.5)


class ConvNorm(nn.Module):
    """Convolution of `side` x `side` without bias, batch norm without gain, ReLU."""

    features: int
    side: int
    relu: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,features]."""
        side = (self.side, self.side)
        x = nn.Conv(
            self.features, side, use_bias=False, kernel_init=glorot, name="conv"
        )(x)
        x = BatchNorm(use_scale=False, name="norm")(x, train)
        return nn.relu(x) if self.relu else x


class MultiResBlock(nn.Module):
    """features: U. The three outputs see 3x3, 5x5 and 7x7 pixels."""

    features: int
    alpha: float

    @nn.compact
    def __call__(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,sum(block_widths)]."""
        widths = block_widths(self.features, self.alpha)
        shortcut = ConvNorm(sum(widths), 1, relu=False, name="shortcut")(x, train)
        parts = []
        for width, name in zip(widths, ("conv3", "conv5", "conv7"), strict=True):
            x = ConvNorm(width, 3, name=name)(x, train)
            parts.append(x)
        x = BatchNorm(name="norm1")(jnp.concatenate(parts, axis=-1), train)
        return BatchNorm(name="norm2")(nn.relu(shortcut + x), train)


class ResPath(nn.Module):
    """`length` residual 3x3 convolutions on the way from encoder to decoder."""

    features: int
    length: int

    @nn.compact
    def __call__(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,features]."""
        for i in range(self.length):
            shortcut = ConvNorm(self.features, 1, relu=False, name=f"shortcut{i}")
            conv = ConvNorm(self.features, 3, name=f"conv{i}")
            x = nn.relu(shortcut(x, train) + conv(x, train))
            x = BatchNorm(name=f"norm{i}")(x, train)
        return x


class MultiResUNet(nn.Module):
    """The network.

    width: U of the first level, 32 in the paper. alpha: 1.67 in the paper, which makes
    the number of parameters about that of the U-Net of the same width.
    """

    num_classes: int
    width: int = 32
    alpha: float = 1.67

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Normalised images [B,H,W,C] of any size -> logits [B,H,W,Y].

        Training needs the collection 'batch_stats' mutable.
        """
        height, width = images.shape[1:3]
        x = pad_to_multiple(images, 2**LEVELS)
        skips = []
        for level in range(LEVELS + 1):
            if level:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            features = self.width * 2**level
            x = MultiResBlock(features, self.alpha, name=f"down{level}")(x, train)
            if level < LEVELS:
                path = ResPath(features, LEVELS - level, name=f"path{level}")
                skips.append(path(x, train))
        for level in reversed(range(LEVELS)):
            features = self.width * 2**level
            x = Upsample(features, init=glorot, name=f"upsample{level}")(x)
            x = jnp.concatenate([x, skips[level]], axis=-1)
            x = MultiResBlock(features, self.alpha, name=f"up{level}")(x, train)
        logits = nn.Conv(
            self.num_classes, (1, 1), kernel_init=glorot, name="classifier"
        )(x)
        return logits[:, :height, :width]
