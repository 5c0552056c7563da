"""eval.py's work from config to files, on phantom data in the real layout."""

import contextlib
import csv
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.metrics import f1_score

from configs.fetal_planes import get_config
from ultradino_jax.data.datasets.open import open_labelled
from ultradino_jax.data.phantom.layouts import write_african, write_fetal_planes
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.classifier import load_classifier
from ultradino_jax.evaluators.classification.evaluate import evaluate
from ultradino_jax.evaluators.evaluate import evaluate as evaluate_any
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone, save_backbone
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.whole import Lock

tfds.disable_progress_bar()


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_device):
    """Folder with the phantom downloads, a data_dir and an exported backbone."""
    place = tmp_path_factory.mktemp("evaluation")
    write_fetal_planes(place / "download", 10, size=32)
    write_african(place / "african", 10, size=32)
    model = ViT(16, 2, 2, patch_size=8, image_size=16, num_registers=1, layerscale=1.0)
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 16, 16, 1)))["params"]
    backbone = Backbone(model, params, 16, 1, (0.2,), (0.2,), name="small")
    save_backbone(place / "run" / "backbone", backbone)
    return place


def small_config(place, mode, **changes):
    c = get_config(mode)
    c.data.data_dir = str(place / "data")
    c.data.manual_dir = str(place / "download")
    c.seeds, c.replicates, c.batch_size = (0, 1), 200, 32
    c.linear.batch_size = c.finetune.batch_size = 16
    c.linear.epochs, c.linear.warmup_epochs = 2, 1
    c.finetune.epochs, c.finetune.warmup_epochs = 2, 1
    c.logreg.log10_c, c.knn.ks = (-3.0, 1.0, 3), (5, 10)
    c.fewshot.shots, c.fewshot.seeds, c.fewshot.linear_steps = (1, 2), (0, 1), 20
    c.update_from_flattened_dict(changes)
    return c


def run(place, name, mode, **changes):
    lines = []
    config = small_config(place, mode, **changes)
    results = evaluate(config, place / "run", place / name, say=lines.append)
    return results, lines


def cached_config(place):
    external = {
        "linear.recipe": "cached",
        "external.name": "african_planes",
        "external.data_dir": str(place / "data"),
        "external.manual_dir": str(place / "african"),
    }
    return small_config(place, "linear", **external)


@pytest.fixture(scope="module")
def cached(place):
    lines = []
    config = cached_config(place)
    return evaluate(config, place / "run", place / "cached", lines.append), lines


