"""What the loader refuses, and that it says why."""

import struct
import sys

import numpy as np
import pytest

from tests.weights.test_load import HF_CONFIG, hf, hf_folder  # noqa: F401
from ultradino_jax.weights.families import detect_family
from ultradino_jax.weights.load import load_backbone_file
from ultradino_jax.weights.meta import Architecture
from ultradino_jax.weights.safetensors import write_safetensors


def test_partial_and_foreign_files_are_refused_with_both_lists(
    hf,  # noqa: F811
    tmp_path,
):
    _, tensors = hf
    full = tensors["registers"]
    key = "encoder.layer.1.attention.attention.key.weight"
    cases = [
        ({key: None}, rf"61 of 62 tensors found; missing: {key}; unexpected: none"),
        (
            {key: None, "encoder.layer.1.attention.key": np.ones(3)},
            rf"missing: {key}; unexpected: encoder\.layer\.1\.attention\.key",
        ),
        (
            {"layernorm.bias": np.ones(47)},
            r"wrong shapes: layernorm\.bias is \[47\], needs \[48\]",
        ),
        ({"embeddings.cls_token": None}, "missing: cls_token"),
        (
            {"embeddings.position_embeddings": np.ones((1, 16, 48))},
            r"pos_embed \[1, 16, 48\] is not a class token and a square grid",
        ),
    ]
    for change, message in cases:
        state = {k: v for k, v in (full | change).items() if v is not None}
        with pytest.raises(ValueError, match=rf"/hf: (.*; )?{message}"):
            load_backbone_file(hf_folder(tmp_path / "hf", state))
    # A file without its last block is no shallower model.
    state = {k: v for k, v in full.items() if ".layer.2." not in k}
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.2\.attention"):
        load_backbone_file(hf_folder(tmp_path / "hf", state))
    config = HF_CONFIG | {"use_swiglu_ffn": True}
    with pytest.raises(ValueError, match="SwiGLU"):
        load_backbone_file(hf_folder(tmp_path / "hf", full, config))
    processor = {"image_mean": [0.5], "image_std": [0.5]}
    with pytest.raises(ValueError, match="1 mean/std values for 3 channels"):
        folder = tmp_path / "hf"
        hf_folder(folder, full, preprocessor_config=processor)
        load_backbone_file(folder)


def test_a_published_width_must_have_its_depth(golden, sub, tmp_path):
    shapes = Architecture(384, 11, 16, 1, 2, 0, True, 1536).shapes()
    state = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    path = tmp_path / "cut.safetensors"
    write_safetensors(path, state, {})
    with pytest.raises(ValueError, match=r"missing: blocks\.11\.attn\.proj\.bias"):
        load_backbone_file(path)
    shapes = Architecture(384, 12, 16, 1, 2, 0, True, 1536).shapes()
    write_safetensors(path, {k: np.zeros(s, np.float32) for k, s in shapes.items()}, {})
    with pytest.raises(ValueError, match="not a 'base' model: it is 384 wide with 12"):
        load_backbone_file(path, arch="base")
    with pytest.raises(ValueError, match="'vits14'; choose one of tiny, small"):
        load_backbone_file(path, arch="vits14")
    assert load_backbone_file(path, arch="small").name == "ultradino_vits16"


def test_unsupported_and_unknown_architectures_are_named():
    for names, message in [
        (["rope_embed.periods", "blocks.0.norm1.weight"], "DINOv3"),
        (["blocks.0.mlp.w12.weight"], "SwiGLU"),
        (["layer1.0.conv1.weight", "bn1.weight"], r"bn1\.weight, layer1\.0\.conv1"),
    ]:
        with pytest.raises(ValueError, match=message):
            detect_family(names)


def test_damaged_files_are_named(
    hf,  # noqa: F811
    tmp_path,
):
    _, tensors = hf
    path = hf_folder(tmp_path / "hf", tensors["plain"]) / "model.safetensors"
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content, message in [
        (whole[:-8], r"cut short: \d+ of \d+ bytes"),
        (whole[:100], "cut short: the header needs"),
        (whole[:4], "only 4 bytes"),
        (b"", "only 0 bytes"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (pointer, "git-lfs pointer"),
        (
            whole[:8] + b"{" + b" " * (size - 1) + whole[8 + size :],
            "damaged safetensors header",
        ),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors.*({message})"):
            load_backbone_file(tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        load_backbone_file(tmp_path / "nowhere.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="which holds nothing"):
        load_backbone_file(tmp_path / "empty")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.h5: unknown kind of file '\.h5'"):
        load_backbone_file(tmp_path / "weights.h5")


def test_a_pickle_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ImportError, match=r"'\.\[interop\]'"):
        load_backbone_file(tmp_path / "model.pth")
