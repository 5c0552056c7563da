"""What the loader refuses, and that it says why."""

import json
import struct
import sys

import numpy as np
import pytest
from safetensors import safe_open

from tests.weights.forward import HuggingFace, hf_folder
from ultradino_jax.weights.families import detect_family
from ultradino_jax.weights.files import read_safetensors, write_safetensors
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.weights.meta import Architecture


@pytest.fixture(scope="module")
def hf(golden, sub):
    return HuggingFace(golden("dinov2_hf"), sub)


def test_partial_and_foreign_files_are_refused_with_both_lists(hf, tmp_path):
    full, folder = hf.tensors["registers"], tmp_path / "hf"
    d, last = hf.meta["hidden"], hf.meta["layers"] - 1
    grid = hf.meta["img"] // hf.meta["patch"]
    n = len(full)
    key = f"encoder.layer.{last - 1}.attention.attention.key.weight"
    other = f"encoder.layer.{last - 1}.attention.key"
    cases = [
        ({key: None}, rf"{n - 1} of {n} tensors found; missing: {key}; unexpected: no"),
        ({key: None, other: np.ones(3)}, rf"missing: {key}; unexpected: {other}"),
        (
            {"layernorm.bias": np.ones(d - 1)},
            rf"wrong shapes: layernorm\.bias is \[{d - 1}\], needs \[{d}\]",
        ),
        ({"embeddings.cls_token": None}, "missing: cls_token"),
        (
            {"embeddings.position_embeddings": np.ones((1, grid**2, d))},
            rf"pos_embed \[1, {grid**2}, {d}\] is not a class token and a square grid",
        ),
        # A file without its last block is no shallower model.
        (
            {k: None for k in full if f".layer.{last}." in k},
            rf"missing: encoder\.layer\.{last}\.attention",
        ),
    ]
    for change, message in cases:
        state = {k: v for k, v in (full | change).items() if v is not None}
        with pytest.raises(ValueError, match=rf"/hf: (.*; )?{message}"):
            load_backbone(hf_folder(folder, state, hf.config))
    for config, message in [
        (hf.config | {"use_swiglu_ffn": True}, "SwiGLU"),
        ({"num_hidden_layers": 3}, "config.json lacks num_attention_heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_backbone(hf_folder(folder, full, config))
    processor = {"image_mean": [0.5], "image_std": [0.5]}
    hf_folder(folder, full, hf.config, preprocessor_config=processor)
    with pytest.raises(ValueError, match="1 mean/std values for 3 channels"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' is cut or not JSON"):
        load_backbone(folder)


def test_a_published_width_must_have_its_depth(tmp_path):
    path = tmp_path / "cut.safetensors"

    def write(depth):
        shapes = Architecture(128, depth, 16, 1, 2, 0, True, 512).shapes()
        state = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
        write_safetensors(path, state, {})

    write(3)
    with pytest.raises(ValueError, match=r"missing: blocks\.3\.attn\.proj\.bias"):
        load_backbone(path)
    write(4)
    with pytest.raises(ValueError, match="not a 'base' model: it is 128 wide with 4"):
        load_backbone(path, arch="base")
    with pytest.raises(ValueError, match="'vits14'; choose one of tiny, small"):
        load_backbone(path, arch="vits14")
    assert load_backbone(path, arch="tiny").name == "ultradino_vitt16"


def test_unsupported_and_unknown_architectures_are_named():
    for names, message in [
        (["rope_embed.periods", "blocks.0.norm1.weight"], "DINOv3"),
        (["blocks.0.mlp.w12.weight"], "SwiGLU"),
        (["layer1.0.conv1.weight", "bn1.weight"], r"bn1\.weight, layer1\.0\.conv1"),
    ]:
        with pytest.raises(ValueError, match=message):
            detect_family(names)


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def test_damaged_files_are_named(hf, tmp_path):
    path = hf.folder(tmp_path / "hf", "plain") / "model.safetensors"
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    eight_bits = {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}
    damaged = "damaged, cut short or not a safetensors file"
    for content, message in [
        (whole[:-8], damaged),
        (whole[:100], damaged),
        (whole[:4], damaged),
        (b"", damaged),
        (b"PK\x03\x04" + bytes(60), damaged),
        (pointer, "git-lfs pointer"),
        (whole[:8] + b"{" + b" " * (size - 1) + whole[8 + size :], damaged),
        (header(a=eight_bits) + b"ab", "a: dtype not supported .*float8_e4m3fn"),
        (header(a=eight_bits | {"dtype": "Q9"}) + b"ab", f"{damaged}.*`Q9`"),
        (header(__metadata__={"ultradino_jax": "{"}), "its record is no JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.safetensors.*({message})") as e:
            load_backbone(tmp_path / "hf")
        assert "\n" not in str(e.value)
    for name in ("nowhere.pth", "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"'.*{name}' does not exist"):
            load_backbone(tmp_path / name)
    with pytest.raises(ValueError, match="name of the checkpoint is empty"):
        load_backbone("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="which holds nothing"):
        load_backbone(tmp_path / "empty")
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.h5: unknown kind of file '\.h5'"):
        load_backbone(tmp_path / "weights.h5")
    for record, message in [("{", "cut or not JSON"), ("{}", "record is damaged")]:
        (tmp_path / "backbone.json").write_text(record)
        with pytest.raises(ValueError, match=message):
            load_backbone(tmp_path)


def test_safetensors_keep_dtypes_shapes_and_the_record(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.float32(3.0).reshape(()),
        "c": np.ones((2, 0), np.int64),
        "d": np.array([1.5, 2.5], "bfloat16"),
        "e": np.array([True, False]),
        "turned": np.arange(6.0).reshape(2, 3).T,
    }
    write_safetensors(path, tensors, {"format": "pt", "ultradino_jax": '{"a": 1}'})
    back, record = read_safetensors(path)
    assert record == {"a": 1} and back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (back[name].dtype, back[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(back[name], x)
    with safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "pt"
    # One key of metadata: the package writes several in any order.
    write_safetensors(path, tensors, {"format": "pt"})
    first = path.read_bytes()
    write_safetensors(path, dict(reversed(tensors.items())), {"format": "pt"})
    assert path.read_bytes() == first


def test_a_pickle_without_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ImportError, match=r"'\.\[interop\]'"):
        load_backbone(tmp_path / "model.pth")
