"""Families against arrays that their own libraries computed."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.forward import (
    HuggingFace,
    channels_last,
    forward,
    hf_folder,
    meta_of,
    sides,
)
from ultradino_jax.models.vit import ViT
from ultradino_jax.normalization import FUS, IMAGENET
from ultradino_jax.tree import flat_names
from ultradino_jax.weights import hf as hf_names
from ultradino_jax.weights import timm as timm_names
from ultradino_jax.weights.backbone import Backbone, save_backbone
from ultradino_jax.weights.families import backbone_from_tensors
from ultradino_jax.weights.files import WeightFile, read_weights, write_safetensors
from ultradino_jax.weights.load import load_backbone, with_channels, with_image_size
from ultradino_jax.weights.meta import vit_params, vit_state

close = functools.partial(np.testing.assert_allclose, atol=2e-5)


@pytest.fixture(scope="module")
def hf(golden, sub):
    return HuggingFace(golden("dinov2_hf"), sub)


@pytest.fixture(scope="module")
def ibot(golden, sub):
    """(arrays, sizes of the model, backbone)."""
    g = golden("ibot_vit")
    meta = meta_of(g)
    file = WeightFile(sub(g, "param/"))
    return g, meta, backbone_from_tensors(file, num_heads=meta["heads"])


@pytest.mark.parametrize("kind", ["registers", "plain"])
def test_hugging_face_folder_equals_transformers(hf, tmp_path, kind):
    backbone = load_backbone(hf.folder(tmp_path / "hf", kind))
    side, first = hf.meta["img"], 1 + hf.registers[kind]
    assert backbone.model.num_registers == hf.registers[kind]
    assert (backbone.image_size, backbone.channels) == (side, 3)
    assert (backbone.mean, backbone.std) == IMAGENET
    layers = tuple(range(hf.meta["layers"]))
    for size in hf.sizes:
        g = {k: hf.g.get(f"{kind}/{size}/{k}") for k in ("hidden_states", "pos_embed")}
        # Features of the blocks are compared before the final norm, as they are kept.
        raw = forward(backbone, hf.images(size), layers=layers, norm_layers=False)
        hidden = hf.g[f"{kind}/{size}/last_hidden_state"]
        close(raw.cls_token, hidden[:, 0])
        close(raw.register_tokens, hidden[:, 1:first])
        close(raw.patch_tokens, hidden[:, first:])
        if g["hidden_states"] is not None:
            close(raw.layers, g["hidden_states"][1:])
        height, width = sides(size)
        if height == width != side:  # resized once instead of in every pass
            resized = load_backbone(tmp_path / "hf", image_size=height)
            assert resized.model.image_size == height
            close(resized.params["pos_embed"], g["pos_embed"])
            if kind == "registers":
                close(forward(resized, hf.images(size)).cls_token, hidden[:, 0])


def test_mask_token_equals_transformers(hf, tmp_path):
    backbone = load_backbone(hf.folder(tmp_path / "hf"))
    masks = jnp.asarray(hf.g["masked/bool_masked_pos"])
    out = forward(backbone, hf.images(), masks)
    hidden = hf.g["masked/last_hidden_state"]
    close(out.patch_tokens, hidden[:, 1 + hf.meta["registers"] :])


def test_timm_names_equal_timm(hf):
    g, tensors = hf.g, hf.tensors["registers"]
    positions = tensors["embeddings.position_embeddings"]
    state = hf_names.from_hf(tensors) | {"pos_embed": positions}
    state = timm_names.to_timm(state, class_position=False)
    # The arrays were made without adding the class position to the class token.
    state["cls_token"] = tensors["embeddings.cls_token"]
    assert sorted(state) == sorted(g["timm/names"])
    shapes = json.loads(str(g["timm/shapes"]))
    assert {k: list(x.shape) for k, x in state.items()} == shapes
    backbone = backbone_from_tensors(WeightFile(state), num_heads=hf.meta["heads"])
    first, layers = 1 + hf.meta["registers"], tuple(range(hf.meta["layers"]))
    for size in hf.sizes:
        if f"timm/{size}/forward_features" not in g:
            continue
        # As in the test of transformers, so that the program is there already.
        images = hf.images(size)
        out = forward(backbone, images, layers=layers, norm_layers=False)
        tokens = g[f"timm/{size}/forward_features"]
        close(out.cls_token, tokens[:, 0])
        close(out.register_tokens, tokens[:, 1:first])
        close(out.patch_tokens, tokens[:, first:])


def test_ibot_equals_the_official_model(ibot):
    g, meta, backbone = ibot
    name = f"{meta['embed_dim']}x{meta['depth']}_{meta['patch']}"
    assert backbone.name == f"ibot_vit{name}"
    assert backbone.model.num_registers == 0 and backbone.model.layerscale is None
    for key in [k for k in g if k.endswith("/input/x")]:
        size = key.removesuffix("/input/x")
        out = forward(backbone, channels_last(g[key]), layers=(-2, -1))
        close(out.cls_token, g[f"{size}/out/cls"], atol=3e-5)
        close(out.patch_tokens, g[f"{size}/out/patch"], atol=3e-5)
        for i in range(2):
            theirs = g[f"{size}/out/get_intermediate_layers/n2/{i}"]
            close(out.layers[i], theirs, atol=3e-5)
        height, width = sides(size)
        if height == width:
            pos = with_image_size(backbone, height).params["pos_embed"]
            close(pos, g[f"{size}/out/pos_embed"])


def test_ibot_pretraining_variant_equals_the_official_model(ibot, sub):
    g, meta, _ = ibot
    state = sub(g, "param/") | sub(g, "masked/param/")
    backbone = backbone_from_tensors(WeightFile(state), num_heads=meta["heads"])
    masks = g["masked/input/mask"]
    masks = jnp.asarray(masks.reshape(len(masks), -1))
    images = channels_last(g[f"{meta['img']}x{meta['img']}/input/x"])
    out = forward(backbone, images, masks)
    tokens = g["masked/out/tokens"]
    close(out.cls_token, tokens[:, 0], atol=3e-5)
    close(out.patch_tokens, tokens[:, 1:], atol=3e-5)


def test_usfm_is_recognised_and_resized(golden, sub, tmp_path):
    g = golden("usfm_vit")
    meta = meta_of(g)
    write_safetensors(tmp_path / "usfm.safetensors", sub(g, "param/"), {})
    backbone = load_backbone(tmp_path / "usfm.safetensors")
    name = f"usfm_vit{meta['embed_dim']}x{meta['depth']}_{meta['patch']}"
    assert (backbone.name, backbone.mean) == (name, IMAGENET[0])
    assert "fc_norm" in backbone.source and "head" in backbone.source
    out = forward(backbone, channels_last(g["input/x"]))
    close(out.cls_token, g["out/pooled_mean"])
    side = meta["img"] + meta["patch"]
    grown = with_image_size(backbone, side)
    x = np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)
    late = forward(backbone, x).cls_token
    close(forward(grown, x).cls_token, late, atol=1e-5)


def test_grey_and_colour_kernels_agree_on_grey_images(ibot):
    g, meta, colour = ibot
    side, p = meta["img"], meta["patch"]
    grey = with_channels(colour, 1)
    assert (grey.channels, grey.model) == (1, colour.model)
    np.testing.assert_allclose(grey.mean[0], np.mean(IMAGENET[0]))
    x = channels_last(g[f"{side}x{side}/input/x"])[..., :1]
    three, layers = jnp.repeat(x, 3, axis=-1), (-2, -1)
    replicated = forward(colour, three, layers=layers).cls_token
    close(forward(grey, x).cls_token, replicated, atol=1e-5)
    back = with_channels(grey, 3)
    assert len(back.mean) == len(back.std) == 3
    close(forward(back, three, layers=layers).cls_token, replicated, atol=1e-5)
    with pytest.raises(ValueError, match="cannot turn 3 input channels into 2"):
        with_channels(colour, 2)
    with pytest.raises(ValueError, match=f"is not a multiple of the patch size {p}"):
        with_image_size(colour, side + 1)


def reference_vit(golden, sub):
    """One-channel UltraDINO weights in the reference's naming."""
    return sub(golden("vit"), "param/")


