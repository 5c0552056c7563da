"""Families against arrays that their own libraries computed; and what is refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from einops import rearrange

from ultradino_jax.backbone import Backbone, save_backbone
from ultradino_jax.models.vit import ViT
from ultradino_jax.tree import flat_names
from ultradino_jax.weights import naming
from ultradino_jax.weights.families import (
    IMAGENET,
    backbone_from_tensors,
)
from ultradino_jax.weights.files import WeightFile, read_weights
from ultradino_jax.weights.load import (
    load_backbone_file,
    with_channels,
    with_image_size,
)
from ultradino_jax.weights.meta import vit_params, vit_state
from ultradino_jax.weights.safetensors import read_safetensors, write_safetensors

HF_CONFIG = {
    "model_type": "dinov2_with_registers",
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
}


def channels_last(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


def run(backbone, images, masks=None, layers=None):
    apply = jax.jit(backbone.model.apply, static_argnames=("layers",))
    return apply({"params": backbone.params}, images, masks, layers=layers)


def hf_folder(folder, tensors, config=HF_CONFIG, **files):
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def hf(golden, sub):
    g = golden("dinov2_hf")
    registers = sub(g, "param/")
    plain = {k: v for k, v in registers.items() if k != "embeddings.register_tokens"}
    return g, {"registers": registers, "plain": plain}


@pytest.mark.parametrize("kind, num_registers", [("registers", 4), ("plain", 0)])
@pytest.mark.parametrize("size", ["56x56", "84x84", "56x84"])
def test_hugging_face_folder_equals_transformers(
    hf, tmp_path, kind, num_registers, size
):
    g, tensors = hf
    backbone = load_backbone_file(hf_folder(tmp_path / "hf", tensors[kind]))
    assert backbone.model.num_registers == num_registers
    assert (backbone.image_size, backbone.channels) == (56, 3)
    assert (backbone.mean, backbone.std) == IMAGENET
    out = run(backbone, channels_last(g[f"input/{size}"]), layers=(0, 1, 2))
    hidden = g[f"{kind}/{size}/last_hidden_state"]
    np.testing.assert_allclose(out.cls_token, hidden[:, 0], atol=2e-5)
    first = 1 + num_registers
    np.testing.assert_allclose(out.register_tokens, hidden[:, 1:first], atol=2e-5)
    np.testing.assert_allclose(out.patch_tokens, hidden[:, first:], atol=2e-5)
    if size == "56x56":
        states = g[f"{kind}/{size}/hidden_states"][1:]
        raw = backbone.model.apply(
            {"params": backbone.params},
            channels_last(g[f"input/{size}"]),
            layers=(0, 1, 2),
            norm_layers=False,
        )
        np.testing.assert_allclose(raw.layers, states, atol=2e-5)
    if size == "84x84":  # resized once instead of in every pass
        resized = load_backbone_file(tmp_path / "hf", image_size=84)
        assert resized.model.image_size == 84
        pos = g[f"{kind}/{size}/pos_embed"]
        np.testing.assert_allclose(resized.params["pos_embed"], pos, atol=2e-5)
        tokens = run(resized, channels_last(g[f"input/{size}"])).cls_token
        np.testing.assert_allclose(tokens, hidden[:, 0], atol=2e-5)


def test_mask_token_equals_transformers(hf, tmp_path):
    g, tensors = hf
    backbone = load_backbone_file(hf_folder(tmp_path / "hf", tensors["registers"]))
    masks = jnp.asarray(g["masked/bool_masked_pos"])
    out = run(backbone, channels_last(g["input/56x56"]), masks)
    hidden = g["masked/last_hidden_state"]
    np.testing.assert_allclose(out.patch_tokens, hidden[:, 5:], atol=2e-5)


def timm_state(g, sub):
    return naming.to_timm(
        naming.from_hf(sub(g, "param/"))
        | {"pos_embed": g["param/embeddings.position_embeddings"]},
        class_position=False,
    )


@pytest.mark.parametrize("size", ["56x56", "84x84"])
def test_timm_names_equal_timm(golden, sub, size):
    g = golden("dinov2_hf")
    state = timm_state(g, sub)
    # The arrays were made without adding the class position to the class token.
    state["cls_token"] = g["param/embeddings.cls_token"]
    assert sorted(state) == sorted(g["timm/names"])
    shapes = json.loads(str(g["timm/shapes"]))
    assert {k: list(x.shape) for k, x in state.items()} == shapes
    backbone = backbone_from_tensors(WeightFile(state), num_heads=3)
    out = run(backbone, channels_last(g[f"input/{size}"]))
    tokens = g[f"timm/{size}/forward_features"]
    np.testing.assert_allclose(out.cls_token, tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(out.register_tokens, tokens[:, 1:5], atol=2e-5)
    np.testing.assert_allclose(out.patch_tokens, tokens[:, 5:], atol=2e-5)


@pytest.mark.parametrize("size", ["64x64", "96x96", "48x48", "64x96", "32x128"])
def test_ibot_equals_the_official_model(golden, sub, size):
    g = golden("ibot_vit")
    backbone = backbone_from_tensors(WeightFile(sub(g, "param/")), num_heads=3)
    assert backbone.name == "ibot_vit48x3_16"
    assert backbone.model.num_registers == 0 and backbone.model.layerscale is None
    out = run(backbone, channels_last(g[f"{size}/input/x"]), layers=(-2, -1))
    np.testing.assert_allclose(out.cls_token, g[f"{size}/out/cls"], atol=3e-5)
    np.testing.assert_allclose(out.patch_tokens, g[f"{size}/out/patch"], atol=3e-5)
    for i in range(2):
        theirs = g[f"{size}/out/get_intermediate_layers/n2/{i}"]
        np.testing.assert_allclose(out.layers[i], theirs, atol=3e-5)
    height, width = (int(x) for x in size.split("x"))
    if height == width:
        pos = with_image_size(backbone, height).params["pos_embed"]
        np.testing.assert_allclose(pos, g[f"{size}/out/pos_embed"], atol=2e-5)


def test_ibot_pretraining_variant_equals_the_official_model(golden, sub):
    g = golden("ibot_vit")
    state = sub(g, "param/") | sub(g, "masked/param/")
    backbone = backbone_from_tensors(WeightFile(state), num_heads=3)
    masks = jnp.asarray(g["masked/input/mask"].reshape(2, 16))
    out = run(backbone, channels_last(g["64x64/input/x"]), masks)
    tokens = g["masked/out/tokens"]
    np.testing.assert_allclose(out.cls_token, tokens[:, 0], atol=3e-5)
    np.testing.assert_allclose(out.patch_tokens, tokens[:, 1:], atol=3e-5)


def test_usfm_is_recognised_and_resized(golden, sub, tmp_path):
    g = golden("usfm_vit")
    write_safetensors(tmp_path / "usfm.safetensors", sub(g, "param/"), {})
    backbone = load_backbone_file(tmp_path / "usfm.safetensors")
    assert (backbone.name, backbone.mean) == ("usfm_vit48x3_16", IMAGENET[0])
    assert "fc_norm" in backbone.source and "head" in backbone.source
    out = run(backbone, channels_last(g["input/x"]))
    np.testing.assert_allclose(out.cls_token, g["out/pooled_mean"], atol=2e-5)
    grown = with_image_size(backbone, 80)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 80, 80, 3)), jnp.float32)
    late = run(backbone, x).cls_token
    np.testing.assert_allclose(run(grown, x).cls_token, late, atol=1e-5)


def test_grey_and_colour_kernels_agree_on_grey_images(golden, sub):
    g = golden("ibot_vit")
    colour = backbone_from_tensors(WeightFile(sub(g, "param/")), num_heads=3)
    grey = with_channels(colour, 1)
    assert (grey.channels, grey.model) == (1, colour.model)
    np.testing.assert_allclose(grey.mean[0], np.mean(IMAGENET[0]))
    x = channels_last(g["64x64/input/x"])[..., :1]
    replicated = run(colour, jnp.repeat(x, 3, axis=-1)).cls_token
    np.testing.assert_allclose(run(grey, x).cls_token, replicated, atol=1e-5)
    back = with_channels(grey, 3)
    assert len(back.mean) == len(back.std) == 3
    same = run(back, jnp.repeat(x, 3, axis=-1)).cls_token
    np.testing.assert_allclose(same, replicated, atol=1e-5)
    with pytest.raises(ValueError, match="cannot turn 3 input channels into 2"):
        with_channels(colour, 2)
    with pytest.raises(ValueError, match="100 is not a multiple of the patch size 16"):
        with_image_size(colour, 100)


def reference_vit(golden, sub):
    """One-channel UltraDINO weights in the reference's naming."""
    return sub(golden("vit"), "param/")


