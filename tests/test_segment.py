"""Masks for users: any image size, two modes, restart."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ultradino_jax.cli import command
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    initial_variables,
    load_segmenter,
    save_segmenter,
)
from ultradino_jax.models.upernet import UperNet
from ultradino_jax.models.vit import ViT
from ultradino_jax.segment import class_scores, main, segment, window_starts
from ultradino_jax.weights.backbone import Backbone

pytestmark = pytest.mark.usefixtures("one_device")

CLASSES = ("background", "head", "other")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, segmenter) of random weights that does not say one class everywhere."""
    vit = ViT(16, 2, 2, patch_size=8, image_size=32, num_registers=0, layerscale=1.0)
    params = jax.jit(vit.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    params = jax.tree.map(lambda x: 5 * x, params)
    backbone = Backbone(vit, params, 32, 1, (0.5,), (0.2,), name="small")
    model = UperNet(vit, num_classes=3, taps=(0, 0, 1, 1), channels=8)
    segmenter = Segmenter(
        backbone, model, initial_variables(model, backbone, 1), CLASSES
    )
    folder = tmp_path_factory.mktemp("segmenter") / "segmenter"
    save_segmenter(folder, segmenter, identity={}, history=[])
    return folder, segmenter


def test_a_letterboxed_segmenter_is_given_and_asked_in_its_letterbox(trained, tmp_path):
    folder, segmenter = trained
    boxed = dataclasses.replace(segmenter, letterbox=True)
    save_segmenter(tmp_path / "segmenter", boxed)
    again, _ = load_segmenter(tmp_path)
    assert again.letterbox and not load_segmenter(folder)[0].letterbox
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 1), np.uint8)
    scores = class_scores(again, image)
    square = np.zeros((32, 32, 1), np.uint8)
    square[8:24] = image
    np.testing.assert_allclose(
        scores, segmenter.logits(square[None])[0, 8:24], atol=1e-5
    )
    assert np.abs(scores - class_scores(segmenter, image)).max() > 1e-3


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in [
        ("a.png", (40, 57)),
        ("deep/b.png", (32, 32)),
        ("c.jpg", (90, 31)),
    ]:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4), np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(path)
    return tmp_path / "in"


def test_masks_have_the_size_of_their_images(trained, images, tmp_path):
    folder, segmenter = trained
    (images / "broken.png").write_bytes(b"no picture")
    lines = []
    out = tmp_path / "out"
    counts = segment(folder, images, out, overlays=True, say=lines.append)
    assert counts == {"images": 3, "failed": 1}
    assert "broken.png" in lines[0]
    for name in ("a.png", "deep/b.png", "c.jpg"):
        with (
            Image.open(images / name) as image,
            Image.open(out / f"{name}.mask.png") as mask,
        ):
            assert mask.size == image.size and mask.mode == "L"
        with Image.open(out / f"{name}.overlay.png") as picture:
            assert picture.mode == "RGB"
    native = np.asarray(Image.open(images / "deep" / "b.png"))[None, :, :, None]
    mask = np.asarray(Image.open(out / "deep" / "b.png.mask.png"))
    np.testing.assert_array_equal(mask, segmenter.predict(native)[0])
    assert json.loads((out / "classes.json").read_text())["classes"]["1"] == "head"
    before = (out / "a.png.mask.png").stat().st_mtime_ns
    segment(folder, images, out, say=lines.append)
    assert (out / "a.png.mask.png").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds masks with .*mode: 'resize'"):
        segment(folder, images, out, mode="window")


def test_one_window_is_the_plain_answer(trained):
    _, segmenter = trained
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 1), np.uint8)
    np.testing.assert_allclose(
        class_scores(segmenter, image, "window", 2),
        class_scores(segmenter, image),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="mode 'tile'"):
        class_scores(segmenter, image, "tile")


@pytest.mark.parametrize("size", [(20, 33), (64, 50), (33, 100)])
def test_windows_put_every_pixel_in_its_place(size):
    """With a network that answers with the pixel itself, so must the whole."""
    fake = SimpleNamespace(
        preprocess=SimpleNamespace(image_size=32),
        classes=("a", "b"),
        logits=lambda x: np.concatenate([x, 255.0 - x], axis=-1),
    )
    image = np.random.default_rng(0).integers(0, 256, (*size, 1), np.uint8)
    scores = class_scores(fake, image, "window", 4)
    np.testing.assert_allclose(scores[..., 0], image[..., 0], atol=1e-4)
    np.testing.assert_allclose(scores[..., 1], 255 - image[..., 0], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 200))
def test_windows_cover_and_overlap(side, extra):
    length = side + extra
    starts = window_starts(length, side)
    assert starts[0] == 0 and starts[-1] == length - side
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= max(side // 2, 1)).all()


def test_command_line_answers_in_one_line(tmp_path):
    flags = ["--checkpoint", str(tmp_path), "--input", str(tmp_path), "--output", "o"]
    with pytest.raises(SystemExit, match=r"^error: no segmenter\.json in .*'$"):
        command(main, flags)
