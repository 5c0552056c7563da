import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultradino_jax.data.datasets.labelled import labelled_images
from ultradino_jax.evaluators.baselines import untrained
from ultradino_jax.evaluators.classification import finetune as ft
from ultradino_jax.evaluators.classification.classifier import NORM_EPS
from ultradino_jax.evaluators.classification.mixup import soft_cross_entropy
from ultradino_jax.models.layers import NORM_MOMENTUM, batch_norm
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone


def test_head_equals_the_reference(golden):
    """Training steps in their order, then an evaluation."""
    g = golden("finetune_head")
    head = {"kernel": g["param/2.weight"].T, "bias": g["param/2.bias"]}
    stats = ft.NormStats(g["param/1.running_mean"], g["param/1.running_var"])

    def loss_fn(head, cls, stats, targets, train):
        logits, new = ft.apply_head(head, stats, cls, train)
        return soft_cross_entropy(logits, targets).mean(), (logits, new)

    grad_fn = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    steps = sum(k.endswith("/out/loss") for k in g) - 1
    for part in (*(f"train{k}" for k in range(steps)), "eval"):
        train = part != "eval"
        cls, targets = g[f"{part}/input/cls"], g[f"{part}/input/target"]
        bn, *_ = batch_norm(
            jnp.asarray(cls), *stats, train=train, eps=NORM_EPS, momentum=NORM_MOMENTUM
        )
        np.testing.assert_allclose(bn, g[f"{part}/out/bn"], atol=2e-6)
        (loss, (logits, new)), grads = grad_fn(
            head, jnp.asarray(cls), stats, targets, train
        )
        np.testing.assert_allclose(logits, g[f"{part}/out/logits"], atol=2e-6)
        np.testing.assert_allclose(loss, g[f"{part}/out/loss"], atol=2e-6)
        np.testing.assert_allclose(
            grads[0]["kernel"].T, g[f"{part}/grad/2.weight"], atol=1e-6
        )
        np.testing.assert_allclose(
            grads[0]["bias"], g[f"{part}/grad/2.bias"], atol=1e-6
        )
        np.testing.assert_allclose(grads[1], g[f"{part}/grad/cls"], atol=1e-6)
        if train:
            stats = new
            for ours, theirs in zip(stats, ("mean", "var"), strict=True):
                np.testing.assert_allclose(
                    ours, g[f"{part}/after/1.running_{theirs}"], atol=1e-6
                )
    np.testing.assert_allclose(jax.nn.softmax(logits), g["eval/out/softmax"], atol=1e-6)


def test_optimizer_equals_torch(golden):
    g = golden("seg_optim")
    (rate,) = set(g["adamw/const/lr"])  # a constant one
    optimizer = ft.make_optimizer(0, 10**9, float(rate), "reference")
    params = {"w": jnp.asarray(g["adamw/p0"])}
    state = optimizer.init(params)
    pairs = zip(g["adamw/grads"], g["adamw/const/params"], strict=True)
    for grads, expected in pairs:
        updates, state = optimizer.update({"w": jnp.asarray(grads)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], expected, atol=6e-7)


