"""U-Net (Ronneberger, Fischer and Brox 2015), padded: logits have the image's size.

Two 3x3 convolutions with ReLU per level, four levels of max pooling that double the
channels, transposed 2x2 convolutions that halve them, concatenated skips, a 1x1
convolution at the end; dropout at the end of the contracting path; He's initialisation.
The paper's convolutions are unpadded and its skips are cropped; here both keep their
size, as in every later use for whole images.
"""

import flax.linen as nn
import jax.numpy as jnp

from ultradino_jax.models.layers import NORMS, BatchNorm, Upsample

LEVELS = 4
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def pad_to_multiple(images, side: int):
    """[B,H,W,C] -> the same, mirrored past its bottom and right to multiples of `side`.

    The U-Net paper extrapolates missing context by mirroring, too.
    """
    pad = [(0, -n % side) for n in images.shape[1:3]]
    if pad == [(0, 0), (0, 0)]:
        return images
    return jnp.pad(images, [(0, 0), *pad, (0, 0)], mode="symmetric")


class DoubleConv(nn.Module):
    """Twice: 3x3 convolution, an optional batch norm, ReLU."""

    features: int
    norm: str

    @nn.compact
    def __call__(self, x, train: bool):
        """[B,h,w,D] -> [B,h,w,features]."""
        for i in (1, 2):
            # A batch norm has a bias of its own.
            x = nn.Conv(
                self.features,
                (3, 3),
                use_bias=self.norm == "none",
                kernel_init=he_normal,
                name=f"conv{i}",
            )(x)
            if self.norm == "batch":
                x = BatchNorm(name=f"norm{i}")(x, train)
            x = nn.relu(x)
        return x


class UNet(nn.Module):
    """The network.

    width: channels of the first level, 64 in the paper. dropout: rate behind the two
    coarsest levels (the paper gives the place, not the rate). norm: 'none' (the paper)
    or 'batch' behind every 3x3 convolution.
    """

    num_classes: int
    width: int = 64
    dropout: float = 0.5
    norm: str = "none"

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Normalised images [B,H,W,C] of any size -> logits [B,H,W,Y].

        Training needs the rng stream 'dropout' and, with batch norm, the collection
        'batch_stats' mutable. Raises ValueError for another norm.
        """
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: choose one of {', '.join(NORMS)}")
        height, width = images.shape[1:3]
        x = pad_to_multiple(images, 2**LEVELS)
        skips = []
        for level in range(LEVELS + 1):
            if level:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            features = self.width * 2**level
            x = DoubleConv(features, self.norm, name=f"down{level}")(x, train)
            if level >= LEVELS - 1:
                x = nn.Dropout(self.dropout, deterministic=not train)(x)
            skips.append(x)
        for level in reversed(range(LEVELS)):
            features = self.width * 2**level
            x = Upsample(features, init=he_normal, name=f"upsample{level}")(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = DoubleConv(features, self.norm, name=f"up{level}")(x, train)
        logits = nn.Conv(
            self.num_classes, (1, 1), kernel_init=he_normal, name="classifier"
        )(x)
        return logits[:, :height, :width]
