import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.transform import downscale_local_mean
from skimage.transform import resize as skimage_resize

from ultradino_jax.evaluators.features import Features, Preprocess, extract_features
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


@pytest.fixture(scope="module")
def backbone():
    model = ViT(24, 5, 2, patch_size=8, image_size=16, num_registers=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return Backbone(model, params, 16, 3, MEAN, STD, name="small")


def grey_images(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (20 + i % 7, 33 - i % 5), dtype=np.uint8) for i in range(n)
    ]


@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (24, 24), (1, 50)])
def test_letterbox_keeps_the_aspect_and_centres_on_black(shape):
    image = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    letterbox = Preprocess(16, 1, (0.0,), (1.0,), letterbox=True)
    y, x, h, w = letterbox.box(shape)
    assert max(h, w) == 16 and min(h, w) == max(round(16 * min(shape) / max(shape)), 1)
    square = letterbox.resize(image)
    exact = skimage_resize(
        image, (h, w), order=1, anti_aliasing=False, preserve_range=True, mode="edge"
    )
    inside = square[y : y + h, x : x + w, 0]
    np.testing.assert_allclose(inside, exact, atol=4)
    assert square.sum() == inside.sum()  # black elsewhere
    # As much above as below, up to the odd row.
    assert 0 <= 16 - h - 2 * y <= 1 and 0 <= 16 - w - 2 * x <= 1
    assert Preprocess(16, 1, (0.0,), (1.0,)).box(shape) == (0, 0, 16, 16)


def test_resize_is_bilinear_without_antialiasing():
    image = grey_images(1)[0]
    ours = Preprocess(16, 1, (0.0,), (1.0,)).resize(image)
    exact = skimage_resize(
        image, (16, 16), order=1, anti_aliasing=False, preserve_range=True, mode="edge"
    )
    # OpenCV 4 quantises coordinates to 1/32 pixel: up to 4 grey levels of noise images.
    assert ours.shape == (16, 16, 1)
    np.testing.assert_allclose(ours[:, :, 0], exact, atol=4)


def test_antialias_averages_when_both_sides_shrink():
    image = np.random.default_rng(0).integers(0, 256, (48, 64), dtype=np.uint8)
    ours = Preprocess(16, 1, (0.0,), (1.0,), antialias=True).resize(image)
    means = downscale_local_mean(image, (3, 4))
    np.testing.assert_allclose(ours[:, :, 0], means, atol=0.51)
    plain = Preprocess(64, 1, (0.0,), (1.0,)).resize(image)
    grown = Preprocess(64, 1, (0.0,), (1.0,), antialias=True).resize(image)
    np.testing.assert_array_equal(grown, plain)


def test_channels_follow_the_backbone():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    one = Preprocess(16, 1, (0.0,), (1.0,)).resize(colour)
    expected = np.asarray(Image.fromarray(colour[:, :, :3]).convert("L"))
    np.testing.assert_array_equal(one[:, :, 0], expected)
    three = Preprocess(16, 3, MEAN, STD)
    np.testing.assert_array_equal(three.resize(colour), colour[:, :, :3])
    grey = three.resize(colour[:, :, 0])
    np.testing.assert_array_equal(grey, np.repeat(colour[:, :, :1], 3, axis=2))


def test_features_equal_a_plain_forward(backbone):
    images = grey_images(11)
    features = extract_features(backbone, images, num_layers=4, batch_size=4)
    preprocess = Preprocess.of(backbone)
    x = np.stack([preprocess.resize(image) for image in images]) / 255.0
    x = jnp.asarray((x - np.array(MEAN)) / np.array(STD), jnp.float32)
    out = backbone.model.apply({"params": backbone.params}, x, layers=range(5))
    assert features.cls.shape == (11, 4, 24) and features.cls.dtype == np.float32
    for i in range(4):  # oldest first
        np.testing.assert_allclose(
            features.cls[:, i], out.layers[i + 1, :, 0], atol=2e-5
        )
    patches = np.asarray(out.patch_tokens).mean(axis=1)
    np.testing.assert_allclose(features.mean_patch, patches, atol=2e-5)
    last = extract_features(backbone, iter(images), batch_size=8)  # 8 devices
    np.testing.assert_allclose(last.cls[:, 0], features.cls[:, -1], atol=2e-5)


def test_assembly_equals_the_reference(golden):
    g = golden("linear_probe")
    cls = np.swapaxes(g["input/cls_tokens"][0], 0, 1)
    features = Features(cls, g["input/patch_tokens"][0, -1].mean(axis=1))
    kind = re.compile(r"features/n(\d+)_avgpool([01])")
    found = {key: m for key in g if (m := kind.fullmatch(key))}
    assert found
    for key, match in found.items():
        n, avgpool = map(int, match.groups())
        ours = features.assemble(n, bool(avgpool))
        np.testing.assert_allclose(ours, g[key][0], atol=1e-6)
    n = cls.shape[1]
    with pytest.raises(ValueError, match=f"hold {n} blocks, {n + 1} were asked for"):
        features.assemble(n + 1, False)


def test_bad_input_is_named(backbone):
    with pytest.raises(ValueError, match="no image to extract"):
        extract_features(backbone, [])
    with pytest.raises(ValueError, match=r"got float64 \[8, 8\]"):
        extract_features(backbone, [np.zeros((8, 8))], batch_size=2)
    with pytest.raises(ValueError, match="1, 3 or 4 channels, got 2"):
        extract_features(backbone, [np.zeros((8, 8, 2), np.uint8)], batch_size=2)
    params = jax.tree.map(lambda x: x * jnp.nan, backbone.params)
    broken = dataclasses.replace(backbone, params=params, name="nan-net")
    with pytest.raises(ValueError, match="3 of 3 images are not finite.*'nan-net'"):
        extract_features(broken, grey_images(3), batch_size=4, name="val")