@pytest.fixture(scope="module")
def backbone():
    model = ViT(
        16,
        2,
        2,
        patch_size=8,
        image_size=16,
        num_registers=1,
        drop_path=0.3,
        layerscale=1.0,
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    return Backbone(model, params, 16, 1, (0.4,), (0.2,), name="small")


@pytest.fixture(scope="module")
def images():
    """24 training and 8 validation images, dark (class 0) and bright."""
    rng = np.random.default_rng(0)
    pixels = []
    for i in range(32):
        image = rng.normal(60 + 90 * (i % 2), 10, (24, 30))
        pixels.append(np.clip(image, 0, 255).astype(np.uint8))
    rows = [
        {
            "id": f"{i:02d}",
            "label": "ab"[i % 2],
            "patient": str(i),
            "split": "train" if i < 24 else "val",
        }
        for i in range(32)
    ]
    return labelled_images("halves", "1", ("a", "b"), rows, pixels.__getitem__)


def test_intended_rates_are_layerwise_and_the_references_are_not(backbone):
    params = {"backbone": backbone.params, "head": {"kernel": jnp.ones((16, 2))}}
    grads = jax.tree.map(jnp.ones_like, params)

    def first_step(layerwise):
        optimizer = ft.make_optimizer(0, 2, 1.0, layerwise)
        zeros = jax.tree.map(jnp.zeros_like, params)  # no decay to see
        state = optimizer.init(zeros)
        return jax.jit(optimizer.update)(grads, state, zeros)[0]

    flat = jax.tree.leaves(first_step("reference"))
    for update in flat:
        np.testing.assert_allclose(update, -1, atol=1e-5)
    layered = first_step("intended")
    kernel = layered["backbone"]["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(kernel[0], -(0.65**2), atol=1e-5)
    np.testing.assert_allclose(kernel[1], -0.65, atol=1e-5)
    patch = layered["backbone"]["patch_embed"]["kernel"]
    np.testing.assert_allclose(patch, -0.2 * 0.65**3, atol=1e-5)
    np.testing.assert_allclose(layered["head"]["kernel"], -1, atol=1e-5)
    with pytest.raises(ValueError, match="choose 'reference' or 'intended'"):
        ft.make_optimizer(0, 2, 1.0, "none")


def run(backbone, images, workdir, epochs=8, **changes):
    recipe = ft.Recipe(
        batch_size=8,
        epochs=epochs,
        warmup_epochs=1,
        learning_rate=3e-3,
        checkpoint_every=4,
    )
    recipe = dataclasses.replace(recipe, **changes)
    train, val = images.split("train"), images.split("val")
    return ft.finetune(backbone, train, val, recipe, seed=0, workdir=workdir)


@pytest.fixture(scope="module")
def whole(backbone, images, tmp_path_factory):
    """(a training that was never stopped, its workdir)."""
    folder = tmp_path_factory.mktemp("whole")
    return run(backbone, images, folder), folder


@pytest.fixture(scope="module")
def tuned(whole):
    return whole[0]


def test_it_learns_and_keeps_the_best_epoch(tuned, images):
    val = images.split("val")
    f1 = [h["val_macro_f1"] for h in tuned.history]
    assert len(f1) == 8 and tuned.val_f1 == max(f1) > 0.8
    assert tuned.best_epoch == f1.index(max(f1))
    assert ft.validation_f1(tuned, val) == tuned.val_f1
    scores = tuned.scores(val, batch_size=3)
    assert scores.shape == (8, 2)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]


def test_a_stopped_run_goes_on_to_the_same_end(
    tuned, backbone, images, tmp_path, monkeypatch
):
    seen = []
    original = ft.validation_f1

    def stop_in_epoch_six(model, val):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return original(model, val)

    monkeypatch.setattr(ft, "validation_f1", stop_in_epoch_six)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, images, tmp_path)
    monkeypatch.setattr(ft, "validation_f1", original)
    again = run(backbone, images, tmp_path)  # from the checkpoint after four epochs
    assert [h["val_macro_f1"] for h in again.history] == [
        h["val_macro_f1"] for h in tuned.history
    ]
    for a, b in zip(
        jax.tree.leaves(again.params), jax.tree.leaves(tuned.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_read_back_or_refused(whole, backbone, images):
    tuned, folder = whole
    assert run(backbone, images, folder).history == tuned.history
    with pytest.raises(ValueError, match=r"a fine-tuning with .*\(backbone: "):
        run(untrained(backbone, seed=7), images, folder)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.003 there, 0\.001 now"):
        run(backbone, images, folder, learning_rate=1e-3)
    # How often the state is kept changes no number.
    assert run(backbone, images, folder, checkpoint_every=1).history == tuned.history


def test_a_classifier_whose_settings_were_listed_is_the_same_job(
    whole, backbone, images, tmp_path
):
    """Before they had names, settings were recorded in an order."""
    tuned, folder = whole
    shutil.copytree(folder / "classifier", tmp_path / "classifier")
    path = tmp_path / "classifier" / "classifier.json"
    record = json.loads(path.read_text())
    record["identity"]["settings"] = [0, "reference", 3e-3, 0.65, 8, 8, 1, False]
    path.write_text(json.dumps(record))
    assert run(backbone, images, tmp_path).history == tuned.history
    with pytest.raises(ValueError, match=r"settings\.epochs: 8 there, 9 now"):
        run(backbone, images, tmp_path, epochs=9)
