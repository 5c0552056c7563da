import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.data.datasets.labelled import labelled_images
from ultradino_jax.evaluators.baselines import raw_pixels, untrained
from ultradino_jax.evaluators.classification import linear
from ultradino_jax.evaluators.classification.recipe import (
    Plan,
    epoch_order,
    train_batches,
)
from ultradino_jax.evaluators.features import Features, extract_features
from ultradino_jax.models.vit import ViT
from ultradino_jax.schedules import warmup_cosine
from ultradino_jax.weights.backbone import Backbone


def test_schedule_equals_the_reference(golden):
    g = golden("linear_probe")
    kind = re.compile(r"lr_factor/.*_w(\d+)_T(\d+)")
    found = {key: m for key in g if (m := kind.fullmatch(key))}
    assert found
    for key, match in found.items():
        warmup, total = map(int, match.groups())
        steps = g.get(f"{key}_steps", np.arange(len(g[key])))
        inside = steps <= total
        ours = warmup_cosine(steps[inside], warmup, total)
        np.testing.assert_allclose(ours, g[key][inside], atol=1e-6)
    assert warmup_cosine(500, 230, 460) == 0  # clamped, unlike there
    assert warmup_cosine(0, 0, 5) == 1


def test_plan_counts_as_the_reference():
    plan = Plan(5804, batch_size=128, epochs=10, warmup_epochs=5)
    assert (plan.steps_per_epoch, plan.steps) == (45, 450)
    assert (plan.warmup, plan.total) == (230, 460)
    few = Plan(7, batch_size=128, epochs=3, warmup_epochs=1)
    assert (few.batch_size, few.steps) == (6, 3)
    with pytest.raises(ValueError, match="at least 2 images, there is 1"):
        Plan(1, batch_size=2, epochs=1, warmup_epochs=0)
    order = epoch_order(7, few, 0, 0)
    assert order.shape == (1, 6) and len(set(order.ravel())) == 6


@pytest.mark.parametrize("run", ["hard_const", "soft_const", "soft_sched"])
def test_joint_training_equals_the_reference(golden, run):
    """All classifiers, all steps: losses and weights of the reference's own modules."""
    g = golden("linear_probe")
    meta = json.loads(str(g["meta"]))
    names = [str(n) for n in g["classifier_names"]]
    steps, layers = g["input/cls_tokens"].shape[:2]
    d, patch_d = g["input/cls_tokens"].shape[-1], g["input/patch_tokens"].shape[-1]
    num_classes = g["input/soft_targets"].shape[-1]
    heads = linear.head_grid(layers, learning_rates=meta["lrs"])
    for head, name in zip(heads, names, strict=True):
        rate = f"{head.learning_rate:.5f}".replace(".", "_")
        assert name == (
            f"classifier_{head.num_layers}_blocks_avgpool_{head.avgpool}_lr_{rate}"
        )
    mask = linear.head_mask(heads, layers, d, patch_d)
    kernel = np.zeros((*mask.shape, num_classes), np.float32)
    for k, name in enumerate(names):
        rows = mask[:, k] > 0
        kernel[rows, k] = g[f"param/{name}.linear.weight"].T
    bias = np.stack([g[f"param/{n}.linear.bias"] for n in names])
    state = linear.HeadState(kernel, bias, np.zeros_like(kernel), np.zeros_like(bias))
    saved = list(g["weight_after_steps"])
    step_fn = jax.jit(linear.heads_step)
    for step in range(steps):
        cls = np.swapaxes(g["input/cls_tokens"][step], 0, 1)
        patch = g["input/patch_tokens"][step, -1].mean(axis=1)
        features = Features(cls, patch).assemble(layers, True)
        targets = np.eye(num_classes, dtype=np.float32)[g["input/labels"][step]]
        if run != "hard_const":
            targets = g["input/soft_targets"][step]
        rates = np.float32(g[f"{run}/lr_used"][step])
        if run == "soft_sched":
            base = np.array([h.learning_rate for h in heads])
            warmup = int(re.search(r"warmup (\d+)", meta["sched"])[1])
            ours = base * float(warmup_cosine(step, warmup, steps))
            np.testing.assert_allclose(ours, rates, atol=1e-7)
        state, losses = step_fn(state, features, targets, mask, rates)
        np.testing.assert_allclose(losses, g[f"{run}/losses"][step], atol=2e-6)
        if step + 1 in saved:
            at = saved.index(step + 1)
            for k, name in enumerate(names):
                rows = mask[:, k] > 0
                np.testing.assert_allclose(
                    state.kernel[rows, k].T,
                    g[f"{run}/weight_after/{name}"][at],
                    atol=1e-6,
                )
                assert not np.asarray(state.kernel)[~rows, k].any()
                np.testing.assert_allclose(
                    state.bias[k], g[f"{run}/bias_after/{name}"][at], atol=1e-6
                )


