"""Multi-crop rendering on the device, from the decisions of `data.crops`.

The steps, their order and their rounding to 8 bits are those of the host renderer:
resize, flip, jitter, grayscale, blur, solarize. Between the steps pixels are float32
arrays that hold whole numbers 0..255. What differs from the host: docs/performance.md.

Letters as in `data.pipeline`; Q is the side of a canvas, v crops of one size.
"""

from dataclasses import fields

import jax
import jax.numpy as jnp
from einops import rearrange

from ultradino_jax.data.crops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NUM_GLOBAL,
    SATURATION,
    CropConfig,
    CropDecisions,
)

# Images of a group rendered at once: bounds the memory for weights and intermediates
# (about 6 MB per image at Q = 384 and ten crops).
CHUNK = 32
# Boxes on a shrunk canvas are rounded to float32, 1e-4 of a pixel at most. Without this
# margin such a box could claim the padding next to the image.
_MARGIN = 1e-3


def rendered(batch: dict, config: CropConfig) -> dict:
    """The batch with its canvases turned into crops; without canvases, as it is.

    batch: of `data.pipeline`, with or without canvases. config: the run's recipe.
    """
    if "canvas" not in batch:
        return batch
    decisions = {item.name: batch[item.name] for item in fields(CropDecisions)}
    used = {"canvas", *decisions}
    global_crops, local_crops = render(batch["canvas"], decisions, config)
    rest = {name: value for name, value in batch.items() if name not in used}
    return rest | {"global_crops": global_crops, "local_crops": local_crops}


def render(canvas, decisions: dict, config: CropConfig):
    """All crops of a batch. Local to a group, so a sharded W stays where it is.

    Args:
      canvas: uint8 [W,b,Q,Q,C], C 1 or 3.
      decisions: the fields of CropDecisions, each [W,b,G+L,..]; boxes float32 in pixels
        of the canvas, as `data.canvas.place_on_canvas` gives them.
      config: sizes, blur kernel, threshold; saturation and hue are left out where the
        recipe says 0 and for one channel.

    Returns:
      global_crops uint8 [W,G,b,S,S,C] and local_crops uint8 [W,L,b,s,s,C].
    """
    kinds = [(config.global_size, slice(None, NUM_GLOBAL))]
    if config.num_local:
        kinds += [(config.local_size, slice(NUM_GLOBAL, None))]

    def one_image(image, decided):
        return [
            _render_crops(image, {k: v[part] for k, v in decided.items()}, size, config)
            for size, part in kinds
        ]

    by_image = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (canvas, decisions))
    crops = jax.lax.map(
        lambda xs: jax.vmap(one_image)(*xs),
        by_image,
        batch_size=min(CHUNK, canvas.shape[1]),
    )
    crops = [rearrange(x, "b w v ... -> w v b ...") for x in crops]
    if not config.num_local:
        w, _, b, *_, c = crops[0].shape
        empty = (w, 0, b, config.local_size, config.local_size, c)
        crops.append(jnp.zeros(empty, jnp.uint8))
    return tuple(crops)


def _render_crops(image, decided, size, config):
    """Crops of one size: canvas uint8 [Q,Q,C] -> uint8 [v,size,size,C]."""
    x = resize_boxes(image, decided["boxes"], size)
    for axis, name in ((1, "vertical_flip"), (2, "horizontal_flip")):
        x = jnp.where(_column(decided[name]), jnp.flip(x, axis), x)
    x = _jitter(x, decided, config)
    if x.shape[-1] == 3:
        x = jnp.where(_column(decided["grayscale"]), _luma(x), x)
    x = _blur(x, decided["blur_sigma"], config.blur_kernel)
    bright = _column(decided["solarize"]) & (x >= config.solarize_threshold)
    return jnp.where(bright, 255 - x, x).astype(jnp.uint8)


def resize_boxes(image, boxes, size: int):
    """Cuts boxes and resizes them to squares: two matrix products per box.

    image: [Q,Q,C]. boxes: [v,4] top, left, height, width. Returns whole numbers 0..255,
    float32 [v,size,size,C]. Horizontal first and rounded in between, as Pillow does;
    full float32 products, since TF32 weights would move pixels by a grey level.
    """
    side = image.shape[0]
    down = resize_weights(boxes[:, 0], boxes[:, 2], size, side)
    across = resize_weights(boxes[:, 1], boxes[:, 3], size, side)
    exact = jax.lax.Precision.HIGHEST
    pixels = image.astype(jnp.float32)
    x = _whole(jnp.einsum("hwc,vxw->vhxc", pixels, across, precision=exact))
    return _whole(jnp.einsum("vyh,vhxc->vyxc", down, x, precision=exact))


