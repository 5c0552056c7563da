"""Our forward pass and our exports against timm's, from arrays made once with timm."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.export import our_features
from ultradino_jax.exports.backbones import write
from ultradino_jax.weights.families import backbone_from_tensors
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.load import with_image_size
from ultradino_jax.weights.safetensors import read_safetensors

GOLDEN = Path(__file__).parent.parent / "golden"


def script(name):
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return script("make_timm_vit")


@pytest.mark.parametrize(
    "name, ours",
    [
        ("vit_small_patch16_224", "ibot_vits16"),
        ("vit_base_patch14_reg4_dinov2", "timm_vitb14_reg4"),
    ],
)
def test_features_equal_timm(golden, sub, recipe, name, ours):
    g = sub(golden("timm_vit"), f"{name}/")
    shapes = json.loads(str(g["shapes"]))
    state = {k: recipe.fill(k, tuple(s)) for k, s in shapes.items()}
    backbone = backbone_from_tensors(WeightFile(state))
    assert backbone.name == ours
    backbone = with_image_size(backbone, 224)
    images = jnp.asarray(recipe.images().transpose(0, 2, 3, 1))
    apply = jax.jit(backbone.model.apply, static_argnames=("layers",))
    out = apply({"params": backbone.params}, images, layers=(-4, -3, -2, -1))
    first = 1 + backbone.model.num_registers
    assert np.std(g["last4_patches"]) > 0.3
    for got, wanted in [
        (out.cls_token, g["cls"]),
        (out.patch_tokens[:, ::49], g["patches"]),
        (out.layers[:, :, 0], g["last4_cls"]),
        (out.layers[:, :, first::49], g["last4_patches"]),
    ]:
        error = float(np.abs(got - wanted).max())
        print(f"{name}: max |difference| {error:.2e}")
        assert error < 1e-4


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_computes_our_features_from_our_export(golden, sub, tmp_path, registers):
    """timm was given these very files; its tokens at batch 1 and 5 are ours."""
    recipe = script("make_timm_export")
    g = sub(golden("timm_export"), f"registers{registers}/")
    backbone = recipe.tiny_backbone(registers)
    write("timm", backbone, tmp_path, None)
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    assert recipe.tensors_sha256(tensors) == str(g["sha256"])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads(str(g["config"]))
    images = recipe.images().transpose(0, 2, 3, 1)
    cls, patches = our_features(backbone, images)
    assert g["prefix"] == 1 + registers and np.std(g["tokens"]) > 0.3
    for got, wanted in [
        (cls, g["tokens"][:, 0]),
        (patches, g["tokens"][:, 1 + registers :]),
    ]:
        error = float(np.abs(got - wanted).max())
        print(f"{registers} registers: max |difference| {error:.2e}")
        assert error < 1e-4
