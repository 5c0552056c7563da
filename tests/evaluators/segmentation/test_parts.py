"""Loss, schedule, augmentation and overlays against the reference's arrays."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange

from ultradino_jax.evaluators.classification.augment import (
    add_noise,
    brightness_contrast,
    gamma,
    grid_axis,
)
from ultradino_jax.evaluators.segmentation.augment import (
    affine,
    affine_matrix,
    augment_pair,
    grid_distortion,
)
from ultradino_jax.evaluators.segmentation.loss import cross_entropy, dice_loss
from ultradino_jax.evaluators.segmentation.results import (
    COLOURS,
    overlay,
)
from ultradino_jax.models.upernet import resize
from ultradino_jax.schedules import warmup_linear


def numbered(g, kind, sub):
    """The cases kind0, kind1, .. of a golden file."""
    names = {m[0] for key in g if (m := re.match(rf"{kind}\d+(?=/)", key))}
    assert names
    return [sub(g, f"{name}/") for name in sorted(names)]


def test_losses_and_gradients_equal_reference(golden, sub):
    g = golden("seg_loss")
    for name in json.loads(str(g["meta"]))["cases"]:
        losses_equal(sub(g, f"{name}/"))


def losses_equal(g):
    labels = jnp.asarray(g["label"])
    logits = rearrange(jnp.asarray(g["logits"]), "b c h w -> b h w c")

    def sized(x):
        return x if x.shape[1:3] == labels.shape[1:] else resize(x, *labels.shape[1:])

    for name, loss in (("ce", cross_entropy), ("dice", dice_loss)):
        value, grad = jax.value_and_grad(lambda x, f=loss: f(sized(x), labels))(logits)
        np.testing.assert_allclose(value, g[f"loss_{name}_f64"], rtol=2e-6)
        theirs = rearrange(g[f"grad_{name}"], "b c h w -> b h w c")
        np.testing.assert_allclose(
            grad, theirs, atol=2e-5 * max(np.abs(theirs).max(), 1e-9)
        )
    softmax = dice_loss(sized(logits), labels, "softmax_dice")
    np.testing.assert_allclose(softmax, g["softmax_dice_not_used"], rtol=2e-6)


def test_unknown_dice_is_refused():
    with pytest.raises(ValueError, match="dice 'tversky'"):
        dice_loss(jnp.zeros((1, 2, 2, 2)), jnp.zeros((1, 2, 2), int), "tversky")


def test_learning_rates_equal_the_reference_schedulers(golden):
    g = golden("seg_optim")
    settings = json.loads(str(g["meta"]))
    names = [key.split("/")[0] for key in g if key.endswith("/iter")]
    assert names
    for name in names:
        step, rate, facts = g[f"{name}/iter"], g[f"{name}/lr"], settings[name]
        ours = warmup_linear(
            step,
            warmup=facts["warm_end"],
            total=facts["T"],
            start=facts["start_factor"],
            decay_from=facts["poly_begin"],
        )
        np.testing.assert_allclose(ours, rate / facts["base_lr"], atol=2e-6)


def test_adamw_equals_torch(golden):
    g = golden("seg_optim")
    rates = jnp.asarray(g["adamw/sched/lr"])
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.01),
        optax.scale_by_schedule(lambda i: -rates[i]),
    )
    params = jnp.asarray(g["adamw/p0"])
    state = optimizer.init(params)
    for grad, expected in zip(g["adamw/grads"], g["adamw/sched/params"], strict=True):
        updates, state = optimizer.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-6)


def assert_pixels(ours, theirs):
    """Equal up to OpenCV 4's coordinates of 1/32 pixel."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 4 and (difference > 1).mean() <= 0.016


def test_affine_equals_reference(golden, sub):
    g = golden("seg_augment")
    for case in numbered(g, "affine", sub):
        scale, rotate, shear_x, shear_y, x, y = case["params"]
        matrix = affine_matrix(
            g["mask"].shape,
            scale=scale,
            rotate=rotate,
            shear_x=shear_x,
            shear_y=shear_y,
            translate_x=x,
            translate_y=y,
        )
        np.testing.assert_allclose(matrix, case["matrix"], atol=1e-12)
        image, mask = affine(g["image"], g["mask"], matrix)
        assert_pixels(image, case["image"])
        assert (mask != case["mask"]).mean() < 0.002