def test_state_dict_round_trips_are_bit_equal(golden, sub):
    state = reference_vit(golden, sub)
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    back = vit_state(vit_params(state), patch_size=patch_size)
    assert back.keys() == state.keys()
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x)
    theirs = hf_names.to_hf(state)
    for forth in (theirs, hf_names.hf_file_names(theirs)):
        again = hf_names.from_hf(forth)
        assert again.keys() == state.keys()
        assert all(np.array_equal(again[k], state[k]) for k in state)


def test_version_5_names_in_memory_are_the_files_names(hf):
    names = json.loads(str(hf.g["names/memory_v5_to_disk"]))
    x = np.zeros(1)
    for memory, disk in names.items():
        assert list(hf_names.hf_file_names({memory: x})) == [disk]
    assert sorted(names.values()) == sorted(hf.tensors["registers"])


def test_prefixes_chunks_and_training_state_are_cut(golden, sub, tmp_path):
    state = reference_vit(golden, sub)
    d, patch_size = state["patch_embed.proj.weight"].shape[::3]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
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
    registers = state["register_tokens"].shape[1]
    for tensors in files:
        tensors = {k: x.astype(np.float32) for k, x in tensors.items()}
        write_safetensors(path, tensors, {})
        file = read_weights(path)
        backbone = backbone_from_tensors(file, num_heads=2, source="file")
        name = f"ultradino_vit{d}x{depth}_{patch_size}_reg{registers}"
        assert backbone.name == name
        assert (backbone.mean, backbone.channels) == (FUS[0], 1)
        assert (backbone.model.pos_offset, backbone.model.pos_antialias) == (0.1, False)
        for name, x in flat_names(vit_params(state)).items():
            np.testing.assert_array_equal(flat_names(backbone.params)[name], x)
    left_out = f"(left out: dino_loss, student ({len(state)}))"
    assert backbone.source == f"file {left_out}"


