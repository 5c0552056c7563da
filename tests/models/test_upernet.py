"""UperNet against the reference's own modules (arrays made by mmsegmentation)."""

import functools
import math
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from tests.sizes import below, vit_of
from ultradino_jax.evaluators.segmentation.loss import cross_entropy, dice_loss
from ultradino_jax.models.upernet import (
    POOL_SCALES,
    Neck,
    UPerHead,
    UperNet,
    default_taps,
    pooling_matrix,
    resize,
)
from ultradino_jax.models.usfm import USFM
from ultradino_jax.models.vit import ViT, build_vit
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.meta import nest, vit_params

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "seg_neck_head.npz")
VIT = vit_of(below(GOLDEN, "param/backbone."), num_heads=3, layerscale=1.0)
CLASSES, CHANNELS = GOLDEN["param/decode_head.conv_seg.weight"].shape[:2]
MODEL = UperNet(VIT, CLASSES, taps=default_taps(VIT.depth), channels=CHANNELS)


def last(x):
    return rearrange(jnp.asarray(x), "b c h w -> b h w c")


def names_of_decoder():
    """{our name: (reference name, kind)} of neck and head."""
    names = {
        "neck/up1a": ("backbone.fpn1.0", "up"),
        "neck/norm": ("backbone.fpn1.1", "norm"),
        "neck/up1b": ("backbone.fpn1.3", "up"),
        "neck/up2": ("backbone.fpn2.0", "up"),
        "head/bottleneck/conv": ("decode_head.bottleneck.conv", "conv"),
        "head/fusion/conv": ("decode_head.fpn_bottleneck.conv", "conv"),
        "head/classifier": ("decode_head.conv_seg", "conv"),
    }
    for i in range(4):
        names[f"head/pool_{i}/conv"] = (f"decode_head.psp_modules.{i}.1.conv", "conv")
    for i in range(3):
        names[f"head/lateral_{i}/conv"] = (
            f"decode_head.lateral_convs.{i}.conv", "conv",
        )  # fmt: skip
        names[f"head/fpn_{i}/conv"] = (f"decode_head.fpn_convs.{i}.conv", "conv")
    return names


ORDER = {"up": "i o p q -> i p q o", "conv": "o i p q -> p q i o", "norm": "d -> d"}


def variables_of(state):
    flat = {}
    for ours, (theirs, kind) in names_of_decoder().items():
        leaf = "scale" if kind == "norm" else "kernel"
        flat[f"{ours}/{leaf}"] = rearrange(state[f"{theirs}.weight"], ORDER[kind])
        flat[f"{ours}/bias"] = state[f"{theirs}.bias"]
    backbone = {
        k.removeprefix("backbone."): v
        for k, v in state.items()
        if k.startswith("backbone.") and ".fpn" not in k
    }
    stats = {
        "mean": state["backbone.fpn1.1.running_mean"],
        "var": state["backbone.fpn1.1.running_var"],
    }
    return {
        "params": {"backbone": vit_params(backbone), **nest(flat)},
        "batch_stats": {"neck": {"norm": stats}},
    }


@pytest.fixture(scope="module")
def reference(golden, sub):
    g = golden("seg_neck_head")
    return g, variables_of(sub(g, "param/"))


def close(ours, theirs, tolerance=2e-5):
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max())


def test_forward_equals_reference(reference):
    g, variables = reference
    logits = jax.jit(MODEL.apply)(variables, last(g["in/image"]))
    close(logits, last(g["eval/logits_full"]))
    assert (np.argmax(logits, -1) == g["eval/pred"]).mean() > 0.999
    expected = jax.eval_shape(MODEL.init, jax.random.key(0), last(g["in/image"]))
    shapes = {k: v.shape for k, v in flat_names(expected).items()}
    assert shapes == {k: v.shape for k, v in flat_names(variables).items()}


def test_neck_and_head_stages_equal_reference(reference):
    g, variables = reference
    neck = {k: v["neck"] for k, v in variables.items()}
    taps = [last(g[f"eval/tap{i}"]) for i in range(1, 5)]
    levels = jax.jit(lambda x: Neck().apply(neck, x, False))(taps)
    for i, level in enumerate(levels, 1):
        close(level, last(g[f"eval/neck{i}"]))
    params = {"params": variables["params"]["head"]}

    @functools.partial(jax.jit, static_argnames="method")
    def head(x, method="__call__"):
        return UPerHead(CLASSES, CHANNELS).apply(params, x, False, method=method)

    close(head(levels), last(g["eval/logits"]))
    close(head(levels, "features"), last(g["eval/fused"]))
    odd = [last(g[f"in/odd{i}"]) for i in range(1, 5)]
    close(head(odd), last(g["odd/logits"]))
    close(head(last(g["in/ppm7"]), "pyramid_pooling"), last(g["ppm7/out"]))