def test_grid_distortion_equals_reference(golden, sub):
    g = golden("seg_augment")
    for case in numbered(g, "grid", sub):
        image, mask = grid_distortion(
            g["image"][:, :, None], g["mask"], case["stepsx"], case["stepsy"]
        )
        assert_pixels(image[:, :, 0], case["image_seg"])
        assert (mask != case["mask_seg"]).mean() < 0.002
        axis = grid_axis(g["image"].shape[1], case["stepsx"])
        np.testing.assert_allclose(axis, case["map_x"], atol=1e-4)


def test_whole_chain_equals_reference(golden, sub):
    """Every operation once, with the reference's draws, fed from stage to stage."""
    g = sub(golden("seg_augment"), "chain/")
    start = golden("seg_augment")
    image, mask = affine(start["image"], start["mask"], g["0_Affine/matrix"])
    image, mask = image[:, ::-1].copy(), mask[:, ::-1].copy()
    name = "2_RandomBrightnessContrast"
    image = brightness_contrast(image, g[f"{name}/alpha"], g[f"{name}/beta"])
    image = gamma(image, g["3_RandomGamma/gamma"])
    image = add_noise(image, g["4_GaussNoise/gauss"])
    steps = (g["5_GridDistortion/stepsx"], g["5_GridDistortion/stepsy"])
    image, mask = grid_distortion(image, mask, *steps)
    difference = np.abs(image.astype(int) - g["image"].astype(int))
    assert difference.max() <= 8 and difference.mean() < 0.5
    assert (mask != g["mask"]).mean() < 0.004


def test_image_and_mask_move_together():
    """A picture of its own mask stays one, whatever is drawn."""
    y, x = np.mgrid[:48, :64]
    mask = ((y - 20) ** 2 + (x - 40) ** 2 < 150).astype(np.uint8)
    moved = set()
    for seed in range(40):
        # Noise and brightness change grey values, not the place of the edge.
        image, new = augment_pair(
            mask[:, :, None] * 200, mask, np.random.default_rng(seed)
        )
        assert image.shape == (48, 64, 1) and set(np.unique(new)) <= {0, 1}
        if new.any() and not new.all():
            inside, outside = image[new == 1].mean(), image[new == 0].mean()
            assert inside > outside + 25
        moved.add(new.tobytes())
    assert len(moved) > 20


def test_reference_translation_is_one_sided(monkeypatch):
    mask = np.zeros((50, 50), np.uint8)
    mask[25, 25] = 1
    image = np.zeros((50, 50, 1), np.uint8)
    seen = {"reference": [], "symmetric": []}
    import ultradino_jax.evaluators.segmentation.augment as module

    for kind, values in seen.items():

        def record(shape, *, into=values, **draws):
            into.append((draws["translate_x"], draws["translate_y"]))
            return np.eye(3)

        monkeypatch.setattr(module, "affine_matrix", record)
        for seed in range(20):
            augment_pair(image, mask, np.random.default_rng(seed), kind)
    assert set(seen["reference"]) == {(0.2, 0.2)}
    values = np.array(seen["symmetric"])
    assert values.min() < -0.05 and values.max() < 0.2 and len(values) > 3
    with pytest.raises(ValueError, match="translation 'left'"):
        augment_pair(image, mask, np.random.default_rng(0), "left")


def test_overlay_tints_structures_and_nothing_else():
    image = np.full((9, 9), 100, np.uint8)
    mask = np.zeros((9, 9), np.uint8)
    mask[2:7, 2:7], mask[0, 0] = 2, 255
    picture = overlay(image, mask)
    assert (picture[mask != 2] == 100).all()
    assert (picture[2, 2:7] == COLOURS[1]).all()
    inner = 75 + 0.25 * np.array(COLOURS[1])
    np.testing.assert_allclose(picture[4, 4], inner, atol=1)
