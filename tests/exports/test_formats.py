"""What is exported loads back, and computes the same in the library it is for.

A check in a library is left out where that library is not installed.
"""

import dataclasses
import functools
import importlib.util
import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.exports.tiny import MODEL, VARIANTS, backbone, equal_trees, write_run
from ultradino_jax.cli import command
from ultradino_jax.export import main
from ultradino_jax.exports.checked import ExportRefused, check_images, export
from ultradino_jax.exports.formats import FORMATS, write
from ultradino_jax.exports.heads import load_heads_file, run_facts, run_heads
from ultradino_jax.exports.onnx_backbone import to_channels_first, vit_onnx
from ultradino_jax.exports.subject import our_features
from ultradino_jax.models.usfm import USFM
from ultradino_jax.weights import hf as hf_names
from ultradino_jax.weights.backbone import save_backbone
from ultradino_jax.weights.load import load_backbone


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, its teacher)."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, write_run(workdir)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """exported(kind, variant) -> (folder, report), made once."""

    @functools.cache
    def make(kind, variant="registers", **options):
        place = tmp_path_factory.mktemp(kind)
        source = run[0]
        if variant != "registers":
            source = place / "own"
            save_backbone(source, backbone(VARIANTS[variant]))
        report = export(source, kind, place / "out", licence="apache-2.0", **options)
        assert not (place / "out.new").exists()
        return place / "out", report

    return make


def needs(kind):
    for package in {"hf": ["torch", "transformers"], "meta": ["torch"]}.get(kind, []):
        pytest.importorskip(package)


@pytest.mark.parametrize(
    "kind, variant",
    [
        ("safetensors", "registers"),
        ("hf", "registers"),
        ("hf", "plain"),
        ("hf", "bare"),
        ("timm", "registers"),
        ("timm", "plain"),
        ("onnx", "registers"),
        ("onnx", "bare"),
    ],
)
def test_an_export_comes_back_and_computes_the_same(exported, kind, variant):
    if kind == "onnx":
        pytest.importorskip("onnx")
    out, report = exported(kind, variant)
    ours = backbone(VARIANTS[variant])
    assert json.loads((out / "export_report.json").read_text()) == report
    assert report["parameters_sha256"] == ours.digest
    target, library = report["target"], FORMATS[kind].library
    if not library:
        assert target == {"reason": "it is this project's own"}
    elif importlib.util.find_spec(library) is None:
        assert f"{library} is not usable here" in target["reason"]
    else:
        print(kind, target["library"], target["difference"])
        assert target["batches"] == [1, 5, 2]
        assert max(target["difference"].values()) < 1e-4
    if kind == "onnx":
        assert report["reload"] == {"verdict": "not possible from ONNX"}
        card = (out / "README.md").read_text()
        assert 'onnxruntime.InferenceSession("FOLDER/model.onnx")' in card
        return
    again = load_backbone(out)
    assert (again.mean, again.std, again.name) == ((0.25,), (0.125,), "mine")
    assert again.model.pos_offset == ours.model.pos_offset
    if variant == "bare":  # transformers always has gains: they are one
        assert max(report["reload"]["difference"].values()) < 1e-5
        np.testing.assert_array_equal(again.params["blocks"]["ls1"]["gamma"], 1)
        return
    assert report["reload"]["bit_equal"] and report["reload"]["verdict"] == "bit-equal"
    if kind != "timm":  # which moves the class position and drops the mask token
        equal_trees(again.params, ours.params)
    if kind == "safetensors":
        fresh = dataclasses.replace(ours, params=None, source="")
        assert dataclasses.replace(again, params=None, source="") == fresh


def test_own_format_holds_usfm(tmp_path):
    usfm = backbone(USFM(48, 2, 3, image_size=64), channels=3)
    write("safetensors", usfm, tmp_path)
    again = load_backbone(tmp_path)
    assert (again.model, again.mean) == (usfm.model, usfm.mean)
    equal_trees(again.params, usfm.params)
    for kind in set(FORMATS) - {"safetensors"}:
        with pytest.raises(ValueError, match=f"mine: format '{kind}' holds DINOv2"):
            write(kind, usfm, tmp_path)
    with pytest.raises(ValueError, match="unknown format 'torchscript'; choose one"):
        write("torchscript", usfm, tmp_path)


def test_colour_variant_computes_the_same_on_grey(exported, run):
    out, _ = exported("hf", rgb=True)
    config = json.loads((out / "config.json").read_text())
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert config["num_channels"] == 3
    assert processor["image_mean"] == [0.25] * 3 and processor["do_convert_rgb"]
    x = np.random.default_rng(1).normal(size=(8, 64, 64, 1)).astype(np.float32)
    theirs = our_features(load_backbone(out), np.repeat(x, 3, axis=-1))
    ours = our_features(load_backbone(run[0]), x)
    np.testing.assert_allclose(theirs[0], ours[0], atol=1e-5)


def test_config_and_card_say_what_the_model_is(exported, run):
    out, _ = exported("hf")
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
        "library_name: transformers",
        "Dinov2WithRegistersModel.from_pretrained",
        "| training images | 321 (rendered phantom images, no patient data) |",
        "| optimiser steps | 20 |",
        "| total at step 19 | 5.5000 |",
        "mean 0.2500",
        "Not a medical device",
    ):
        assert part in card
    assert str(run[0].parent) not in card + (out / "export_report.json").read_text()


@pytest.mark.parametrize("variant", ["registers", "bare"])
def test_transformers_own_classes_read_and_write_it(exported, tmp_path, variant):
    needs("hf")
    import transformers

    out, _ = exported("hf", variant)
    auto = transformers.AutoModel.from_pretrained(out)
    names = {"registers": "Dinov2WithRegistersModel", "bare": "Dinov2Model"}
    assert type(auto).__name__ == names[variant]
    # Saved again by transformers, so without our header, it still loads here.
    auto.save_pretrained(tmp_path / "again")
    again = load_backbone(tmp_path / "again")
    equal_trees(again.params, load_backbone(out).params)


def test_hugging_face_processor_gives_the_pixels_we_were_evaluated_on(exported):
    needs("hf")
    import transformers

    def pixels(image, **options):
        load = transformers.AutoImageProcessor.from_pretrained
        processor = load(exported("hf", **options)[0], use_fast=False)
        return processor([image], return_tensors="np")["pixel_values"]

    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    got = pixels(grey[..., None])
    assert got.shape == (1, 1, 64, 64)
    np.testing.assert_allclose(got[0, 0], (grey / 255 - 0.25) / 0.125, atol=1e-5)
    assert pixels(Image.fromarray(grey), rgb=True).shape == (1, 3, 64, 64)


def test_onnx_with_a_head_of_ones_own():
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, kernel = backbone(), np.random.default_rng(0).normal(size=(6, 64))
    kernel = kernel.astype(np.float32)

    def classifier(graph, tensors):
        assert len(tensors["blocks"]) == MODEL.depth
        graph.linear(tensors["cls"], kernel, np.ones(6, np.float32), name="logits")
        return {"logits": ("batch", 6)}

    model = vit_onnx(ours, extend=classifier)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = check_images(ours, None)
    (logits,) = session.run(None, {"pixel_values": to_channels_first(images)})
    expected = our_features(ours, images)[0] @ kernel.T + 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_meta_file_computes_the_same_in_the_torch_statement_and_keeps_heads(
    exported, run
):
    needs("meta")
    import torch

    from tests.weights import torch_models

    out, report = exported("meta", heads=True)
    assert report["reload"]["bit_equal"] and report["heads"]
    assert report["target"] == {"reason": "its code is not a Python package"}
    path, teacher = out / "teacher_checkpoint.pth", run[1]
    content = torch.load(path, weights_only=True)
    assert json.loads(content["ultradino_jax"])["mean"] == [0.25]
    prefix = "backbone."
    state = content["teacher"].items()
    state = {k.removeprefix(prefix): x for k, x in state if k.startswith(prefix)}
    images = check_images(backbone(), None)
    x = torch.from_numpy(to_channels_first(images))
    cls, patches, _ = torch_models.vit(x, state, MODEL.num_heads)
    ours = our_features(load_backbone(run[0]), images)
    np.testing.assert_allclose(ours[0], cls.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours[1], patches.numpy(), atol=1e-4)
    equal_trees(load_heads_file(path)["dino_head"], teacher["dino_head"])
    equal_trees(load_backbone(path).params, teacher["backbone"])


def test_heads_of_a_run_are_found_at_the_step_of_its_backbone(run, tmp_path):
    original, teacher = run
    workdir = tmp_path / "run"
    shutil.copytree(original, workdir)
    equal_trees(run_heads(workdir)["dino_head"], teacher["dino_head"])
    equal_trees(load_heads_file(workdir / "backbone"), run_heads(workdir))
    assert run_facts(workdir)["images"] == 321
    with pytest.raises(ValueError, match="'hf' has no place for projection heads"):
        export(workdir, "hf", tmp_path / "out", heads=True)
    assert not (tmp_path / "out.new").exists()
    save_backbone(workdir / "backbone", backbone(), step=40)
    with pytest.raises(FileNotFoundError, match="keeps no train state of step 40"):
        run_heads(workdir)
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        run_heads(tmp_path / "elsewhere")
    assert run_facts(tmp_path / "elsewhere") == {}


def test_an_export_that_computes_something_else_is_not_kept(
    exported, run, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    honest = hf_names.to_hf

    def swapped(state):
        names = honest(state)
        a = "encoder.layer.0.attention.attention.query.bias"
        b = "encoder.layer.0.attention.attention.key.bias"
        names[a], names[b] = names[b], names[a]
        return names

    monkeypatch.setattr(hf_names, "to_hf", swapped)
    with pytest.raises(ExportRefused, match=r"features differ by \d.* more than"):
        export(run[0], "hf", out)
    assert not out.exists() and not (tmp_path / "out.new").exists()
    shutil.copytree(exported("safetensors")[0], out)
    with pytest.raises(ExportRefused):
        export(run[0], "hf", out)
    equal_trees(load_backbone(out).params, backbone().params)  # as it was


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
    flags = ["--checkpoint", str(run[0]), "--out", str(tmp_path / "out")]
    flags += ["--format", "safetensors"]
    command(main, flags)
    printed = capsys.readouterr().out
    assert "NOT checked in its target library" in printed and "bit-equal" in printed
    (tmp_path / "mine").mkdir()
    for change, message in [
        (["--checkpoint", "nowhere"], "error: checkpoint 'nowhere' does not exist"),
        (["--out", str(tmp_path / "mine")], "exists and is not an earlier export"),
        (["--image-size", "50"], "50 is not a multiple of the patch size 16"),
        (["--images", "nowhere"], "image folder 'nowhere' does not exist"),
    ]:
        with pytest.raises(SystemExit, match=message):
            command(main, [*flags, *change])
    with pytest.raises(SystemExit):
        command(main, [*flags, "--format", "torchscript"])
    assert "invalid choice: 'torchscript'" in capsys.readouterr().err
