import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2hsv

from ultradino_jax.data.crops import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NUM_GLOBAL,
    SATURATION,
    CropConfig,
    CropDecisions,
    render_crops,
    resized_crop,
    sample_crops,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "crops.npz")
IMAGE = GOLDEN["input/image"][:, :, None]


def keys(pattern):
    """Those of the golden file that match."""
    return [key for key in GOLDEN.files if re.fullmatch(pattern, key)]


CODES = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


def decide(box, operations):
    """Both global crops with the given operations in this order, no local crop."""

    def both(value, dtype=np.float32):
        return np.full(NUM_GLOBAL, value, dtype)

    chosen = {
        "vertical_flip": both(False, bool),
        "horizontal_flip": both(False, bool),
        "brightness": both(1),
        "contrast": both(1),
        "saturation": both(1),
        "hue": both(0),
        "grayscale": both(False, bool),
        "blur_sigma": both(0),
        "solarize": both(False, bool),
    }
    names = {"vflip": "vertical_flip", "blur": "blur_sigma"}
    order = []
    for name, value in operations:
        name = names.get(name, name)
        is_switch = chosen[name].dtype == bool
        chosen[name] = both(True, bool) if is_switch else both(value)
        order += [CODES[name]] if name in CODES else []
    order += [code for code in range(4) if code not in order]
    return CropDecisions(
        boxes=np.array([box] * NUM_GLOBAL, np.int32),
        order=np.array([order] * NUM_GLOBAL, np.int32),
        **chosen,
    )


def render_one(image, box, operations, size):
    config = CropConfig(global_size=size, num_local=0)
    crops, local = render_crops(image, decide(box, operations), config)
    assert local.shape == (0, 96, 96, image.shape[2])
    np.testing.assert_array_equal(crops[0], crops[1])
    return crops[0].astype(int)


@pytest.mark.parametrize("key", keys(r"resized_crop/.*"))
def test_resize_equals_pillow_10(key):
    size, n = map(int, re.findall(r"\d+", key))
    got = resized_crop(IMAGE, GOLDEN["boxes_ijhw"][n], size)
    np.testing.assert_array_equal(got[:, :, 0], GOLDEN[key])


def golden_operations():
    for key in keys(r"ops/\d+/(base|vflip)"):
        yield key, [("vflip", 0)] if key.endswith("vflip") else []
    for key in keys(r"ops/\d+/solarize\d+"):
        yield key, [("solarize", int(re.search(r"\d+$", key)[0]))]
    for key in keys(r"ops/\d+/(brightness|contrast|blur)/.*"):
        _, _, name, value = key.split("/")
        yield key, [(name, float(value))]
    for key in keys(r"ops/\d+/chain/.*/spec"):
        yield key.replace("spec", "uint8"), json.loads(str(GOLDEN[key]))


@pytest.mark.parametrize(
    ("key", "operations"),
    [pytest.param(*case, id=case[0]) for case in golden_operations()],
)
def test_photometric_operations_match_torchvision(key, operations):
    size = len(GOLDEN[key])
    got = render_one(IMAGE, GOLDEN["boxes_ijhw"][0], operations, size)[:, :, 0]
    # A few blurred pixels sit on a rounding tie of the float32 sum.
    tolerance = 1 if "blur" in dict(operations) else 0
    np.testing.assert_allclose(got, GOLDEN[key], rtol=0, atol=tolerance)
    assert (got != GOLDEN[key]).mean() < 1e-3


@pytest.mark.parametrize("case", keys(r"rrc/\d+x\d+/\w+/h_mean"))
def test_boxes_follow_random_resized_crop(case):
    _, shape, kind, _ = case.split("/")
    width, height = map(int, shape.split("x"))
    draws = int(GOLDEN["rrc/n_draws"])
    scale = {"global": (0.32, 1.0), "local": (0.05, 0.32)}[kind]
    config = CropConfig(num_local=draws, local_scale=scale)
    decisions = sample_crops(np.random.default_rng(5), height, width, config)
    top, left, h, w = decisions.boxes[NUM_GLOBAL:].T.astype(np.float64)
    got = {
        "area_fraction": h * w / (height * width),
        "log_aspect_w_over_h": np.log(w / h),
        "h": h,
        "w": w,
        "i": top,
        "j": left,
    }
    levels = GOLDEN["rrc/quantile_levels"]
    for name, values in got.items():
        prefix = f"rrc/{shape}/{kind}/{name}"
        std = GOLDEN[f"{prefix}_std"]
        error = 4 * std * np.sqrt(2 / draws)
        assert abs(values.mean() - GOLDEN[f"{prefix}_mean"]) < error, name
        assert abs(values.std() - std) < 4 * std * np.sqrt(1 / draws), name
        quantiles = GOLDEN[f"{prefix}_quantiles"]
        slack = 4 * np.sqrt(2 * levels * (1 - levels) / draws)
        # Sides are integers: the level lies between P(x < q) and P(x <= q). The golden
        # quantiles were interpolated and stored in float32, hence the epsilon.
        below = (values[:, None] < quantiles - 1e-6).mean(axis=0)
        upto = (values[:, None] <= quantiles + 1e-6).mean(axis=0)
        assert (below - slack <= levels).all() and (levels <= upto + slack).all(), name