def test_state_dict_round_trips_are_bit_equal(golden, sub):
    state = reference_vit(golden, sub)
    back = vit_state(vit_params(state), patch_size=16)
    assert back.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x)
    for forth in (naming.to_hf(state), naming.hf_file_names(naming.to_hf(state))):
        again = naming.from_hf(forth)
        assert again.keys() == state.keys()
        assert all(np.array_equal(again[k], state[k]) for k in state)


def test_version_5_names_in_memory_are_the_files_names(golden, sub):
    g = golden("dinov2_hf")
    names = json.loads(str(g["names/memory_v5_to_disk"]))
    x = np.zeros(1)
    for memory, disk in names.items():
        assert list(naming.hf_file_names({memory: x})) == [disk]
    assert sorted(names.values()) == sorted(sub(g, "param/"))


def test_prefixes_chunks_and_training_state_are_cut(golden, sub, tmp_path):
    state = reference_vit(golden, sub)
    path = tmp_path / "model.safetensors"
    head = {"mlp.0.weight": np.ones((4, 64)), "last_layer.weight_g": np.ones((8, 1))}
    chunked = {
        k.replace("blocks.", "blocks.0.", 1) if k.startswith("blocks.") else k: x
        for k, x in state.items()
    }
    files = [
        {f"module.{k}": x for k, x in state.items()},
        {f"backbone.{k}": x for k, x in chunked.items()}
        | {f"dino_head.{k}": x for k, x in head.items()},
        {f"teacher.backbone.{k}": x for k, x in state.items()}
        | {f"student.backbone.{k}": x + 1 for k, x in state.items()}
        | {"dino_loss.center": np.zeros((1, 8))},
    ]
    for tensors in files:
        tensors = {k: x.astype(np.float32) for k, x in tensors.items()}
        write_safetensors(path, tensors, {})
        file = read_weights(path)
        backbone = backbone_from_tensors(file, num_heads=2, source="file")
        assert backbone.name == "ultradino_vit64x3_16_reg4"
        assert (backbone.mean, backbone.channels) == ((0.1842924807,), 1)
        assert (backbone.model.pos_offset, backbone.model.pos_antialias) == (0.1, False)
        for name, x in flat_names(vit_params(state)).items():
            np.testing.assert_array_equal(flat_names(backbone.params)[name], x)
    left_out = f"(left out: dino_loss, student ({len(state)}))"
    assert backbone.source == f"file {left_out}"


