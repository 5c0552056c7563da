"""Exports in the libraries they are for. Each test skips without its library."""

import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from tests.exports.test_backbones import MODEL, backbone, equal_trees, run  # noqa: E402, F401
from tests.weights import torch_models  # noqa: E402
from ultradino_jax.backbone import save_backbone  # noqa: E402
from ultradino_jax.export import check_images, export, our_features  # noqa: E402
from ultradino_jax.exports.heads import load_heads_file  # noqa: E402
from ultradino_jax.exports.onnx_backbone import to_channels_first, vit_onnx  # noqa: E402
from ultradino_jax.weights.load import load_backbone_file  # noqa: E402


def checked(folder, kind, model=MODEL, **options):
    save_backbone(folder / "own", backbone(model))
    report = export(folder / "own", kind, folder / "out", **options)
    difference = report["target"]["difference"]
    print(kind, report["target"]["library"], difference)
    assert report["target"]["batches"] == [1, 5, 2]
    assert max(difference.values()) < 1e-4
    return folder / "out"


@pytest.mark.parametrize("registers, layerscale", [(4, 0.1), (0, None)])
def test_hugging_face(tmp_path, registers, layerscale):
    transformers = pytest.importorskip("transformers")
    model = MODEL.clone(num_registers=registers, layerscale=layerscale)
    out = checked(tmp_path, "hf", model)
    auto = transformers.AutoModel.from_pretrained(out)
    expected = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    assert type(auto).__name__ == expected
    # Saved again by transformers, so without our header, it still loads here.
    auto.save_pretrained(tmp_path / "again")
    again = load_backbone_file(tmp_path / "again")
    equal_trees(again.params, load_backbone_file(out).params)


def test_hugging_face_processor_gives_the_pixels_we_were_evaluated_on(tmp_path):
    transformers = pytest.importorskip("transformers")
    out = checked(tmp_path, "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(out, use_fast=False)
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    pixels = processor([grey[..., None]], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 1, 64, 64)
    np.testing.assert_allclose(pixels[0, 0], (grey / 255 - 0.25) / 0.125, atol=1e-5)
    export(tmp_path / "own", "hf", tmp_path / "rgb", rgb=True)
    processor = transformers.AutoImageProcessor.from_pretrained(
        tmp_path / "rgb", use_fast=False
    )
    pixels = processor([Image.fromarray(grey)], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("registers, layerscale", [(4, 0.1), (0, None)])
def test_onnx(tmp_path, registers, layerscale):
    pytest.importorskip("onnxruntime")
    model = MODEL.clone(num_registers=registers, layerscale=layerscale)
    out = checked(tmp_path, "onnx", model)
    card = (out / "README.md").read_text()
    assert 'onnxruntime.InferenceSession("FOLDER/model.onnx")' in card


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
    run,  # noqa: F811
    tmp_path,
):
    workdir, teacher = run
    report = export(workdir, "meta", tmp_path / "out", heads=True)
    assert report["reload"]["bit_equal"] and report["heads"]
    assert report["target"] == {"reason": "its code is not a Python package"}
    path = tmp_path / "out" / "teacher_checkpoint.pth"
    content = torch.load(path, weights_only=True)
    assert json.loads(content["ultradino_jax"])["mean"] == [0.25]
    state = {
        name.removeprefix("backbone."): x
        for name, x in content["teacher"].items()
        if name.startswith("backbone.")
    }
    images = check_images(backbone(), None)
    x = torch.from_numpy(to_channels_first(images))
    cls, patches, _ = torch_models.vit(x, state, MODEL.num_heads)
    ours = our_features(load_backbone_file(workdir), images)
    np.testing.assert_allclose(ours[0], cls.numpy(), atol=1e-4)
    np.testing.assert_allclose(ours[1], patches.numpy(), atol=1e-4)
    equal_trees(load_heads_file(path)["dino_head"], teacher["dino_head"])
    equal_trees(load_backbone_file(path).params, teacher["backbone"])
