"""Crops on the device against crops on the host: grey levels apart, and the rate.

    python -m experiments.benchmarks.crops_device [--batch 8] [--json FILE]

Needs the `test` extra for its photographs (skimage.data). Same decisions, both
renderers, crops of 224 and 96 pixels. Pictures that fit the canvas of 384 pixels first,
one operation at a time; then phantoms of 1024x768 pixels on canvases of three sizes,
resize only. The rate is that of `crops.render` on JAX's first device.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import skimage.data

from ultradino_jax.data.canvas import place_on_canvas
from ultradino_jax.data.crops import CropConfig, render_crops, sample_crops
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.pretraining.device_crops import render

CANVAS = 384
OFF = {
    "vertical_flip_prob": 0.0,
    "jitter_prob": 0.0,
    "blur_probs": (0.0, 0.0, 0.0),
    "solarize_probs": (0.0, 0.0, 0.0),
}
GREY = {
    "resize": CropConfig(**OFF),
    "+ flips": CropConfig(
        **{**OFF, "vertical_flip_prob": 0.5, "horizontal_flip_prob": 0.5}
    ),
    "+ jitter": CropConfig(**{**OFF, "jitter_prob": 1.0}),
    "+ blur": CropConfig(**{**OFF, "blur_probs": (1.0, 1.0, 1.0)}),
    "+ solarize": CropConfig(**{**OFF, "solarize_probs": (1.0, 1.0, 1.0)}),
    "ultrasound recipe": CropConfig.ultrasound(),
}
HUE = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.1}
COLOUR = {
    "resize": CropConfig(**OFF),
    "+ hue": CropConfig(**{**OFF, **HUE, "jitter_prob": 1.0}),
    "imagenet recipe": CropConfig.imagenet(),
}
jitted = jax.jit(render, static_argnums=2)


def photographs(channels: int) -> list[np.ndarray]:
    """uint8 [H,W,C] of at most 384 pixels a side, one phantom among the grey ones."""
    if channels == 3:
        return [skimage.data.astronaut()[::2, ::2], skimage.data.coffee()[:300, :380]]
    grey = [
        skimage.data.camera()[::2, ::2],
        skimage.data.coins()[:300, :380],
        skimage.data.moon()[:384, :384],
        render_phantom(0, size=(256, 340)).image,
    ]
    return [image[:, :, None] for image in grey]


def apart(images: list[np.ndarray], config: CropConfig, side: int) -> dict:
    """Mean and largest |device - host| of the global and the local crops."""
    found = {"global": [], "local": []}
    for index, image in enumerate(images):
        rng = np.random.default_rng(index)
        decisions = sample_crops(rng, image.shape[0], image.shape[1], config)
        parts = place_on_canvas(image, decisions, side)
        parts = {name: value[None, None] for name, value in parts.items()}
        device = jitted(parts.pop("canvas"), parts, config)
        host = render_crops(image, decisions, config)
        for name, a, b in zip(found, device, host, strict=True):
            found[name].append(abs(np.asarray(a)[0, :, 0].astype(int) - b))
    return {
        f"{name} {what}": float(f(np.stack(values)))
        for name, values in found.items()
        for what, f in (("mean", np.mean), ("max", np.max))
    }


def rate(batch: int, seconds: float = 5.0) -> dict:
    """Images per second of the jitted renderer, transfers left out."""
    config = CropConfig.ultrasound()
    image = render_phantom(0, size=(256, 341)).image[:, :, None]
    drawn = [
        sample_crops(np.random.default_rng(i), image.shape[0], image.shape[1], config)
        for i in range(batch)
    ]
    parts = [place_on_canvas(image, decisions, CANVAS) for decisions in drawn]
    parts = jax.device_put({k: np.stack([p[k] for p in parts])[None] for k in parts[0]})
    canvas = parts.pop("canvas")
    jax.block_until_ready(jitted(canvas, parts, config))
    start, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        jax.block_until_ready(jitted(canvas, parts, config))
        count += batch
    cpu = time.process_time() - cpu
    return {
        "device": jax.devices()[0].device_kind,
        "batch": batch,
        "images_per_second": count / (time.perf_counter() - start),
        "cpu_ms_per_image": 1e3 * cpu / count,
    }


def main() -> None:
    """Prints one line per comparison, then the rate; --json keeps them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images, for the rate")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    rows = {}

    def row(
        name: str, images: list[np.ndarray], config: CropConfig, side: int = CANVAS
    ):
        rows[name] = apart(images, config, side)
        print(f"{name:28}", *(f"{x:12.5f}" for x in rows[name].values()), flush=True)

    print(
        f"{'grey levels apart':28}  global mean   global max   local mean    local max"
    )
    for name, config in GREY.items():
        row(f"grey, {name}", photographs(1), config)
    for name, config in COLOUR.items():
        row(f"colour, {name}", photographs(3), config)
    large = [render_phantom(i, size=(768, 1024)).image[:, :, None] for i in range(3)]
    for side in (384, 512, 768):
        row(f"1024x768 on a canvas of {side}", large, GREY["resize"], side)
    speed = rate(options.batch)
    print(
        f"{speed['device']}: {speed['images_per_second']:.0f} img/s in batches of "
        f"{speed['batch']}, {speed['cpu_ms_per_image']:.1f} ms of CPU per image"
    )
    if options.json:
        recipe = dataclasses.asdict(CropConfig.ultrasound())
        result = {"recipe": recipe, "grey_levels": rows, "rate": speed}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
