"""The networks that are trained, and their forward pass on crops cut into groups.

Shapes as in `objective`: crops [W,V,b,S,S,C] are V views of the b images of a group.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.packing import take
from ultradino_jax.models.vit import ViT


@dataclass(frozen=True)
class Modules:
    """The networks. ibot_head None ties the iBOT loss to the DINO head."""

    backbone: ViT
    dino_head: DINOHead
    ibot_head: DINOHead | None = None

    def init(self, key, num_channels: int):
        """Random parameters for both students and teachers."""
        keys = jax.random.split(key, 3)
        side = self.backbone.image_size
        images = jnp.zeros((1, side, side, num_channels))
        tokens = jnp.zeros((1, self.backbone.embed_dim))
        params = {
            "backbone": self.backbone.init(keys[0], images)["params"],
            "dino_head": self.dino_head.init(keys[1], tokens)["params"],
        }
        if self.ibot_head is not None:
            params["ibot_head"] = self.ibot_head.init(keys[2], tokens)["params"]
        return params

    def ibot(self, params):
        """(head, its parameters) of the patch tokens: the tied or the separate one."""
        if self.ibot_head is None:
            return self.dino_head, params["dino_head"]
        return self.ibot_head, params["ibot_head"]


def forward_crops(modules, objective, params, *crops, masks=None, key=None):
    """Backbone on crops [W,V,b,S,S,C], of one size or of several together.

    Returns (CLS [W,V,b,D], patches [W,V*b*N,D]) for each size. masks [W,V,b,N] belong
    to the first. With a key the pass is a training pass (drop path), without it a plain
    one.
    """
    w = crops[0].shape[0]
    flat = "w v b ... -> (w v b) ..."
    if masks is not None:
        masks = rearrange(masks, flat)
    images = tuple(rearrange(objective.normalise(c), flat) for c in crops)
    outputs = modules.backbone.apply(
        {"params": params["backbone"]},
        images,
        (masks, *[None] * (len(crops) - 1)),
        groups=w,
        train=key is not None,
        rngs=None if key is None else {"drop_path": key},
    )
    results = []
    for crop, out in zip(crops, outputs, strict=True):
        v, b = crop.shape[1:3]
        cls_token = rearrange(out.cls_token, "(w v b) d -> w v b d", w=w, v=v, b=b)
        patches = rearrange(out.patch_tokens, "(w r) n d -> w (r n) d", w=w)
        results.append((cls_token, patches))
    return results


def gather_tokens(patch_tokens, mask_indices, mask_weights):
    """Masked tokens of each group: [W,R,D], [W,M] twice -> [W,M,D].

    Padding, which weighs 0, takes some token and gives it no gradient.
    """
    num_rows = patch_tokens.shape[1]
    nowhere = mask_indices.shape[1]

    def place_of(index, weights):
        index = jnp.where(weights > 0, index, num_rows)
        place = jnp.arange(nowhere, dtype=jnp.int32)
        return jnp.full(num_rows, nowhere, jnp.int32).at[index].set(place, mode="drop")

    inverse = jax.vmap(place_of)(mask_indices, mask_weights)
    return take(patch_tokens, mask_indices, inverse)


def features_of(head, params, tokens):
    """Unit features of a head: [..,D] -> [..,E]."""
    return head.apply({"params": params}, tokens, method="features")


def kernel_of(head, params):
    """A head's prototypes [E,K]."""
    return head.apply({"params": params}, method="kernel")