def separable(n, d, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    centers = np.random.default_rng(99).normal(size=(classes, d))
    x = (2 * centers[labels] + rng.normal(size=(n, d))).astype(np.float32)
    cls = np.stack([rng.normal(size=(n, d)).astype(np.float32), x], axis=1)
    return Features(cls, x[:, :3]), labels


def test_cached_training_equals_a_plain_loop():
    """The scanned program against NumPy, one head at a time."""
    train, labels = separable(50, 5, 3, 0)
    val, val_labels = separable(40, 5, 3, 1)
    heads = linear.head_grid(2, learning_rates=(1e-3, 1e-1))
    settings = dict(num_classes=3, heads=heads, seed=4, batch_size=8, epochs=3)
    probe = linear.fit_cached(
        train, labels, val, val_labels, warmup_epochs=1, **settings
    )
    plan = Plan(50, batch_size=8, epochs=3, warmup_epochs=1)
    rows = np.concatenate([epoch_order(50, plan, 4, e) for e in range(3)])
    x, mask = train.assemble(2, True), linear.head_mask(heads, 2, 5, 3)
    start = linear.init_heads(mask, 3, 4)
    best = None
    for k, head in enumerate(heads):
        w, b = np.array(start.kernel[:, k], np.float64), np.zeros(3)
        vw, vb = np.zeros_like(w), np.zeros(3)
        for step, index in enumerate(rows):
            z = x[index] @ w + b
            p = np.exp(z - z.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            g = (p - np.eye(3)[labels[index]]) / len(index)
            lr = head.learning_rate * float(plan.factor(step))
            vw, vb = 0.9 * vw + x[index].T @ g * mask[:, [k]], 0.9 * vb + g.sum(axis=0)
            w, b = w - lr * vw, b - lr * vb
        accuracy = ((val.assemble(2, True) @ w + b).argmax(axis=1) == val_labels).mean()
        if best is None or accuracy > best[0]:
            best = (accuracy, head, w, b)
    assert probe.head == best[1] and probe.val_accuracy == best[0] > 0.8
    np.testing.assert_allclose(probe.kernel, best[2], atol=1e-4)
    np.testing.assert_allclose(probe.bias, best[3], atol=1e-4)
    scores = probe.scores(val)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert (scores.argmax(axis=1) == val_labels).mean() == probe.val_accuracy


def test_the_grid_is_that_of_the_paper():
    heads = linear.head_grid(12)
    assert len(heads) == 52 and len(set(heads)) == 52
    assert {h.num_layers for h in heads} == {1, 4}
    assert len(linear.head_grid(1, has_patches=False)) == 13


def test_labels_outside_of_the_head_are_refused():
    train, labels = separable(20, 4, 3, 0)
    with pytest.raises(ValueError, match=r"labels span 0\.\.2, the head has 2 classes"):
        linear.fit_cached(
            train,
            labels,
            train,
            labels,
            num_classes=2,
            heads=linear.head_grid(2),
            seed=0,
        )


# --- the paper's recipe: images in every step -----------------------------------------


@pytest.fixture(scope="module")
def backbone():
    model = ViT(16, 4, 2, patch_size=8, image_size=16, num_registers=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    return Backbone(model, params, 16, 1, (0.4,), (0.2,), name="small")


@pytest.fixture(scope="module")
def images():
    """Bright discs against dark ones: 24 images of two classes."""
    rng = np.random.default_rng(0)
    pixels = [
        np.clip(rng.normal(60 + 90 * (i % 2), 10, (24, 30)), 0, 255).astype(np.uint8)
        for i in range(24)
    ]
    rows = [
        {"id": f"{i:02d}", "label": "ab"[i % 2], "patient": str(i), "split": "train"}
        for i in range(24)
    ]
    return labelled_images("discs", "1", ("a", "b"), rows, pixels.__getitem__)


def test_paper_recipe_learns_and_repeats(backbone, images):
    val = extract_features(backbone, images, num_layers=4, batch_size=8)
    heads = linear.head_grid(4, learning_rates=(1e-3, 1e-1))
    settings = dict(heads=heads, batch_size=8, epochs=6, warmup_epochs=1)
    probe = linear.fit_paper(backbone, images, val, images.labels, seed=0, **settings)
    assert probe.val_accuracy == 1.0
    again = linear.fit_paper(backbone, images, val, images.labels, seed=0, **settings)
    np.testing.assert_array_equal(probe.kernel, again.kernel)
    other = linear.fit_paper(backbone, images, val, images.labels, seed=1, **settings)
    assert not np.array_equal(probe.kernel, other.kernel)


def test_batches_depend_on_seed_and_step_alone(backbone, images):
    from ultradino_jax.evaluators.features import Preprocess

    plan = Plan(24, batch_size=6, epochs=2, warmup_epochs=0)
    preprocess = Preprocess.of(backbone)
    whole = list(train_batches(images, preprocess, plan, seed=3))
    assert len(whole) == 8
    rest = list(train_batches(images, preprocess, plan, seed=3, start_step=5))
    assert len(rest) == 3
    for a, b in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
        assert a[2].lam == b[2].lam and a[0].shape == (6, 16, 16, 1)
    assert sorted(np.concatenate([b[1] for b in whole[:4]])) == [0] * 12 + [1] * 12


def test_baselines_have_the_same_call(backbone, images):
    pixels = raw_pixels(backbone)
    features = extract_features(pixels, images, batch_size=8)
    assert features.cls.shape == (24, 1, 256) and features.mean_patch.shape == (24, 0)
    from ultradino_jax.evaluators.features import Preprocess

    preprocess = Preprocess.of(backbone)
    expected = preprocess.normalise(preprocess.resize(images[3])).ravel()
    np.testing.assert_allclose(features.cls[3, 0], expected, atol=1e-6)
    random = untrained(backbone, seed=1)
    assert random.digest != backbone.digest == untrained(backbone, seed=0).digest
