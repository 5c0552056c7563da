import json

import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.evaluators.classification import augment, mixup


def cases(g, kind):
    names = {
        k.split("/")[0] for k in g if k.startswith(kind) and k[len(kind)].isdigit()
    }
    assert names
    return sorted(names)


def test_tables_equal_albumentations(golden):
    g = golden("seg_augment")
    for name in cases(g, "bc"):
        alpha, beta = g[f"{name}/params"]
        ours = augment.brightness_contrast(g["image"], alpha, beta)
        np.testing.assert_array_equal(ours, g[f"{name}/image"])
    for name in cases(g, "gamma"):
        ours = augment.gamma(g["image"], float(g[f"{name}/params"][0]) / 100)
        np.testing.assert_array_equal(ours, g[f"{name}/image"])
        table = augment.gamma(np.arange(256, dtype=np.uint8)[None], 1.0)
        assert (table[0] != np.arange(256)).sum() == 24  # truncation, as there
    for name in cases(g, "noise"):
        ours = augment.add_noise(g["image"], g[f"{name}/noise"])
        np.testing.assert_array_equal(ours, g[f"{name}/image"])


def test_grid_distortion_equals_albumentations(golden):
    g = golden("seg_augment")
    for name in cases(g, "grid"):
        steps_x, steps_y = g[f"{name}/stepsx"], g[f"{name}/stepsy"]
        height, width = g["image"].shape
        x, y = augment.grid_axis(width, steps_x), augment.grid_axis(height, steps_y)
        np.testing.assert_allclose(x, g[f"{name}/map_x"], atol=1e-5)
        np.testing.assert_allclose(y, g[f"{name}/map_y"], atol=1e-5)
        ours = augment.grid_distortion(g["image"], steps_x, steps_y).astype(float)
        # OpenCV 5 rounds the exact value, OpenCV 4 quantises the coordinates.
        exact = g[f"{name}/image_cls_exact"]
        assert np.abs(ours - exact).max() <= 4 and np.abs(ours - exact).mean() < 0.4


def test_augment_draws_every_operation_and_keeps_the_size():
    image = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    views = [augment.augment(image, np.random.default_rng(i)) for i in range(64)]
    assert all(v.shape == image.shape and v.dtype == np.uint8 for v in views)
    same = sum(np.array_equal(v, image) for v in views)
    flipped = sum(np.array_equal(v, image[:, ::-1]) for v in views)
    assert same + flipped < 12  # 64/16 expected without any change but the flip
    again = augment.augment(image, np.random.default_rng(5))
    np.testing.assert_array_equal(again, views[5])


def golden_mixes(g):
    for name, kind, seed, drawn, lam, box, shape in json.loads(str(g["meta"])):
        yield name, kind == "cutmix", seed, drawn, lam, box, shape


def test_mix_draws_equal_timm(golden):
    for _, cutmix, seed, drawn, lam, box, shape in golden_mixes(golden("mixup")):
        mix = mixup.draw_mix(np.random.RandomState(seed), *shape[2:])
        assert mix.cutmix == cutmix
        assert mix.lam == pytest.approx(lam, abs=1e-7)
        if cutmix:
            assert mix.box.tolist() == box
        else:
            assert drawn == lam


def test_mixed_images_and_targets_equal_timm(golden):
    g = golden("mixup")
    for name, _, seed, _, _, _, shape in golden_mixes(g):
        mix = mixup.draw_mix(np.random.RandomState(seed), *shape[2:])
        x = jnp.asarray(np.moveaxis(g[f"{name}/input/x"], 1, -1))
        ours = np.moveaxis(np.asarray(mixup.mix_images(x, mix)), -1, 1)
        np.testing.assert_allclose(ours, g[f"{name}/out/x"], atol=1e-6)
        num_classes = g[f"{name}/out/target"].shape[1]
        targets = mixup.mix_targets(g[f"{name}/input/y"], mix, num_classes)
        np.testing.assert_allclose(targets, g[f"{name}/out/target"], atol=1e-6)


def test_no_mix_changes_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 6, 1)))
    np.testing.assert_array_equal(mixup.mix_images(x, mixup.no_mix()), x)
    hard = mixup.mix_targets(np.array([2, 0]), mixup.no_mix(), 3, smoothing=0.0)
    np.testing.assert_array_equal(hard, np.eye(3)[[2, 0]])
