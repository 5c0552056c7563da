"""Classifiers and segmenters: what is exported computes the same where it is read."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exports.tiny import MODEL, backbone, equal_trees
from ultradino_jax.cli import command
from ultradino_jax.evaluators.classification.classifier import (
    Classifier,
    save_classifier,
)
from ultradino_jax.evaluators.classification.finetune import NormStats, apply_head
from ultradino_jax.evaluators.segmentation.networks import Network
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    save_segmenter,
    segmentation_model,
    usable_backbone,
)
from ultradino_jax.evaluators.trained import load_trained, trained_folder
from ultradino_jax.export import main
from ultradino_jax.exports.checked import check_images, export
from ultradino_jax.exports.formats import load_task, write
from ultradino_jax.exports.onnx_backbone import to_channels_first
from ultradino_jax.exports.subject import our_outputs, task_logits
from ultradino_jax.models.usfm import USFM
from ultradino_jax.weights.load import load_backbone

NAMES = ("Bauch", "Kopf", "Schädel")


def classifier(layers=1, patch=False, norm=True, model=MODEL, seed=0):
    rng = np.random.default_rng(seed)
    f = (layers + patch) * model.embed_dim
    head = {"kernel": rng.normal(0, 0.3, (f, 3)), "bias": rng.normal(size=3)}
    if norm:
        head |= {"mean": rng.normal(size=f), "var": rng.uniform(0.5, 2, f)}
    head = {name: x.astype(np.float32) for name, x in head.items()}
    return Classifier(backbone(model), head, layers, patch, NAMES)


@functools.cache
def segmenter(registers="drop", norm="none"):
    usable = usable_backbone(backbone(), registers)
    model = segmentation_model(usable, 3, norm=norm, head_channels=24)
    images = jnp.zeros((1, 64, 64, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def drawn(draw, *limits):
        return lambda x: draw(*limits, x.shape).astype(np.float32)

    normal = np.random.default_rng(4).normal
    params = jax.tree.map(drawn(normal, 0, 0.15), shapes["params"])
    params |= {"backbone": usable.params}
    uniform = np.random.default_rng(1).uniform  # variances above zero
    stats = jax.tree.map(drawn(uniform, 0.5, 1.5), shapes["batch_stats"])
    variables = {"params": params, "batch_stats": stats}
    return Segmenter(usable, model, variables, ("background", "head", "symphysis"))


@pytest.fixture
def results(tmp_path):
    """Workdir of an evaluation with two fine-tuned seeds, the second better."""
    workdir = tmp_path / "results"
    for seed in (0, 1):
        folder = workdir / "teacher" / f"seed{seed}" / "classifier"
        folder.parent.mkdir(parents=True)
        save_classifier(folder, classifier(seed=seed))
    runs = [
        {"seed": 0, "val": 0.5, "test": {"macro_f1": 0.25, "accuracy": 0.5}},
        {"seed": 1, "val": 0.75, "test": {"macro_f1": 0.375, "accuracy": 0.5}},
    ]
    entries = {
        "random init/knn": {"row": "random init", "method": "knn", "runs": runs},
        "teacher/finetune": {"row": "teacher", "method": "finetune", "runs": runs},
    }
    content = {"dataset": {"name": "phantom planes"}, "entries": entries}
    (workdir / "results.json").write_text(json.dumps(content))
    return workdir


def test_the_best_run_of_a_results_folder_is_exported(results, tmp_path):
    report = export(results, "safetensors", tmp_path / "out")
    assert report["reload"]["bit_equal"] and report["kind"] == "classifier"
    assert report["classes"] == list(NAMES)
    assert report["evaluation"] == {
        "row": "teacher", "method": "finetune", "seed": 1,
        "dataset": "phantom planes", "validation": 0.75,
        "figures": {"macro_f1": 0.375, "accuracy": 0.5},
    }  # fmt: skip
    ours, again = classifier(seed=1), load_task(tmp_path / "out")
    images = check_images(ours, None)
    assert again.classes == NAMES and again.backbone.mean == (0.25,)
    np.testing.assert_array_equal(again.logits(images), ours.logits(images))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    for part in ("2. Schädel", "| test macro_f1 | 0.3750 |", "Not a medical device"):
        assert part in card
    # Another seed when its own folder is named.
    report = export(results / "teacher" / "seed0", "safetensors", tmp_path / "other")
    assert report["evaluation"]["seed"] == 0


def test_folded_batch_norm_gives_the_trained_heads_logits():
    ours = classifier()
    images = check_images(ours, None)
    cls = our_outputs(ours.backbone, images)["cls"]
    stats = NormStats(ours.head["mean"], ours.head["var"])
    wanted, _ = apply_head(ours.head, stats, jnp.asarray(cls), train=False)
    np.testing.assert_allclose(ours.logits(images), wanted, atol=1e-4)


@pytest.mark.parametrize("registers, norm", [("drop", "none"), ("keep", "batch")])
def test_upernet_leaves_as_its_own_file_and_as_onnx(tmp_path, registers, norm):
    ours = segmenter(registers, norm)
    save_segmenter(tmp_path / "own", ours)
    report = export(tmp_path / "own", "safetensors", tmp_path / "out")
    assert report["reload"]["bit_equal"] and report["kind"] == "segmenter"
    again = load_task(tmp_path / "out")
    assert (again.classes, again.model) == (ours.classes, ours.model)
    equal_trees(dict(again.variables), dict(ours.variables))
    onnxruntime = pytest.importorskip("onnxruntime")
    report = export(tmp_path / "own", "onnx", tmp_path / "onnx")
    print(report["target"])
    assert report["target"]["difference"]["logits"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    images = check_images(ours, None)
    mask, logits = session.run(
        ["mask", "logits"], {"pixel_values": to_channels_first(images)}
    )
    assert mask.dtype == np.uint8 and len(np.unique(mask)) == 3
    np.testing.assert_array_equal(mask, logits.argmax(axis=1))
    theirs = task_logits(ours, images)
    assert theirs.std() > 0.02
    np.testing.assert_array_equal(mask, theirs.argmax(axis=1))


def test_own_file_holds_other_networks(tmp_path):
    network = Network("unet", (("norm", "batch"), ("width", 2)), 32, 1, (0.2,), (0.3,))
    model = segmentation_model(network, 3, norm="none", head_channels=0)
    images = jnp.zeros((1, 32, 32, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), dict(shapes))
    unet = Segmenter(network, model, variables, NAMES)
    write("safetensors", unet, tmp_path)
    again = load_task(tmp_path)
    assert (again.classes, again.model) == (unet.classes, unet.model)
    equal_trees(dict(again.variables), dict(unet.variables))
    with pytest.raises(ValueError, match="'onnx' holds DINOv2-style ViTs"):
        write("onnx", unet, tmp_path)


def test_what_a_format_cannot_hold_is_said(results, tmp_path):
    out = tmp_path / "out"
    for task, kind, message in [
        (classifier(), "timm", "format 'timm' has no classifiers; choose one of hf"),
        (segmenter(), "hf", "format 'hf' has no segmenters; choose one of onnx, saf"),
        (classifier(2), "hf", "sees the last block only, this probe the last 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(kind, task, out)
    usfm = dataclasses.replace(
        backbone(USFM(48, 2, 3, image_size=64), channels=3), name="usfm"
    )
    head = {"kernel": np.zeros((48, 3)), "bias": np.zeros(3)}
    with pytest.raises(ValueError, match="usfm: format 'onnx' holds DINOv2-style"):
        write("onnx", Classifier(usfm, head, 1, False, NAMES), out)
    flags = ["--checkpoint", str(results), "--format", "safetensors", "--out", str(out)]
    for change, message in [
        (["--image-size", "32"], "--image-size is for backbones: a head knows one"),
        (["--heads"], "--heads is for the projection heads of a pretraining run"),
    ]:
        with pytest.raises(SystemExit, match=f"error: {message}"):
            command(main, [*flags, *change])
    assert not out.exists() and not (tmp_path / "out.new").exists()
    command(main, flags)
    with pytest.raises(ValueError, match=r"holds a classifier; exports\.formats"):
        load_backbone(out)
    (tmp_path / "backbone").mkdir()
    write("safetensors", backbone(), tmp_path / "backbone")
    with pytest.raises(ValueError, match="holds no classifier or segmenter"):
        load_task(tmp_path / "backbone")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in"):
        load_task(tmp_path)


def test_results_without_models_are_named(tmp_path):
    entries = {"teacher/knn": {"row": "teacher", "method": "knn", "runs": []}}
    (tmp_path / "results.json").write_text(json.dumps({"entries": entries}))
    with pytest.raises(ValueError, match="results of knn and no trained model"):
        trained_folder(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json' is cut or not JSON"):
        trained_folder(tmp_path)
    assert load_trained(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("layers, patch, registers", [(1, False, 4), (2, True, 0)])
def test_onnx_classifier(tmp_path, layers, patch, registers):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = MODEL.clone(num_registers=registers)
    ours = classifier(layers, patch, norm=layers == 1, model=model)
    save_classifier(tmp_path / "own", ours)
    report = export(tmp_path / "own", "onnx", tmp_path / "out")
    print(report["target"])
    assert report["target"]["batches"] == [1, 5, 2]
    assert report["target"]["difference"]["logits"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(NAMES)
    images = check_images(ours, None)
    (got,) = session.run(["probabilities"], {"pixel_values": to_channels_first(images)})
    np.testing.assert_allclose(got, jax.nn.softmax(ours.logits(images)), atol=1e-5)


@pytest.mark.parametrize("patch, registers, rgb", [(False, 4, True), (True, 0, False)])
def test_hugging_face_classifier(tmp_path, patch, registers, rgb):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = classifier(1, patch, model=MODEL.clone(num_registers=registers))
    save_classifier(tmp_path / "own", ours)
    report = export(tmp_path / "own", "hf", tmp_path / "out", rgb=rgb)
    print(report["target"])
    assert report["target"]["difference"]["logits"] < 1e-4
    auto = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out"
    )
    assert auto.config.id2label == dict(enumerate(NAMES))
    assert auto.config.num_labels == 3
    again = load_task(tmp_path / "out")
    assert again.classes == NAMES and again.backbone.channels == (3 if rgb else 1)
