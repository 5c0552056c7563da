""".pth files in the layouts their authors publish. Needs the `interop` extra."""

import argparse
import os

import jax
import numpy as np
import pytest

from tests.weights.forward import channels_last, forward

torch = pytest.importorskip("torch")

from tests.weights import torch_models  # noqa: E402
from ultradino_jax.exports.heads import load_heads_file  # noqa: E402
from ultradino_jax.weights.load import load_backbone  # noqa: E402
from ultradino_jax.weights.meta import Architecture  # noqa: E402


def random_state(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        fan = np.prod(shape[1:]) if len(shape) > 1 and "weight" in name else 9.0
        x = x / fan**0.5
        if "gamma" in name or ("norm" in name and name.endswith("weight")):
            x = 1 + x
        state[name] = x
    return state


TINY = dict(embed_dim=128, depth=4, hidden_dim=512)
SMALL = dict(embed_dim=384, depth=12, hidden_dim=1536)
BASE = dict(embed_dim=768, depth=12, hidden_dim=3072)
HEADS = {128: 4, 384: 6, 768: 12}
LETTERS = {128: "t", 384: "s", 768: "b"}
# What a published size could show that a small one cannot is opt-in.
SIZES = pytest.mark.parametrize(
    "size", [TINY, pytest.param(SMALL, marks=pytest.mark.slow)], ids=["tiny", "small"]
)


def shapes_of(**sizes):
    default = dict(patch_size=16, channels=3, grid=14, num_registers=0, layerscale=True)
    return Architecture(**default | TINY | sizes).shapes()


def vit_state(**sizes):
    """A ViT in Meta's naming."""
    return random_state(shapes_of(**sizes), seed=1)


def usfm_state(**sizes):
    d, shapes = sizes["embed_dim"], {}
    for name, shape in shapes_of(**sizes).items():
        if name.endswith("attn.qkv.bias"):
            shapes[name.replace("qkv.bias", "q_bias")] = (d,)
            shapes[name.replace("qkv.bias", "v_bias")] = (d,)
        elif name not in ("pos_embed", "mask_token"):
            renamed = name.replace("ls1.gamma", "gamma_1")
            shapes[renamed.replace("ls2.gamma", "gamma_2")] = shape
    shapes["rel_pos_bias.relative_position_bias_table"] = (732, HEADS[d])
    state = random_state(shapes, seed=2)
    state["rel_pos_bias.relative_position_index"] = torch.zeros(197, 197).long()
    return state


def images(channels, side=224, batch=1):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, channels, side, side)).astype(np.float32)


def compare(backbone, x, theirs):
    out = forward(backbone, channels_last(x), layers=(-4, -3, -2, -1))
    ours = (out.cls_token, out.patch_tokens, out.layers)
    for name, a, b in zip(("CLS", "patches", "last 4"), ours, theirs, strict=True):
        scale = max(1.0, float(b.abs().max()))
        error = float(np.abs(np.asarray(a) - b.numpy()).max())
        print(f"{backbone.name} {name}: {error:.2e}, largest value {scale:.1f}")
        assert float(b.std()) > 0.1
        assert error < 1e-4


@SIZES
def test_ibot_backbone_and_full_checkpoint_equal_the_torch_statement(tmp_path, size):
    d = size["embed_dim"]
    state = vit_state(**size, layerscale=False)
    state.pop("mask_token")
    x = images(3)
    theirs = torch_models.vit(torch.from_numpy(x), state, HEADS[d])
    torch.save({"state_dict": state}, tmp_path / "ibot_16.pth")
    plain = load_backbone(tmp_path / "ibot_16.pth")
    assert plain.name == f"ibot_vit{LETTERS[d]}16" and plain.model.num_registers == 0
    compare(plain, x, theirs)
    head = {"head.mlp.0.weight": torch.ones(4, d), "head.mlp.0.bias": torch.ones(4)}
    full = {
        "teacher": {f"backbone.{k}": v for k, v in state.items()} | head,
        "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=1e-3),
    }
    torch.save(full, tmp_path / "checkpoint.pth")
    whole = load_backbone(tmp_path / "checkpoint.pth")
    jax.tree.map(np.testing.assert_array_equal, whole.params, plain.params)
    assert "left out: head (2)" in whole.source


@pytest.mark.parametrize(
    "size", [TINY, pytest.param(BASE, marks=pytest.mark.slow)], ids=["tiny", "base"]
)
def test_usfm_file_equals_the_torch_statement(tmp_path, size):
    state, letter = usfm_state(**size), LETTERS[size["embed_dim"]]
    arch = {"t": "tiny", "b": "base"}[letter]
    torch.save(state, tmp_path / "usfm.pth")
    x = images(3)
    backbone = load_backbone(tmp_path / "usfm.pth", arch=arch)
    assert (backbone.name, backbone.image_size) == (f"usfm_vit{letter}16", 224)
    compare(backbone, x, torch_models.usfm(torch.from_numpy(x), state))