def test_own_backbones_load_too(golden, sub, tmp_path):
    params = vit_params(reference_vit(golden, sub))
    d, depth = params["cls_token"].shape[-1], len(params["blocks"]["norm1"]["scale"])
    grid = round((params["pos_embed"].shape[1] - 1) ** 0.5)
    p = round(params["patch_embed"]["kernel"].shape[0] ** 0.5)
    model = ViT(d, depth, 2, patch_size=p, image_size=grid * p)
    backbone = Backbone(model, params, grid * p, 1, (0.2,), (0.3,), "mine")
    save_backbone(tmp_path / "run" / "backbone", backbone)
    whole = load_backbone(tmp_path / "run", arch="", image_size=0, channels=0)
    assert (whole.model, whole.digest) == (model, backbone.digest)
    loaded = load_backbone(tmp_path / "run", image_size=2 * p, channels=3)
    assert (loaded.image_size, loaded.mean) == (2 * p, (0.2,) * 3)
    assert loaded.params["pos_embed"].shape == (1, 5, d)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_widened(hf, tmp_path, dtype):
    tensors = hf.tensors["registers"]
    small = {k: x.astype(dtype) for k, x in tensors.items()}
    backbone = load_backbone(hf_folder(tmp_path / "hf", small, hf.config))
    for leaf in flat_names(backbone.params).values():
        assert leaf.dtype == np.float32
    expected = tensors["layernorm.bias"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(backbone.params["norm"]["bias"], expected)
