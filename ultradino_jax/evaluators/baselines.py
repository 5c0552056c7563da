"""What a backbone is measured against: the same network untrained, and raw pixels."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import reduce

from ultradino_jax.errors import UserError, as_user_error
from ultradino_jax.models.vit import ViTOutput, build_vit
from ultradino_jax.normalization import FUS
from ultradino_jax.weights.backbone import Backbone

PIXEL_SIDE = 32
IMAGE_SIZE = 224


def from_scratch(
    arch: str,
    *,
    patch_size: int = 16,
    image_size: int = 0,
    channels: int = 0,
    seed: int = 0,
) -> Backbone:
    """An untrained ViT of a named size, as the reference's from-scratch rows build it.

    image_size, channels: 0 is 224 pixels and one channel. Raises UserError for an
    unknown size, or sides that do not fit the patch size.
    """
    if not arch:
        raise UserError(
            "without --checkpoint the size of the network is config.model.arch: tiny, "
            "small, base or large"
        )
    side, channels = image_size or IMAGE_SIZE, channels or 1
    if patch_size <= 0 or side % patch_size:
        raise UserError(
            f"image size {side} is not a multiple of the patch size {patch_size}"
        )
    with as_user_error():
        model = build_vit(arch, patch_size=patch_size, image_size=side)
    images = jnp.zeros((1, side, side, channels))
    params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
    mean, std = (values * channels for values in FUS)
    name = f"vit_{arch}{patch_size} from scratch"
    return Backbone(model, params, side, channels, mean, std, name=name)


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same architecture with fresh random parameters."""
    side = backbone.image_size
    images = jnp.zeros((1, side, side, backbone.channels))
    params = jax.jit(backbone.model.init)(jax.random.key(seed), images)["params"]
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