def resize_weights(start, length, size: int, side: int):
    """Weights of the canvas pixels along one axis for every output pixel.

    Keys' cubic (a = -1/2, IEEE TASSP 29, 1981), widened by length / size when that is
    above 1, as Pillow's antialiased bicubic. Pixels outside the box have weight 0 and
    each row sums to 1: the box is cut out first, then resized.

    start, length: [v], the box in pixels. Returns float32 [v,size,side].
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = jnp.arange(side, dtype=jnp.float32)
    target = jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5
    # Distance over filter width in one fraction: for whole boxes it rounds only once.
    apart = jnp.abs((pixel + 0.5 - start) * size - target * length)
    x = apart / jnp.maximum(length, size)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
    first = jnp.floor(start + _MARGIN)
    end = jnp.ceil(start + length - _MARGIN)
    weights = jnp.where((pixel >= first) & (pixel < end), weights, 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _column(values):
    """[v] -> [v,1,1,1]."""
    return values[:, None, None, None]


def _whole(x):
    """Rounds half up to 0..255, as Pillow's resize."""
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _luma(x):
    """Grey of colour pixels, in Pillow's 16-bit integers; [..,C] -> [..,1]."""
    if x.shape[-1] == 1:
        return x
    r, g, b = jnp.split(x.astype(jnp.int32), 3, axis=-1)
    grey = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    return grey.astype(jnp.float32)


def _jitter(x, decided, config):
    """Brightness, contrast, saturation and hue in the drawn order; [v,S,S,C].

    The first three blend with black, the mean grey and the pixel's own grey:
    base + factor (x - base), clipped, truncated. A factor of 1 changes nothing.
    """
    colour = x.shape[-1] == 3
    codes = [BRIGHTNESS, CONTRAST]
    codes += [SATURATION] if colour and config.saturation else []
    codes += [HUE] if colour and config.hue else []
    when = jnp.argsort(decided["order"], axis=1)[:, jnp.array(codes)]
    turns = jnp.array(codes)[jnp.argsort(when, axis=1)]  # [v,n], operations in order
    none = jnp.ones_like(decided["brightness"])
    factors = jnp.stack(
        [*(decided[k] for k in ("brightness", "contrast", "saturation")), none], axis=1
    )
    for i in range(len(codes)):
        turn = turns[:, i]
        factor = jnp.take_along_axis(factors, turn[:, None], axis=1)[:, 0]
        grey = _luma(x)
        total = grey.astype(jnp.int32).sum(axis=(1, 2, 3))
        count = grey.shape[1] * grey.shape[2]
        mean = (2 * total + count) // (2 * count)  # rounded half up, exactly
        base = _column(jnp.where(turn == CONTRAST, mean, 0).astype(jnp.float32))
        if SATURATION in codes:
            base = jnp.where(_column(turn == SATURATION), grey, base)
        blended = jnp.floor(jnp.clip(_column(factor) * (x - base) + base, 0, 255))
        if HUE in codes:
            turned = _column((turn == HUE) & (decided["hue"] != 0))
            blended = jnp.where(turned, _turn_hue(x, decided["hue"]), blended)
        x = blended
    return x


def _turn_hue(x, hue):
    """Turns the colour circle through Pillow's 8-bit HSV; x [v,S,S,3], hue [v]."""
    r, g, b = jnp.split(x, 3, axis=-1)
    value = x.max(axis=-1, keepdims=True)
    span = value - x.min(axis=-1, keepdims=True)
    rc, gc, bc = ((value - band) / jnp.maximum(span, 1) for band in (r, g, b))
    sector = jnp.where(
        r == value, bc - gc, jnp.where(g == value, 2 + rc - bc, 4 + gc - rc)
    )
    turn = sector / 6 + (sector < 0)  # in Pillow's own roundings, which decide ties
    circle = jnp.floor(turn * 255)
    saturation = jnp.floor(span / jnp.maximum(value, 1) * 255) / 255
    # The circle has 256 steps, and 8 bits wrap around.
    circle = (circle + _column(jnp.trunc(hue * 255))) % 256

    sixth = circle * 6 / 255
    part = sixth - jnp.floor(sixth)
    p, q, t = (
        jnp.floor(value * (1 - saturation * f) + 0.5)
        for f in (jnp.ones_like(part), part, 1 - part)
    )
    table = {
        0: (value, t, p),
        1: (q, value, p),
        2: (p, value, t),
        3: (p, q, value),
        4: (t, p, value),
        5: (value, p, q),
    }
    which = jnp.floor(sixth) % 6
    bands = [
        jnp.select([which == k for k in table], [row[c] for row in table.values()])
        for c in range(3)
    ]
    return jnp.concatenate(bands, axis=-1)


def _blur(x, sigma, kernel_size: int):
    """Gaussian of one sigma [v] per crop, mirrored border, rounded once at the end.

    kernel_size taps whatever the sigma; sigma 0 leaves the crop as it is.
    """
    reach, size = kernel_size // 2, x.shape[1]
    taps = jnp.arange(-reach, reach + 1, dtype=jnp.float32)
    sigma = sigma[:, None]
    kernel = jnp.exp(-0.5 * (taps / jnp.where(sigma > 0, sigma, 1)) ** 2)
    kernel = kernel / kernel.sum(axis=1, keepdims=True)
    kernel = jnp.where(sigma > 0, kernel, taps == 0)
    for axis in (2, 1):
        margins = [(0, 0)] * 4
        margins[axis] = (reach, reach)
        padded = jnp.pad(x, margins, mode="reflect")
        x = sum(
            _column(kernel[:, i]) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i in range(kernel_size)
        )
    return jnp.clip(jnp.round(x), 0, 255)
