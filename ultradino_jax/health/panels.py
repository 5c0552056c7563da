"""Pictures of what a network sees: attention, PCA of patch tokens, crops and masks.

All functions return or take uint8 RGB arrays [H,W,3]; `png` turns one into bytes.
"""

import functools
import io
from collections.abc import Sequence

import jax
import numpy as np
from einops import rearrange
from matplotlib import colormaps
from PIL import Image

from ultradino_jax.weights.backbone import Backbone

GAP = 2  # pixels between tiles


@functools.partial(jax.jit, static_argnames="model")
def _attention(model, params, images):
    out, sown = model.apply({"params": params}, images, mutable=["intermediates"])
    (maps,) = sown["intermediates"]["blocks"]["attn"]["attention"]
    first = 1 + model.num_registers
    return maps[-1, :, :, 0, first:], out.patch_tokens


def attention_maps(backbone: Backbone, images: np.ndarray):
    """Attention of the last block's CLS query, and the final patch tokens.

    images: uint8 [n,S,S,C]. Returns ([n,A,h,w], [n,h,w,D]), float32. The attention
    paid to CLS and registers is left out, so a map sums to less than 1.
    """
    mean, std = (np.asarray(v, np.float32) for v in (backbone.mean, backbone.std))
    x = (np.asarray(images, np.float32) / 255 - mean) / std
    maps, tokens = jax.device_get(_attention(backbone.model, backbone.params, x))
    h, w = (side // backbone.model.patch_size for side in images.shape[1:3])
    return (
        maps.reshape(*maps.shape[:2], h, w).astype(np.float32),
        tokens.reshape(len(tokens), h, w, -1).astype(np.float32),
    )


def pca_colours(tokens: np.ndarray) -> np.ndarray:
    """First three principal components of patch tokens [n,h,w,D] as RGB [n,h,w,3].

    The components are those of all images together, so colours mean the same in each;
    each is scaled from its 2nd to its 98th percentile. Its sign is free: the largest
    entry of a direction is made positive.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    directions = directions[:3]
    largest = np.abs(directions).argmax(axis=1)[:, None]
    directions = directions * np.sign(np.take_along_axis(directions, largest, axis=1))
    parts = flat @ directions.T
    low, high = np.percentile(parts, [2, 98], axis=0)
    scaled = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    out = np.zeros((len(flat), 3))
    out[:, : parts.shape[1]] = scaled
    return (255 * out + 0.5).astype(np.uint8).reshape(*tokens.shape[:3], 3)


def colour(values: np.ndarray, name: str = "viridis") -> np.ndarray:
    """[h,w] -> [h,w,3] by a matplotlib colour map, from the least to the largest."""
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (255 * colormaps[name](scaled)[..., :3] + 0.5).astype(np.uint8)


def rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H,W], [H,W,1] or [H,W,3] -> [H,W,3]."""
    image = image if image.ndim == 3 else image[:, :, None]
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """[h,w,3] -> [side,side,3], each pixel a square."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Tiles [s,s,3], all of one size, in rows of any length on white."""
    side = rows[0][0].shape[0]
    step, most = side + GAP, max(map(len, rows))
    page = np.full((len(rows) * step - GAP, most * step - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            page[i * step : i * step + side, j * step : j * step + side] = tile
    return page


def attention_panel(
    backbone: Backbone, images: np.ndarray, side: int = 128
) -> np.ndarray:
    """One row per image: the image, CLS attention averaged over heads, PCA colours."""
    maps, tokens = attention_maps(backbone, images)
    colours = pca_colours(tokens)
    return sheet(
        [
            [fit(rgb(x), side), fit(colour(a.mean(axis=0)), side), fit(c, side)]
            for x, a, c in zip(images, maps, colours, strict=True)
        ]
    )


def crops_panel(
    batch: dict, patch_size: int, count: int = 4, side: int = 128
) -> np.ndarray:
    """One row per image of a batch: global crops with masked patches dark red, locals.

    batch: the host arrays of `data.pipeline`; its first `count` images.
    """
    crops, local, masks = (
        rearrange(np.asarray(batch[name]), "w v b ... -> (w b) v ...")[:count]
        for name in ("global_crops", "local_crops", "masks")
    )
    grid = crops.shape[2] // patch_size
    rows = []
    for views, hidden, small in zip(crops, masks, local, strict=True):
        row = []
        for crop, mask in zip(views, hidden, strict=True):
            mask = mask.reshape(grid, grid).repeat(patch_size, 0).repeat(patch_size, 1)
            picture = rgb(crop)
            picture[mask] //= 3
            picture[mask, 0] += 80
            row.append(fit(picture, side))
        rows.append(row + [fit(rgb(crop), side) for crop in small])
    return sheet(rows)


def png(image: np.ndarray) -> bytes:
    """uint8 [H,W,3] -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", optimize=True)
    return buffer.getvalue()
