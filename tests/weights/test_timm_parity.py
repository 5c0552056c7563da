"""Our forward pass and our exports against timm's, from arrays made once with timm."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from tests.weights.forward import channels_last, forward
from ultradino_jax.exports.formats import write
from ultradino_jax.exports.subject import our_features
from ultradino_jax.weights.families import backbone_from_tensors
from ultradino_jax.weights.files import WeightFile, read_safetensors
from ultradino_jax.weights.load import with_image_size

GOLDEN = Path(__file__).parent.parent / "golden"


def script(name):
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_in(g):
    """What the file holds results of: the part of its keys before the slash."""
    return sorted({key.partition("/")[0] for key in g if "/" in key})


def check_close(pairs, what):
    for got, wanted in pairs:
        error = float(np.abs(got - wanted).max())
        print(f"{what}: max |difference| {error:.2e}")
        assert error < 1e-4, what


def test_features_equal_timm(golden, sub):
    recipe, arrays = script("make_timm_vit"), golden("timm_vit")
    images = recipe.images()
    stride = recipe.PATCH_STRIDE
    for name in names_in(arrays):
        g = sub(arrays, f"{name}/")
        shapes = json.loads(str(g["shapes"]))
        state = {k: recipe.fill(k, tuple(s)) for k, s in shapes.items()}
        backbone = backbone_from_tensors(WeightFile(state))
        registers = shapes.get("reg_token", (1, 0))[1]
        # timm's ViT without LayerScale has iBOT's names.
        family = "timm" if "blocks.0.ls1.gamma" in shapes else "ibot"
        assert backbone.name.startswith(f"{family}_vit")
        assert backbone.model.num_registers == registers
        backbone = with_image_size(backbone, images.shape[-1])
        count = len(g["last4_cls"])
        layers = tuple(range(-count, 0))
        out = forward(backbone, channels_last(images), layers=layers)
        assert np.std(g["last4_patches"]) > 0.3
        check_close(
            [
                (out.cls_token, g["cls"]),
                (out.patch_tokens[:, ::stride], g["patches"]),
                (out.layers[:, :, 0], g["last4_cls"]),
                (out.layers[:, :, 1 + registers :: stride], g["last4_patches"]),
            ],
            name,
        )


def test_timm_computes_our_features_from_our_export(golden, sub, tmp_path):
    """timm was given these very files; its tokens at several batch sizes are ours."""
    recipe, arrays = script("make_timm_export"), golden("timm_export")
    for name in names_in(arrays):
        g = sub(arrays, f"{name}/")
        prefix = int(g["prefix"])
        assert name == f"registers{prefix - 1}"
        backbone, folder = recipe.tiny_backbone(prefix - 1), tmp_path / name
        folder.mkdir()
        write("timm", backbone, folder)
        tensors, _ = read_safetensors(folder / "model.safetensors")
        assert recipe.tensors_sha256(tensors) == str(g["sha256"])
        config = json.loads((folder / "config.json").read_text())
        assert config == json.loads(str(g["config"]))
        cls, patches = our_features(backbone, recipe.images().transpose(0, 2, 3, 1))
        assert np.std(g["tokens"]) > 0.3
        theirs = g["tokens"]
        check_close([(cls, theirs[:, 0]), (patches, theirs[:, prefix:])], name)