@settings(deadline=None, max_examples=80)
@given(
    height=st.integers(16, 900),
    width=st.integers(16, 900),
    seed=st.integers(0, 2**32),
    num_local=st.integers(0, 8),
)
def test_boxes_lie_inside_the_image(height, width, seed, num_local):
    config = CropConfig(num_local=num_local)
    decisions = sample_crops(np.random.default_rng(seed), height, width, config)
    top, left, h, w = decisions.boxes.T
    assert len(top) == NUM_GLOBAL + num_local
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(16, 400, [0, 189, 16, 21]), (400, 16, [189, 0, 21, 16])],
)
def test_an_image_too_thin_for_any_box_is_cut_in_the_middle(height, width, expected):
    decisions = sample_crops(np.random.default_rng(0), height, width, CropConfig())
    np.testing.assert_array_equal(decisions.boxes[:NUM_GLOBAL], [expected] * NUM_GLOBAL)


def test_decisions_have_the_recipe_s_frequencies():
    images, config = 3000, CropConfig.imagenet(num_local=2)
    drawn = [
        sample_crops(np.random.default_rng([3, i]), 64, 64, config)
        for i in range(images)
    ]

    def stack(name):
        return np.stack([getattr(decisions, name) for decisions in drawn])

    def close(share, expected):
        error = 4.5 * np.sqrt(expected * (1 - expected) / images)
        assert (abs(share - expected) <= error).all(), (share, expected)

    assert not stack("vertical_flip").any()
    close(stack("horizontal_flip").mean(0), 0.5)
    close(stack("grayscale").mean(0), 0.2)
    for name, p in zip((0, 1, 2, 3), (0.0, 0.9, 0.5, 0.5), strict=True):
        close((stack("blur_sigma") > 0).mean(0)[name], p)
    for name, p in zip((0, 1, 2, 3), (0.0, 0.2, 0.0, 0.0), strict=True):
        close(stack("solarize").mean(0)[name], p)
    sigma = stack("blur_sigma")
    assert sigma.max() <= 2.0 and sigma[sigma > 0].min() >= 0.1
    jittered = stack("brightness") != 1
    close(jittered.mean(0), 0.8)
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ]:
        values = stack(name)
        assert ((values != (name != "hue")) == jittered).all()
        values = values[jittered]
        assert low <= values.min() and values.max() <= high
        uniform = (high - low) / np.sqrt(12 * values.size)
        assert abs(values.mean() - (low + high) / 2) < 4 * uniform
    order = stack("order").reshape(-1, 4)
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    shares = np.unique(order, axis=0, return_counts=True)[1] / len(order)
    assert len(shares) == 24 and shares.min() > 0.03


def test_decisions_are_independent_of_each_other():
    half = (0.5, 0.5, 0.5)
    config = CropConfig(
        num_local=3000,
        horizontal_flip_prob=0.5,
        jitter_prob=0.5,
        grayscale_prob=0.5,
        blur_probs=half,
        solarize_probs=half,
    )
    decisions = sample_crops(np.random.default_rng(8), 64, 64, config)
    switches = [
        decisions.vertical_flip,
        decisions.horizontal_flip,
        decisions.brightness != 1,
        decisions.grayscale,
        decisions.blur_sigma > 0,
        decisions.solarize,
    ]
    jittered = decisions.brightness != 1
    factors = [decisions.brightness, decisions.contrast, decisions.saturation]
    for group, rows in [(switches, slice(None)), (factors, jittered)]:
        matrix = np.corrcoef([values[rows] for values in group])
        matrix -= np.eye(len(group))
        assert abs(matrix).max() < 4.5 / np.sqrt(1500), matrix


