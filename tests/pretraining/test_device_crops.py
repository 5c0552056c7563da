"""The renderer on the device against the one on the host and against others' code."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pydicom.data
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ultradino_jax.data.canvas import place_on_canvas
from ultradino_jax.data.crops import (
    CropConfig,
    render_crops,
    sample_crops,
)
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.pipeline import build_pipeline
from ultradino_jax.pretraining import device_crops as device
from ultradino_jax.run.train import train
from ultradino_jax.sharding import batch_sharding, make_mesh

SIZES = {"global_size": 64, "local_size": 32, "num_local": 3}
# Every operation acts on every crop; a test turns off those it does not look at.
ALL = {
    "vertical_flip_prob": 1.0,
    "horizontal_flip_prob": 1.0,
    "jitter_prob": 1.0,
    "hue": 0.1,
    "grayscale_prob": 1.0,
    "blur_probs": (1.0, 1.0, 1.0),
    "solarize_probs": (1.0, 1.0, 1.0),
}
CONFIG = CropConfig(**SIZES, **ALL)
NEUTRAL = {
    "vertical_flip": False,
    "horizontal_flip": False,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "hue": 0,
    "grayscale": False,
    "blur_sigma": 0,
    "solarize": False,
}
SIDE = 192
render = jax.jit(device.render, static_argnums=2)
resize_boxes = jax.jit(device.resize_boxes, static_argnums=2)
weights_of = jax.jit(device.resize_weights, static_argnums=(2, 3))
rendered = jax.jit(device.rendered, static_argnums=1)


@functools.cache
def pictures(channels):
    """Photographs, an ultrasound-like phantom and a CT slice, uint8 [H,W,C]."""
    if channels == 3:
        colour = [skimage.data.astronaut(), skimage.data.coffee()]
        return [image[100:260, 120:310] for image in colour]
    ct = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm")).pixel_array
    ct = np.clip(ct.astype(int) // 8, 0, 255).astype(np.uint8)
    grey = [skimage.data.camera()[90:270, 150:340], skimage.data.coins()[:190, :180]]
    return [
        x[:, :, None] for x in [*grey, render_phantom(0, size=(150, 192)).image, ct]
    ]


def decide(image, seed, keep=(), config=CONFIG):
    """Decisions of the recipe with every operation but `keep` made neutral."""
    decisions = sample_crops(np.random.default_rng(seed), *image.shape[:2], config)
    neutral = {
        name: np.full_like(getattr(decisions, name), value)
        for name, value in NEUTRAL.items()
        if name not in keep
    }
    return dataclasses.replace(decisions, **neutral)


def on_device(image, decisions, config=CONFIG, side=SIDE):
    """Crops of one image as render_crops returns them, from the device renderer."""
    parts = place_on_canvas(image, decisions, side)
    parts = {name: value[None, None] for name, value in parts.items()}
    got = render(parts.pop("canvas"), parts, config)
    assert [x.dtype for x in got] == [np.uint8] * 2
    return [np.asarray(x)[0, :, 0] for x in got]


def differences(channels, keep, side=SIDE, images=None):
    """|device - host| of all pixels of all crops, [n]."""
    found = []
    for seed, image in enumerate(images or pictures(channels)):
        decisions = decide(image, seed, keep)
        host = render_crops(image, decisions, CONFIG)
        for a, b in zip(on_device(image, decisions, side=side), host, strict=True):
            assert a.shape == b.shape
            found.append(abs(a.astype(int) - b).ravel())
    return np.concatenate(found)


JITTER = ("brightness", "contrast", "saturation")


@pytest.mark.parametrize(
    ("channels", "keep", "largest"),
    [
        (1, (), 1),
        (1, ("vertical_flip", "horizontal_flip"), 1),
        (1, ("blur_sigma",), 1),
        (1, ("solarize",), 1),
        (1, JITTER, 2),  # a level off before a factor of 1.4 can be two after it
        (1, tuple(NEUTRAL), 3),
        (3, (), 1),
        (3, ("grayscale",), 1),
        (3, JITTER, 3),
        (3, ("hue",), 6),  # one level of the least colour moves the hue of grey pixels
        (3, (*JITTER, "hue", "blur_sigma", "solarize"), 8),
    ],
)
def test_same_decisions_give_the_host_s_pixels(channels, keep, largest):
    off = differences(channels, keep)
    assert off.max() <= largest
    assert off.mean() < 2e-3 and (off > 1).mean() < 2e-4


def test_all_but_hue_and_blur_is_exact_where_nothing_is_resized():
    # Whole boxes of the crop's own size: every pixel is copied.
    image = np.ascontiguousarray(pictures(3)[0][:64, :64])
    config = dataclasses.replace(CONFIG, num_local=0)
    exact = {*NEUTRAL} - {"blur_sigma", "hue"}
    for seed in range(12):
        keep = (
            {"hue"}
            if seed % 4 == 0
            else exact - ({"grayscale"} if seed % 4 == 1 else set())
        )
        decisions = decide(image, seed, keep, config)
        decisions.boxes[:] = [0, 0, 64, 64]
        host, _ = render_crops(image, decisions, config)
        got, _ = on_device(image, decisions, config, 64)
        off = abs(host.astype(int) - got)
        assert off.max() <= ("hue" in keep)
        assert (off > 0).mean() < 1e-3


def test_flips_are_exact():
    image = pictures(1)[0]
    plain = on_device(image, decide(image, 0))
    for name, axis in (("vertical_flip", 1), ("horizontal_flip", 2)):
        for a, b in zip(plain, on_device(image, decide(image, 0, {name})), strict=True):
            np.testing.assert_array_equal(np.flip(a, axis), b)


@pytest.mark.parametrize("box", [(3, 5, 160, 170), (40, 20, 48, 150), (0, 0, 20, 25)])
def test_resize_equals_jax_image(box):
    top, left, height, width = box
    # From 60 to 187: jax.image does not clip to 0..255 between the two passes.
    image = pictures(1)[0] // 2 + np.uint8(60)
    cut = image[top : top + height, left : left + width].astype(np.float32)
    scale = np.float32([64 / height, 64 / width])
    expected = jax.jit(
        lambda x: jax.image.scale_and_translate(
            x, (64, 64, 1), (0, 1), scale, jnp.zeros(2), "cubic", antialias=True
        )
    )(cut)
    canvas = np.pad(image, [(0, 12), (0, 2), (0, 0)], constant_values=255)
    got = resize_boxes(canvas, np.float32([box]), 64)[0]
    off = np.asarray(got - expected)
    assert abs(off).max() < 1.25  # rounded twice
    assert abs(off.mean()) < 0.02


def test_fractional_boxes_equal_pillow_s_inside_the_box():
    # Pillow's `box` takes fractions but lets the filter see pixels outside the box.
    image = pictures(1)[1]
    box = np.float32([10.3, 20.6, 120.5, 100.2])
    top, left, height, width = box.tolist()
    picture = Image.fromarray(image[:, :, 0].astype(np.float32))
    edges = (left, top, left + width, top + height)
    expected = picture.resize((64, 64), Image.Resampling.BICUBIC, box=edges)
    got = resize_boxes(image[:180, :180], box[None], 64)[0, :, :, 0]
    off = abs(np.asarray(got) - np.clip(np.asarray(expected), 0, 255))
    assert off[3:-3, 3:-3].max() < 1.25 and off[3:-3, 3:-3].mean() < 0.4


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(16, 700),
    width=st.integers(16, 700),
    seed=st.integers(0, 2**32),
)
def test_weights_sum_to_one_and_read_only_the_box(height, width, seed):
    image = np.broadcast_to(np.uint8(7), (height, width, 1))
    decisions = sample_crops(np.random.default_rng(seed), height, width, CONFIG)
    # Boxes on all four borders as well.
    corners = [[0, 0, 9, 11], [height - 9, width - 11, 9, 11], [0, 0, height, width]]
    decisions.boxes[:3] = corners
    parts = place_on_canvas(image, decisions, 96)
    inside = parts["canvas"][:, :, 0] > 0
    limits = inside.any(axis=1).sum(), inside.any(axis=0).sum()
    assert max(limits) == min(96, max(height, width))
    for axis, limit in enumerate(limits):
        start, length = parts["boxes"][:, axis], parts["boxes"][:, 2 + axis]
        weights = np.asarray(weights_of(start, length, 16, 96))
        np.testing.assert_allclose(weights.sum(axis=2), 1, atol=1e-5)
        assert not weights[:, :, limit:].any()
        pixel = np.arange(96)
        outside = (pixel + 1 <= start[:, None]) | (
            pixel >= np.nextafter(start + length, np.float32(np.inf))[:, None]
        )
        assert not np.swapaxes(weights, 1, 2)[outside].any()


def test_padding_is_never_seen():
    image = render_phantom(1, size=(90, 300)).image[:, :, None]
    parts = place_on_canvas(image, decide(image, 4), SIDE)
    canvas = parts.pop("canvas")
    used = round(90 * SIDE / 300)
    assert canvas[used - 1].any() and not canvas[used:].any()
    bright = canvas.copy()
    bright[used:] = 255
    parts = {name: value[None, None] for name, value in parts.items()}
    one, two = (render(x[None, None], parts, CONFIG) for x in (canvas, bright))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_large_picture_is_shrunk_by_averaging_and_its_boxes_with_it():
    image = render_phantom(2, size=(192, 256)).image[:, :, None]
    decisions = decide(image, 0)
    parts = place_on_canvas(image, decisions, 128)
    means = image.reshape(96, 2, 128, 2).astype(float).mean(axis=(1, 3))
    assert abs(parts["canvas"][:96, :, 0] - means).max() <= 0.5
    np.testing.assert_array_equal(parts["boxes"], decisions.boxes / 2)
    same = place_on_canvas(image, decisions, 256)
    np.testing.assert_array_equal(same["canvas"][:192], image)
    np.testing.assert_array_equal(same["boxes"], decisions.boxes)


def test_a_shrunk_canvas_stays_near_the_host_s_crops():
    images = [render_phantom(i, size=(384, 512)).image[:, :, None] for i in range(2)]
    near = differences(1, (), side=192, images=images)
    far = differences(1, (), side=96, images=images)
    assert near.mean() < 2.5  # the loss of two filters in a row
    assert near.mean() < far.mean()  # and more of it on a smaller canvas


def batches(config, side, *, groups=2, batch_size=6, steps=1, start=0):
    stream = build_pipeline(
        PhantomSource(6, (40, 48)),
        config,
        batch_size=batch_size,
        groups=groups,
        patch_size=8,
        canvas=side,
        start_step=start,
        num_steps=steps,
        num_threads=0,
    )
    return list(stream)


def test_a_rendered_batch_is_the_host_s_batch(monkeypatch):
    config = CropConfig(global_size=32, local_size=16, num_local=2)
    (host,), (raw,) = batches(config, None), batches(config, 48)
    assert device.rendered(host, config) is host
    whole = rendered(raw, config)
    assert {k: v.shape for k, v in whole.items()} == {
        k: v.shape for k, v in host.items()
    }
    for name in ("masks", "mask_indices", "mask_weights", "index", "bad"):
        np.testing.assert_array_equal(whole[name], host[name])
    for name in ("global_crops", "local_crops"):
        off = abs(np.asarray(whole[name]).astype(int) - host[name])
        assert off.max() <= 3 and off.mean() < 5e-3
    monkeypatch.setattr(device, "CHUNK", 2)  # three images: a chunk and a remainder
    in_parts = jax.jit(lambda batch: device.rendered(batch, config))(raw)
    for name in ("global_crops", "local_crops"):
        np.testing.assert_array_equal(in_parts[name], whole[name])
    # A function of (seed, step): what comes second is what a resumed run gets first.
    second, resumed = batches(config, 48, steps=2)[1], batches(config, 48, start=1)[0]
    assert all((second[k] == resumed[k]).all() for k in second)


def test_no_local_crops():
    config = CropConfig(global_size=32, num_local=0)
    (raw,) = batches(config, 48)
    assert rendered(raw, config)["local_crops"].shape == (2, 0, 3, 96, 96, 1)


def test_rendering_stays_within_a_device():
    config = CropConfig(global_size=32, local_size=16, num_local=2)
    (raw,) = batches(config, 48, groups=8, batch_size=8)
    alone = rendered(raw, config)
    sharding = batch_sharding(make_mesh())
    raw = jax.device_put(raw, sharding)
    compiled = rendered.lower(raw, config).compile()
    text = compiled.as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in text
    spread = compiled(raw)
    for name in ("global_crops", "local_crops"):
        assert spread[name].sharding.is_equivalent_to(sharding, 6)
        np.testing.assert_array_equal(spread[name], alone[name])


def test_training_on_canvases_and_its_resume(one_device, tiny_config, tmp_path):
    config = tiny_config(
        **{"data.render": "device", "data.canvas": 48, "steps_per_epoch": 2}
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config, whole)
    rows = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "4")
    train(config, broken)
    name = "metrics.jsonl"
    assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_canvas_too_small_is_named():
    with pytest.raises(ValueError, match="canvas of 31 pixels is smaller"):
        batches(CropConfig(global_size=32, local_size=16), 31)
