"""What leaves comes back bit-equal, and nothing wrong is kept. Needs no torch."""

import dataclasses
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.backbone import Backbone, save_backbone
from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.export import (
    ExportRefused,
    check_images,
    export,
    main,
    our_features,
)
from ultradino_jax.exports.heads import load_heads_file, run_facts, run_heads
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.usfm import USFM
from ultradino_jax.models.vit import ViT
from ultradino_jax.tree import flat_names
from ultradino_jax.weights import naming
from ultradino_jax.weights.load import load_backbone_file

MODEL = ViT(64, 2, 2, patch_size=16, image_size=64, layerscale=0.1, drop_path=0.3)
HEAD = DINOHead(hidden_dim=16, bottleneck_dim=8, num_prototypes=12)


def random_params(module, inputs, seed=0):
    """Initial values plus noise, so that zeros and ones cannot hide a swap."""
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params
    )


def backbone(model=MODEL, channels=1):
    images = jnp.zeros((1, 64, 64, channels))
    params = random_params(model, images)
    return Backbone(
        model, params, 64, channels, (0.25,) * channels, (0.125,) * channels, "mine"
    )


@pytest.fixture
def run(tmp_path):
    """The workdir of a run of two logged steps."""
    workdir = tmp_path / "run"
    save_backbone(workdir / "backbone", backbone(), step=20)
    teacher = {
        "backbone": backbone().params,
        "dino_head": random_params(HEAD, jnp.zeros((1, 64)), seed=3),
    }
    checkpoints = RunCheckpoints(workdir / "checkpoints")
    state = {"step": jnp.int32(20), "teacher": teacher, "student": {"w": jnp.ones(3)}}
    checkpoints.save(20, state, {"step": 20, "stream": {"records": 321}})
    checkpoints.close()
    config = {
        "batch_size": 8,
        "data": {"root": ""},
        "crops": {"style": "ultrasound", "global_size": 64},
        "head": {"num_prototypes": 12},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    lines = [{"step": 19, "total": 5.5}, {"step": 29, "total": 1.0}]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return workdir, teacher


def equal_trees(a, b):
    a, b = flat_names(a), flat_names(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(b[name], x)


def test_own_format_loads_back_bit_equal_with_everything_it_needs(run, tmp_path):
    workdir, teacher = run
    out = tmp_path / "out"
    report = export(workdir, "safetensors", out)
    assert report["reload"]["bit_equal"] and report["reload"]["verdict"] == "bit-equal"
    assert json.loads((out / "export_report.json").read_text()) == report
    again = load_backbone_file(out)
    equal_trees(again.params, teacher["backbone"])
    fresh = dataclasses.replace(backbone(), params=None, source="")
    assert dataclasses.replace(again, params=None, source="") == fresh
    assert report["parameters_sha256"] == again.digest
    assert not (tmp_path / "out.new").exists()


def test_own_format_holds_usfm(tmp_path):
    usfm = backbone(USFM(48, 2, 3, image_size=64), channels=3)
    from ultradino_jax.exports.backbones import write

    (tmp_path / "out").mkdir()
    write("safetensors", usfm, tmp_path / "out", None)
    again = load_backbone_file(tmp_path / "out")
    assert (again.model, again.mean) == (usfm.model, usfm.mean)
    equal_trees(again.params, usfm.params)
    for kind in ("hf", "timm", "meta", "onnx"):
        with pytest.raises(ValueError, match=f"mine: format '{kind}' holds DINOv2"):
            write(kind, usfm, tmp_path / "out", None)


@pytest.mark.parametrize("kind", ["hf", "timm"])
@pytest.mark.parametrize("registers", [0, 4])
def test_foreign_names_load_back_with_bit_equal_features(tmp_path, kind, registers):
    model = MODEL.clone(num_registers=registers)
    save_backbone(tmp_path / "own", backbone(model))
    report = export(tmp_path / "own", kind, tmp_path / "out")
    assert report["reload"]["bit_equal"]
    again = load_backbone_file(tmp_path / "out")
    assert (again.mean, again.std, again.name) == ((0.25,), (0.125,), "mine")
    assert again.model.pos_offset == model.pos_offset
    if kind == "hf":
        equal_trees(again.params, backbone(model).params)
    if "difference" not in report["target"]:  # the library is not installed
        assert "not usable here" in report["target"]["reason"]


def test_a_model_without_layerscale_leaves_as_gains_of_one(tmp_path):
    save_backbone(tmp_path / "own", backbone(MODEL.clone(layerscale=None)))
    report = export(tmp_path / "own", "hf", tmp_path / "out")
    assert max(report["reload"]["difference"].values()) < 1e-5
    ls1 = load_backbone_file(tmp_path / "out").params["blocks"]["ls1"]["gamma"]
    np.testing.assert_array_equal(ls1, 1)


def test_colour_variant_computes_the_same_on_grey(tmp_path, run):
    workdir, _ = run
    export(workdir, "hf", tmp_path / "out", rgb=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert config["num_channels"] == 3
    assert processor["image_mean"] == [0.25] * 3 and processor["do_convert_rgb"]
    colour, grey = load_backbone_file(tmp_path / "out"), load_backbone_file(workdir)
    x = np.random.default_rng(1).normal(size=(1, 64, 64, 1)).astype(np.float32)
    theirs = our_features(colour, np.repeat(x, 3, axis=-1))
    np.testing.assert_allclose(theirs[0], our_features(grey, x)[0], atol=1e-5)


def test_config_and_card_say_what_the_model_is(run, tmp_path):
    workdir, _ = run
    out = tmp_path / "out"
    export(workdir, "hf", out, licence="apache-2.0")
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "dinov2_with_registers"
    assert (config["num_channels"], config["image_size"]) == (1, 64)
    assert config["num_register_tokens"] == 4
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.25], [0.125])
    assert processor["do_convert_rgb"] is False
    card = (out / "README.md").read_text()
    for part in (
        "license: apache-2.0",
        "Dinov2WithRegistersModel.from_pretrained",
        "| training images | 321 (rendered phantom images, no patient data) |",
        "| optimiser steps | 20 |",
        "| total at step 19 | 5.5000 |",
        "mean 0.2500",
        "Not a medical device",
    ):
        assert part in card
    assert str(tmp_path) not in card + (out / "export_report.json").read_text()


def test_heads_of_a_run_are_found_at_the_step_of_its_backbone(run, tmp_path):
    workdir, teacher = run
    equal_trees(run_heads(workdir)["dino_head"], teacher["dino_head"])
    equal_trees(load_heads_file(workdir / "backbone"), run_heads(workdir))
    assert run_facts(workdir)["images"] == 321
    save_backbone(workdir / "backbone", backbone(), step=40)
    with pytest.raises(FileNotFoundError, match="keeps no train state of step 40"):
        run_heads(workdir)
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        run_heads(tmp_path / "elsewhere")
    assert run_facts(tmp_path / "elsewhere") == {}
    with pytest.raises(ValueError, match="'hf' has no place for projection heads"):
        save_backbone(workdir / "backbone", backbone(), step=20)
        export(workdir, "hf", tmp_path / "out", heads=True)


def test_an_export_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    workdir, _ = run
    out = tmp_path / "out"
    honest = naming.to_hf

    def swapped(state):
        names = honest(state)
        a = "encoder.layer.0.attention.attention.query.bias"
        b = "encoder.layer.0.attention.attention.key.bias"
        names[a], names[b] = names[b], names[a]
        return names

    monkeypatch.setattr(naming, "to_hf", swapped)
    with pytest.raises(ExportRefused, match=r"features differ by \d.* more than"):
        export(workdir, "hf", out)
    assert not out.exists() and not (tmp_path / "out.new").exists()
    monkeypatch.setattr(naming, "to_hf", honest)
    export(workdir, "hf", out)
    monkeypatch.setattr(naming, "to_hf", swapped)
    with pytest.raises(ExportRefused):
        export(workdir, "hf", out)
    assert (out / "model.safetensors").is_file()  # the earlier export is still there


def test_check_images_come_from_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        image = rng.integers(0, 256, (40, 50), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    images = check_images(backbone(), tmp_path)
    assert images.shape == (8, 64, 64, 1) and images.dtype == np.float32
    np.testing.assert_array_equal(images[0], images[3])
    assert images.min() >= -2 and images.max() <= 6


def test_command_line(run, tmp_path, capsys):
    workdir, _ = run
    flags = ["--checkpoint", str(workdir), "--out", str(tmp_path / "out")]
    main([*flags, "--format", "safetensors"])
    printed = capsys.readouterr().out
    assert "NOT checked in its target library" in printed and "bit-equal" in printed
    (tmp_path / "mine").mkdir()
    for change, message in [
        (["--checkpoint", "nowhere"], "error: no checkpoint at 'nowhere'"),
        (["--out", str(tmp_path / "mine")], "exists and is not an earlier export"),
        (["--image-size", "50"], "50 is not a multiple of the patch size 16"),
        (["--images", "nowhere"], "image folder 'nowhere' does not exist"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*flags, "--format", "safetensors", *change])
    with pytest.raises(SystemExit):
        main([*flags, "--format", "torchscript"])
    assert "invalid choice: 'torchscript'" in capsys.readouterr().err
