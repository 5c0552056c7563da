"""Position embeddings at another image size, as torch's bicubic `interpolate`."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def resize_matrix(
    size: int, out: int, *, scale: float | None = None, antialias: bool = False
) -> np.ndarray:
    """Weights [out, size] of one axis of torch's bicubic `interpolate`.

    `scale` is the scale factor torch was given (out/size when None): DINOv2 passes
    (out + 0.1) / size, and torch then samples with that factor rather than with the
    ratio of the sizes. Without antialias the kernel has a = -0.75 and clamped borders;
    with it a = -0.5 and a support widened by the factor, as in PIL.
    """
    step = 1.0 / (scale if scale is not None else out / size)
    a = -0.5 if antialias else -0.75
    stretch = max(step, 1.0) if antialias else 1.0
    centers = (np.arange(out) + 0.5) * step
    weights = np.zeros((out, size))
    for row, center in enumerate(centers):
        if antialias:
            low = max(int(center - 2 * stretch + 0.5), 0)
            high = min(int(center + 2 * stretch + 0.5), size)
        else:
            low = int(np.floor(center - 0.5)) - 1
            high = low + 4
        taps = np.arange(low, high)
        x = np.abs((taps + 0.5 - center) / stretch)
        w = np.where(
            x <= 1,
            (a + 2) * x**3 - (a + 3) * x**2 + 1,
            np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0.0),
        )
        np.add.at(weights[row], np.clip(taps, 0, size - 1), w)
    if antialias:
        weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def interpolate_pos_embed(
    pos_embed: jax.Array, grid: tuple[int, int], *, offset: float, antialias: bool
) -> jax.Array:
    """Resize position embeddings [1,1+N0,D] to a grid [h,w]: returns [1,1+h*w,D].

    The class token's entry is kept. A native square grid is returned untouched.
    Source: DINOv2 `interpolate_pos_encoding`.
    """
    n0 = pos_embed.shape[1] - 1
    side = round(n0**0.5)
    if side * side != n0:
        raise ValueError(f"pos_embed holds {n0} patch positions, not a square grid")
    if grid == (side, side):
        return pos_embed
    cls_pos, patch_pos = pos_embed[:, :1], pos_embed[:, 1:]
    rows, cols = (
        resize_matrix(
            side,
            n,
            scale=(n + offset) / side if offset else None,
            antialias=antialias,
        )
        for n in grid
    )
    patch_pos = rearrange(patch_pos, "1 (h w) d -> h w d", h=side)
    patch_pos = jnp.einsum(
        "ih,jw,hwd->ijd", rows, cols, patch_pos.astype(jnp.float32), precision="highest"
    )
    patch_pos = rearrange(patch_pos, "h w d -> 1 (h w) d").astype(pos_embed.dtype)
    return jnp.concatenate([cls_pos, patch_pos], axis=1)