def test_training_loss_gradients_and_statistics_equal_reference(reference):
    g, variables = reference
    model = MODEL.clone(dropout=0.0)
    labels = jnp.asarray(g["in/label"])

    @jax.jit
    def loss_fn(params, images):
        logits, new = model.apply(
            {**variables, "params": params}, images, train=True, mutable="batch_stats"
        )
        ce, dice = cross_entropy(logits, labels), dice_loss(logits, labels)
        return ce + dice, (ce, dice, new["batch_stats"])

    grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    (total, (ce, dice, stats)), grads = jax.jit(grad)(
        variables["params"], last(g["in/image"])
    )
    np.testing.assert_allclose(ce, g["train/loss_ce"], rtol=1e-5)
    np.testing.assert_allclose(dice, g["train/loss_dice"], rtol=1e-5)
    np.testing.assert_allclose(total, g["train/loss_total"], rtol=1e-5)
    norm = stats["neck"]["norm"]
    close(norm["mean"], g["train/running_mean_after"])
    close(norm["var"], g["train/running_var_after"])
    params, images = grads
    close(images, last(g["train/grad_image"]), 1e-4)
    ours = flat_names(params)
    compared = 0
    for name, (theirs, kind) in names_of_decoder().items():
        leaf = "scale" if kind == "norm" else "kernel"
        key = f"train/grad/{theirs}.weight"
        if key in g:
            close(ours[f"{name}/{leaf}"], rearrange(g[key], ORDER[kind]), 1e-4)
        else:
            l2, total, largest = g[f"train/gradstat/{theirs}.weight"]
            x = np.asarray(ours[f"{name}/{leaf}"])
            np.testing.assert_allclose(np.linalg.norm(x), l2, rtol=1e-4)
            np.testing.assert_allclose(np.abs(x).max(), largest, rtol=1e-4)
        if name != "neck/up1a":  # a bias before a batch norm has gradient 0
            close(ours[f"{name}/bias"], g[f"train/grad/{theirs}.bias"], 1e-4)
        compared += 1
    assert compared == len(names_of_decoder())
    np.testing.assert_allclose(ours["neck/up1a/bias"], 0, atol=1e-6)
    # One stacked parameter in full, by its reference names.
    for block in range(VIT.depth):
        key = f"train/grad/backbone.blocks.{block}.norm2.bias"
        close(ours["backbone/blocks/norm2/bias"][block], g[key], 1e-4)


def test_dropout_is_by_channel(reference):
    g, variables = reference
    head = UPerHead(CLASSES, CHANNELS, dropout=0.5)
    params = {"params": variables["params"]["head"]}
    levels = [last(g[f"eval/neck{i}"]) for i in range(1, 5)]
    fused = last(g["eval/fused"])
    mask = g["dropout/mask"][:, None, None]
    kernel = params["params"]["classifier"]
    logits = (fused * mask) @ kernel["kernel"][0, 0] + kernel["bias"]
    close(logits, last(g["dropout/logits"]))
    # What the head does with its own mask is the same on all pixels of a channel.
    _, kept = head.apply(
        params,
        levels,
        True,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda m, _: m.name == "drop",
    )
    dropped = kept["intermediates"]["drop"]["__call__"][0]
    share = np.asarray(dropped).sum((1, 2)) / np.asarray(fused).sum((1, 2))
    assert {round(float(v), 2) for v in share.ravel()} == {0.0, 2.0}
    scaled = np.asarray(fused) * np.round(share)[:, None, None]
    np.testing.assert_allclose(dropped, scaled, atol=1e-4)


def test_parameter_counts_equal_the_arithmetic():
    """ViT-S/16, 5 classes: 40,214,021 with the backbone, as the reference counts."""
    model = UperNet(build_vit("small", num_registers=0, layerscale=1.0), num_classes=5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 1)))
    count = {
        part: sum(x.size for x in jax.tree.leaves(tree))
        for part, tree in shapes["params"].items()
    }
    d = 384
    assert count["neck"] == 3 * (4 * d * d + d) + 2 * d
    convs = [(d, 1)] * 4 + [(5 * d, 3)] + [(d, 1)] * 3 + [(d, 3)] * 3 + [(4 * d, 3)]
    head = sum(k * k * i * d + d for i, k in convs) + 5 * d + 5
    assert count["head"] == head
    assert sum(count.values()) == 40_214_021


@pytest.mark.parametrize("size", [1, 2, 5, 7, 14])
def test_pooling_and_resizing_equal_plain_statements(size):
    x = np.random.default_rng(size).normal(size=(1, size, size, 3)).astype(np.float32)
    for scale in POOL_SCALES:
        ours = np.einsum("ih,bhwc->biwc", pooling_matrix(size, scale), x)
        for i in range(scale):
            cell = slice(
                math.floor(i * size / scale), math.ceil((i + 1) * size / scale)
            )
            np.testing.assert_allclose(ours[:, i], x[:, cell].mean(1), atol=1e-6)
        up = cv2.resize(x[0], (size + 4, size + scale))
        np.testing.assert_allclose(
            resize(jnp.asarray(x), size + scale, size + 4)[0], up, atol=1e-5
        )


def test_usfm_is_a_backbone_too():
    usfm = USFM(embed_dim=16, depth=2, num_heads=2, patch_size=8, image_size=32)
    model = UperNet(usfm, num_classes=3, taps=default_taps(2))
    x = jnp.zeros((2, 32, 32, 3))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (2, 32, 32, 3)
    assert set(variables["params"]) == {"backbone", "neck", "head"}


def test_registers_other_depths_and_norms():
    assert default_taps(12) == (3, 5, 7, 11) and default_taps(24) == (7, 11, 15, 23)
    model = UperNet(
        ViT(16, 2, 2, patch_size=8, image_size=32, num_registers=3),
        num_classes=3,
        taps=default_taps(2),
        norm="batch",
    )
    x = jnp.zeros((2, 24, 32, 1))
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert logits.shape == (2, 24, 32, 3)
    assert set(variables["batch_stats"]["head"]["fusion"]) == {"norm"}
    for wrong, message in (({"norm": "group"}, "norm='group'"),
                           ({"taps": (1,)}, "four taps")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.clone(**wrong).init, jax.random.key(0), x)