def read_predictions(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results_say_everything(place, cached):
    results, lines = cached
    assert results == json.loads((place / "cached" / "results.json").read_text())
    assert list(results["entries"]) == [
        "teacher/linear",
        "random init/linear",
        "raw pixels/linear",
    ]
    backbone = load_backbone(place / "run")
    assert results["checkpoint"]["digest"] == backbone.digest
    assert results["dataset"]["version"] == "1.0.0"
    splits = results["dataset"]["splits"]
    assert {s: v["patients"] for s, v in splits.items()} == {
        "train": 4, "val": 1, "test": 5,
    }  # fmt: skip
    assert len(results["dataset"]["split_hash"]) == 64
    assert results["config"]["linear"]["recipe"] == "cached"
    teacher = results["entries"]["teacher/linear"]
    assert [r["seed"] for r in teacher["runs"]] == [0, 1]
    assert set(teacher["runs"][0]["choice"]) == {
        "num_layers", "avgpool", "learning_rate",
    }  # fmt: skip
    run0 = teacher["runs"][0]
    machines = run0["groups"]["machine"]
    assert sum(m["images"] for m in machines.values()) == 60
    assert sum(m["train_images"] for m in machines.values()) <= 48
    assert np.sum(run0["test"]["confusion"]) == 60
    # The table has one line per entry, with the figures of the file.
    shown = lines[-2].splitlines()
    assert sum("chosen" in x or "learning_rate" in x for x in shown) == 4
    parts = [x for x in shown if x.startswith("teacher/linear, ")]
    assert any(", machine Aloka: " in x for x in parts)
    assert "african_planes: macro F1" in parts[-1]
    assert f"{100 * teacher['summary']['macro_f1']['mean']:.2f}" in shown[1]
    with Image.open(place / "cached" / "confusion.png") as figure:
        assert min(figure.size) > 300


def test_predictions_agree_with_the_figures(place, cached):
    results, _ = cached
    lines = read_predictions(place / "cached")
    external = sum(s["images"] for s in results["external"]["splits"].values())
    assert len(lines) == 3 * 2 * (60 + external)
    for label, entry in results["entries"].items():
        for record in entry["runs"]:
            mine = [
                line
                for line in lines
                if line["entry"] == label
                and line["set"] == "test"
                and int(line["seed"]) == record["seed"]
            ]
            truth = [line["label"] for line in mine]
            predicted = [line["prediction"] for line in mine]
            f1 = f1_score(truth, predicted, average="macro", zero_division=0)
            assert record["test"]["macro_f1"] == pytest.approx(f1, abs=1e-12)
            for line in mine[:5]:
                scores = {c: float(line[c]) for c in results["dataset"]["classes"]}
                assert max(scores, key=scores.get) == line["prediction"]
                assert sum(scores.values()) == pytest.approx(1, abs=1e-4)
    runs = results["entries"]["teacher/linear"]["runs"]
    f1 = [r["test"]["macro_f1"] for r in runs]
    summary = results["entries"]["teacher/linear"]["summary"]["macro_f1"]
    assert summary["mean"] == pytest.approx(np.mean(f1))
    assert summary["std"] == pytest.approx(np.std(f1, ddof=1))
    low, high = summary["interval"]
    assert low <= summary["mean"] <= high


def test_external_figures_are_those_of_the_shared_classes(place, cached):
    results, _ = cached
    lines = [
        line
        for line in read_predictions(place / "cached")
        if line["set"] == "external"
        and line["seed"] == "1"
        and line["entry"] == "teacher/linear"
    ]
    shared = results["external"]["classes"]
    assert "Other" not in shared and len(shared) == 4
    figures = results["entries"]["teacher/linear"]["runs"][1]["external"]
    among = [max(shared, key=lambda c, line=line: float(line[c])) for line in lines]
    truth = [line["label"] for line in lines]
    assert figures["shared"]["macro_f1"] == pytest.approx(
        f1_score(truth, among, average="macro", zero_division=0)
    )
    free = [line["prediction"] for line in lines]
    assert figures["open"]["macro_f1"] == pytest.approx(
        f1_score(truth, free, labels=shared, average="macro", zero_division=0)
    )


def test_the_same_config_gives_the_same_numbers(place, cached):
    changes = {"linear.recipe": "cached", "rows": ("teacher", "raw pixels")}
    again, _ = run(place, "again", "linear", **changes)
    for label, entry in again["entries"].items():
        before = cached[0]["entries"][label]
        assert entry["summary"] == before["summary"]
    assert again["dataset"] == cached[0]["dataset"]


@pytest.mark.parametrize("mode", ["knn", "logreg"])
def test_deterministic_modes_run_once(place, mode):
    results, _ = run(place, mode, mode, rows=("teacher", "raw pixels"))
    assert list(results["entries"]) == [f"teacher/{mode}", f"raw pixels/{mode}"]
    for entry in results["entries"].values():
        assert len(entry["runs"]) == 1 and entry["summary"]["macro_f1"]["std"] is None
    choice = results["entries"]["teacher/" + mode]["runs"][0]["choice"]
    assert choice.get("k", 5) in (5, 10) and choice.get("C", 0.1) in (1e-3, 0.1, 10.0)


def test_paper_recipe_and_finetune(place):
    linear, _ = run(place, "paper", "linear", seeds=(0,), rows=("teacher",))
    assert list(linear["entries"]) == ["teacher/linear"]
    rows = ("teacher", "random init", "raw pixels")
    tuned, _ = run(place, "tuned", "finetune", seeds=(0,), rows=rows)
    assert list(tuned["entries"]) == ["teacher/finetune", "random init/finetune"]
    for row in ("random init", "teacher"):
        assert_kept_model_gives_the_predictions(place / "tuned", row, "finetune")
    # The training state is gone once the model is kept, which ends the same call.
    assert not (place / "tuned" / "teacher" / "seed0" / "checkpoints").exists()
    again, _ = run(place, "tuned", "finetune", seeds=(0,), rows=rows)
    assert again["entries"] == tuned["entries"]


def assert_kept_model_gives_the_predictions(workdir, row, method):
    """The classifier beside the results computes what predictions.csv says."""
    folder = workdir / row.replace(" ", "_") / "seed0"
    classifier, _ = load_classifier(folder)
    lines = [
        r
        for r in read_predictions(workdir)
        if (r["entry"], r["seed"], r["set"]) == (f"{row}/{method}", "0", "test")
    ]
    data = open_labelled(small_config(workdir.parent, method).data).split("test")
    assert [r["id"] for r in lines[:9]] == list(data.ids[:9])
    preprocess = classifier.preprocess
    images = np.stack([preprocess.resize(np.asarray(data[i])) for i in range(9)])
    scores = jax.nn.softmax(classifier.logits(preprocess.normalise(images)))
    wanted = [[float(r[name]) for name in classifier.classes] for r in lines[:9]]
    np.testing.assert_allclose(scores, wanted, atol=2e-5)


def test_kept_probe_gives_the_predictions_and_knows_its_backbone(place, cached):
    assert_kept_model_gives_the_predictions(place / "cached", "teacher", "linear")
    assert not (place / "cached" / "random_init").exists()
    folder = place / "cached" / "teacher" / "seed1" / "classifier"
    record = json.loads((folder / "classifier.json").read_text())
    moved = record | {"backbone": record["backbone"] | {"checkpoint": "elsewhere"}}
    copy = place / "moved"
    shutil.copytree(folder, copy)
    (copy / "classifier.json").write_text(json.dumps(moved))
    with pytest.raises(FileNotFoundError, match="no longer at 'elsewhere': correct"):
        load_classifier(copy)
    moved["backbone"] |= {"checkpoint": str(place / "run"), "digest": "0123"}
    (copy / "classifier.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"digest 0123; .*run' now holds"):
        load_classifier(copy)
    with pytest.raises(FileNotFoundError, match=r"no classifier\.json in"):
        load_classifier(place)


def test_few_labels(place):
    results, _ = run(place, "few", "fewshot", rows=("teacher",))
    labels = [f"teacher/{m}/{n}" for m in ("linear", "logreg", "knn") for n in (1, 2)]
    assert list(results["entries"]) == labels
    assert all(len(e["runs"]) == 2 for e in results["entries"].values())
    # Probabilities are left out of the many runs.
    lines = read_predictions(place / "few")
    assert len(lines) == 6 * 2 * 60 and lines[0]["Other"] is None
    by_patient = {"fewshot.unit": "patients", "fewshot.methods": ("knn",)}
    with pytest.raises(ValueError, match="'Other' has 1 patients, 2 were asked for"):
        run(place, "few2", "fewshot", **by_patient)


def test_bad_settings_are_named(place, tmp_path):
    with pytest.raises((ValueError, OSError), match="^fetal_planes is not prepared in"):
        nowhere = {"data.data_dir": str(tmp_path), "data.manual_dir": ""}
        run(place, "x", "knn", **nowhere)
    with pytest.raises(FileNotFoundError, match=r"checkpoint '.*gone' does not exist"):
        evaluate(small_config(place, "knn"), place / "gone", place / "x")
    with pytest.raises(ValueError, match=r"16 wide with 2 blocks, 'small' is 384 wide"):
        run(place, "x", "knn", **{"model.arch": "small"})


def test_parameters_of_another_architecture_name_both_shapes(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "backbone" / "backbone.json"
    record = json.loads(path.read_text())
    record["model"]["embed_dim"] = 24
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"shape: \(.*\).* stored shape: \(.*\)\.$"):
        load_backbone(tmp_path / "run")


def test_a_folder_of_other_weights_or_of_another_process_is_refused(place, cached):
    config = small_config(place, "knn")
    with pytest.raises(UserError, match=r"holds an evaluation with.*config\.mode: "):
        evaluate(config, place / "run", place / "cached")
    backbone = load_backbone(place / "run")
    params = jax.tree.map(lambda x: x + 1, backbone.params)
    other = dataclasses.replace(backbone, params=params)
    save_backbone(place / "other", other)
    before = (place / "cached/results.json").read_bytes()
    with pytest.raises(UserError, match=r"weights: '[0-9a-f]{12}\.\. there"):
        evaluate(cached_config(place), place / "other", place / "cached")
    with (
        contextlib.closing(Lock(place / "cached")),
        pytest.raises(UserError, match="cached' is in use by process"),
    ):
        evaluate_any(cached_config(place), place / "run", place / "cached")
    assert (place / "cached/results.json").read_bytes() == before


def test_external_classes_must_be_known(place, tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,Fetal heart\n")
    path = {"external.name": "csv", "external.path": str(tmp_path / "t.csv")}
    with pytest.raises(ValueError, match="'Fetal heart' is not among the 6 classes"):
        run(place, "x", "knn", **path)
