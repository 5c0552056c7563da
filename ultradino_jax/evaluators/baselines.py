"""What a backbone is measured against: the same network untrained, and raw pixels."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import reduce

from ultradino_jax.checkpoint import Backbone
from ultradino_jax.models.vit import ViTOutput

PIXEL_SIDE = 32


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture with fresh random parameters."""
    side = backbone.image_size
    images = jnp.zeros((1, side, side, backbone.channels))
    params = backbone.model.init(jax.random.key(seed), images)["params"]
    return dataclasses.replace(
        backbone, params=params, name=f"{backbone.name} (random init)", source=""
    )


@dataclasses.dataclass(frozen=True)
class RawPixels:
    """A model without parameters whose class token is the image itself.

    block: side in pixels of the squares that are averaged. It has the call of a ViT
    of one block and no patch tokens, so every evaluation runs on it unchanged.
    """

    block: int
    depth: int = 1

    def clone(self, **unused) -> "RawPixels":
        """Itself: it has no compute dtype to set."""
        return self

    def apply(self, variables, images, layers=None) -> ViTOutput:
        """[B,S,S,C] -> class token [B, (S/block)^2 C], no patch tokens [B,1,0]."""
        del variables
        pixels = reduce(
            images,
            "b (h p) (w q) c -> b (h w c)",
            "mean",
            p=self.block,
            q=self.block,
        )
        nothing = jnp.zeros((len(images), 1, 0), images.dtype)
        taps = None if layers is None else pixels[None, :, None]
        return ViTOutput(pixels, nothing, nothing, nothing, taps)


def raw_pixels(backbone: Backbone) -> Backbone:
    """Pixels of the backbone's own input, averaged to at most 32 x 32."""
    side = backbone.image_size
    out = max(d for d in range(1, PIXEL_SIDE + 1) if side % d == 0)
    return dataclasses.replace(
        backbone,
        model=RawPixels(side // out),
        params={},
        name=f"raw pixels {out}x{out}",
        source="",
    )