@SIZES
@pytest.mark.parametrize("registers", [0, 4])
def test_meta_file_of_518_pixels_is_resized_as_meta_does(tmp_path, registers, size):
    d = size["embed_dim"]
    state = vit_state(**size, patch_size=14, grid=37, num_registers=registers)
    torch.save(state, tmp_path / "dinov2.pth")
    x = images(3)
    how = {"offset": 0.0, "antialias": True} if registers else {}
    theirs = torch_models.vit(torch.from_numpy(x), state, HEADS[d], **how)
    native = load_backbone(tmp_path / "dinov2.pth")
    assert native.image_size == 518
    resized = load_backbone(tmp_path / "dinov2.pth", image_size=224)
    assert resized.params["pos_embed"].shape == (1, 257, d)
    compare(resized, x, theirs)


def head_state(d):
    shapes = {"mlp.0.weight": (8, d), "mlp.0.bias": (8,)}
    shapes |= {"mlp.2.weight": (8, 8), "mlp.2.bias": (8,)}
    shapes |= {"mlp.4.weight": (4, 8), "mlp.4.bias": (4,)}
    shapes |= {"last_layer.weight_g": (16, 1), "last_layer.weight_v": (16, 4)}
    return {f"dino_head.{k}": v for k, v in random_state(shapes, 5).items()}


@SIZES
def test_ultradino_teacher_and_model_files(tmp_path, size):
    d = size["embed_dim"]
    state = vit_state(**size, channels=1, num_registers=4)
    backbone = {f"backbone.{k}": v for k, v in state.items()}
    torch.save({"teacher": backbone | head_state(d)}, tmp_path / "teacher.pth")
    x = images(1)
    teacher = load_backbone(tmp_path / "teacher.pth")
    assert (teacher.name, teacher.channels) == (
        f"ultradino_vit{LETTERS[d]}16_reg4",
        1,
    )
    compare(teacher, x, torch_models.vit(torch.from_numpy(x), state, HEADS[d]))
    both = backbone | head_state(d)
    model = {f"teacher.{k}": v for k, v in both.items()}
    model |= {f"student.{k}": v * 0 for k, v in both.items()}
    model |= {"dino_loss.center": torch.zeros(1, 16)}
    torch.save({"model": model, "iteration": 7}, tmp_path / "model_final.rank_0.pth")
    final = load_backbone(tmp_path / "model_final.rank_0.pth")
    jax.tree.map(np.testing.assert_array_equal, final.params, teacher.params)
    for name in ("teacher.pth", "model_final.rank_0.pth"):
        heads = load_heads_file(tmp_path / name)
        assert heads["dino_head"]["last_layer"]["v"].shape == (4, 16)
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="holds no dino_head or ibot_head"):
        load_heads_file(tmp_path / "bare.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_parallel_prefixes(tmp_path, dtype):
    state = vit_state(channels=1)
    half = {f"module.{k}": v.to(dtype) for k, v in state.items()}
    torch.save(half, tmp_path / "half.pth")
    backbone = load_backbone(tmp_path / "half.pth")
    expected = state["norm.bias"].to(dtype).float().numpy()
    np.testing.assert_array_equal(backbone.params["norm"]["bias"], expected)


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_hostile_and_damaged_pickles_are_refused_by_name(tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "executed"
    state = vit_state(channels=1)
    torch.save(state | {"norm.bias": Hostile(trace)}, path)
    with pytest.raises(ValueError, match=r"model\.pth: refused: .* call posix\.mkdir"):
        load_backbone(path)
    assert not trace.exists()
    torch.save(state, path)
    whole = path.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "damaged, cut short or not a torch checkpoint"),
        (b"hello", "not a torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"model\.pth.*{message}"):
            load_backbone(path)
    for content, message in [
        ({"epoch": 3, "loss": 0.5}, "no tensors inside; its entries are epoch, loss"),
        ([1, 2], "holds a list, not named tensors"),
        (torch.ones(3), "holds a Tensor, not named tensors"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_backbone(path)


def test_wrong_and_missing_names_are_refused_by_name(tmp_path):
    path = tmp_path / "model.pth"
    state = vit_state(channels=1)
    for change, message in [
        ({"blocks.3.attn.qkv.weight": None}, r"missing: blocks\.3\.attn\.qkv\.weight"),
        ({"blocks.3.attn.extra": torch.ones(2)}, r"unexpected: blocks\.3\.attn\.extra"),
        ({"norm.weight": torch.ones(3)}, r"norm\.weight is \[3\], needs \[128\]"),
    ]:
        changed = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            load_backbone(path)
    torch.save(state, path)
    with pytest.raises(ValueError, match="not a 'base' model"):
        load_backbone(path, arch="base")