def test_own_backbones_load_too(golden, sub, tmp_path):
    model = ViT(64, 3, 2, image_size=64)
    params = vit_params(reference_vit(golden, sub))
    backbone = Backbone(model, params, 64, 1, (0.2,), (0.3,), "mine")
    save_backbone(tmp_path / "run" / "backbone", backbone)
    loaded = load_backbone_file(tmp_path / "run", image_size=32, channels=3)
    assert (loaded.image_size, loaded.mean) == (32, (0.2,) * 3)
    assert loaded.params["pos_embed"].shape == (1, 5, 64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_widened(hf, tmp_path, dtype):
    _, tensors = hf
    small = {k: x.astype(dtype) for k, x in tensors["registers"].items()}
    backbone = load_backbone_file(hf_folder(tmp_path / "hf", small))
    for leaf in jax.tree.leaves(backbone.params):
        assert leaf.dtype == np.float32
    bias = tensors["registers"]["layernorm.bias"]
    expected = bias.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(backbone.params["norm"]["bias"], expected)


def test_safetensors_keeps_dtypes_shapes_and_metadata(tmp_path):
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.float32(3.0).reshape(()),
        "c": np.ones((2, 0), np.int64),
        "d": np.array([1.5, 2.5], ml_dtypes.bfloat16),
        "e": np.array([True, False]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    back, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (back[name].dtype, back[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(back[name], x)