def test_the_ultrasound_recipe_flips_vertically_and_leaves_hue_alone():
    config = CropConfig.ultrasound(num_local=400)
    decisions = sample_crops(np.random.default_rng(0), 64, 64, config)
    assert 140 < decisions.vertical_flip.sum() < 260
    assert not decisions.horizontal_flip.any()
    assert not decisions.hue.any() and not decisions.grayscale.any()


def test_same_generator_same_decisions():
    config = CropConfig()
    one, two, other = (
        sample_crops(np.random.default_rng(seed), 80, 90, config) for seed in (1, 1, 2)
    )
    for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert (one.boxes != other.boxes).any()


@pytest.fixture(scope="module")
def colour():
    rng = np.random.default_rng(0)
    noise = rng.random((40, 48, 3)).astype(np.float32)
    smooth = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 1, 32)
    return np.rint(smooth * 215 + 20).astype(np.uint8)


def luma(pixels):
    return pixels @ np.array([0.299, 0.587, 0.114])


def test_colour_operations_match_their_formulas(colour):
    box = [0, 0, 40, 40]
    base = render_one(colour, box, [], 40)
    np.testing.assert_array_equal(base, colour[:, :40])
    grey = luma(base)[:, :, None]

    def blended(background, factor):
        return np.clip(background + factor * (base - background), 0, 255)

    cases = {
        ("brightness", 1.3): blended(0, 1.3),
        ("contrast", 0.7): blended(grey.mean(), 0.7),
        ("saturation", 0.6): blended(grey, 0.6),
        ("grayscale", 0): blended(grey, 0),
        ("solarize", 0): np.where(base < 128, base, 255 - base),
    }
    for operation, expected in cases.items():
        got = render_one(colour, box, [operation], 40)
        assert abs(got - expected).max() <= 1.5, operation
    mirrored = render_one(colour, box, [("horizontal_flip", 0)], 40)
    np.testing.assert_array_equal(mirrored, base[:, ::-1])


def test_hue_turns_the_colour_circle(colour):
    box = [0, 0, 40, 40]
    before = rgb2hsv(colour[:, :40])
    after = rgb2hsv(render_one(colour, box, [("hue", 0.1)], 40).astype(np.uint8))
    vivid = (before[..., 1] > 0.3) & (before[..., 2] > 0.3)
    assert vivid.mean() > 0.1
    turned = (after[..., 0] - before[..., 0] - 0.1 + 0.5) % 1 - 0.5
    assert abs(turned[vivid]).max() < 0.03
    assert abs(after[..., 2] - before[..., 2]).max() < 0.01


def test_colour_blur_works_on_each_channel(colour):
    box = [0, 0, 40, 40]
    got = render_one(colour, box, [("blur", 1.3)], 40)
    for channel in range(3):
        alone = render_one(colour[:, :, channel, None], box, [("blur", 1.3)], 40)
        assert abs(got[:, :, channel] - alone[:, :, 0]).max() <= 1


def test_jitter_order_matters_as_decided():
    box = GOLDEN["boxes_ijhw"][0]
    light_first = render_one(IMAGE, box, [("brightness", 1.4), ("contrast", 0.6)], 64)
    contrast_first = render_one(
        IMAGE, box, [("contrast", 0.6), ("brightness", 1.4)], 64
    )
    assert (light_first != contrast_first).any()


def test_operation_codes_are_stable():
    # They are stored in batches for the device renderer.
    assert (BRIGHTNESS, CONTRAST, SATURATION, HUE) == (0, 1, 2, 3)


def test_shapes_and_kinds_of_crops():
    config = CropConfig(global_size=40, local_size=24, num_local=3)
    decisions = sample_crops(np.random.default_rng(0), *IMAGE.shape[:2], config)
    global_crops, local_crops = render_crops(IMAGE, decisions, config)
    assert global_crops.shape == (2, 40, 40, 1) and global_crops.dtype == np.uint8
    assert local_crops.shape == (3, 24, 24, 1) and local_crops.dtype == np.uint8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"blur_probs": (0.0, 1.9, 0.5)}, "blur_probs"),
        ({"jitter_prob": -0.1}, "jitter_prob"),
        ({"global_scale": (1.0, 0.3)}, "global_scale"),
        ({"blur_kernel": 8}, "blur_kernel = 8"),
        ({"num_local": -1}, "num_local = -1"),
        ({"local_size": 4}, "4"),
    ],
)
def test_bad_recipes(changes, match):
    with pytest.raises(ValueError, match=match):
        CropConfig(**changes)
