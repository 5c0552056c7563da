"""Our forward pass against timm's, from arrays made once by make_timm_vit.py."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.interop.families import backbone_from_tensors
from ultradino_jax.interop.files import WeightFile
from ultradino_jax.interop.load import with_image_size

SCRIPT = Path(__file__).parent.parent / "golden" / "make_timm_vit.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_timm_vit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
