"""Segmentation from config to files, on phantom data in the real layouts."""

import json
import shutil
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import fass, jnu_ifm
from ultradino_jax.data.datasets.segmented import segmented_images
from ultradino_jax.data.phantom.layouts import write_fass
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.segmentation import train as segmentation_train
from ultradino_jax.evaluators.segmentation.evaluate import (
    evaluate,
    make_rows,
    read_pairs,
)
from ultradino_jax.evaluators.segmentation.metrics import pixel_counts
from ultradino_jax.evaluators.segmentation.segmenter import (
    load_segmenter,
    usable_backbone,
    with_drop_path,
)
from ultradino_jax.evaluators.segmentation.settings import read_settings
from ultradino_jax.evaluators.training import Job, train
from ultradino_jax.models.usfm import USFM
from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.backbone import Backbone, save_backbone

tfds.disable_progress_bar()


pytestmark = pytest.mark.usefixtures("one_device")


def small_backbone(layerscale=1.0):
    # LayerScale as from scratch, so that both rows share their compiled steps.
    model = ViT(
        16, 2, 2, patch_size=8, image_size=32, num_registers=2, layerscale=layerscale
    )
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 32, 32, 1)))["params"]
    return Backbone(model, params, 32, 1, (0.2,), (0.2,), name="small")


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_device):
    place = tmp_path_factory.mktemp("segmentation")
    write_fass(place / "download", 14, size=64)
    save_backbone(place / "run" / "backbone", small_backbone())
    return place


def small_config(place, subset="n6", **changes):
    c = fass.get_config(subset)
    c.data.data_dir = str(place / "data")
    c.data.manual_dir = str(place / "download")
    c.model.image_size = 0
    c.seeds, c.replicates = (0, 1), 200
    c.train.steps, c.train.scratch_steps, c.train.warmup_steps = 6, 6, 2
    c.train.batch_size, c.train.validate_every, c.train.checkpoint_every = 8, 2, 1
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def finished(place):
    lines = []
    results = evaluate(
        small_config(place), place / "run", place / "out", say=lines.append
    )
    return results, lines


def test_results_say_everything(place, finished):
    results, lines = finished
    out = place / "out"
    assert results == json.loads((out / "results.json").read_text("utf-8"))
    assert list(results["entries"]) == ["teacher", "random init"]
    teacher = results["entries"]["teacher"]
    assert [r["seed"] for r in teacher["runs"]] == [0, 1]
    run = teacher["runs"][0]
    assert run["splits"]["train"]["images"] == 6
    assert run["test"]["n"] == run["splits"]["test"]["images"]
    assert set(run["baselines"]) == {"background", "mean_mask"}
    gap = results["entries"]["random init"]["first_minus_this"]
    assert len(gap["by_run"]) == 2 and gap["interval"][0] <= gap["interval"][1]
    shown = lines[-2]
    mean = 100 * teacher["summary"]["foreground_dice"]["mean"]
    assert f"{mean:11.2f}" in shown and "teacher minus random init" in shown
    splits = [(out / "splits" / f"seed{s}.csv").read_text() for s in (0, 1)]
    assert splits[0] != splits[1] and splits[0].startswith("id,patient,split\n")
    with Image.open(out / "overlays.png") as sheet:
        assert sheet.height == 4 * (32 + 18)


def test_predictions_are_what_the_figures_were_computed_from(place, finished):
    from ultradino_jax.data.datasets.fass import load as load_fass

    results, _ = finished
    run = results["entries"]["teacher"]["runs"][1]
    folder = place / "out" / "teacher" / "seed1" / "predictions"
    data = load_fass(place / "data")
    hits, total = np.zeros(5), np.zeros(5)
    files = sorted(folder.iterdir())
    assert len(files) == run["test"]["n"]
    for file in files:
        predicted = np.asarray(Image.open(file))
        truth = data.mask(int(np.flatnonzero(data.ids == file.stem)[0]))
        truth = cv2.resize(truth, (32, 32), interpolation=cv2.INTER_NEAREST)
        for k in range(5):
            hits[k] += 2 * ((predicted == k) & (truth == k)).sum()
            total[k] += (predicted == k).sum() + (truth == k).sum()
    dice = (hits / total)[1:].mean()
    assert run["test"]["pooled"]["foreground_dice"] == pytest.approx(dice)


def test_a_killed_evaluation_goes_on_to_the_same_results(place, finished, monkeypatch):
    """Dies in the middle of the second split, after a checkpoint was written."""
    real = segmentation_train.train_step
    calls = []

    def dying(*args):
        calls.append(1)
        if len(calls) == 6 + 6 + 5:  # both rows of split 0, five steps of split 1
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(segmentation_train, "train_step", dying)
    config = small_config(place)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, place / "run", place / "killed", say=lambda _: None)
    assert not (place / "killed" / "results.json").exists()
    calls.clear()
    evaluate(config, place / "run", place / "killed", say=lambda _: None)
    # Split 0 was not trained again, split 1 went on at step 4.
    assert len(calls) == 2 + 6
    same = [(place / d / "results.json").read_bytes() for d in ("out", "killed")]
    assert same[0] == same[1]


def test_letterboxed_masks_lie_where_their_images_do():
    """And what is empty is neither scored nor trained on."""
    picture = np.zeros((20, 40), np.uint8)
    picture[5:15, 10:20] = 200
    rows = [{"id": "a", "patient": "a", "split": "train"}]
    data = segmented_images(
        "one", "1", ("background", "block"), rows,
        lambda i: picture, lambda i: (picture > 0).astype(np.uint8),
    )  # fmt: skip
    letterbox = Preprocess(32, 1, (0.0,), (1.0,), letterbox=True)
    pairs = read_pairs(data, letterbox)
    mask, image = pairs.masks[0], pairs.images[0, ..., 0]
    assert (mask[:8] == 255).all() and (mask[24:] == 255).all()
    assert set(np.unique(mask[8:24])) == {0, 1}
    np.testing.assert_array_equal(mask == 1, image > 100)
    # The block is as square as it was; stretched, it is twice as high.
    ys, xs = np.nonzero(mask == 1)
    assert np.ptp(ys) == np.ptp(xs) == 7
    stretched = read_pairs(data, Preprocess(32, 1, (0.0,), (1.0,))).masks[0]
    assert np.ptp(np.nonzero(stretched == 1)[0]) == 15 and stretched.max() == 1
    assert pixel_counts(mask, mask, 2).sum() > 0
    nothing = np.where(mask == 255, 1, mask)  # predictions in the empty part
    np.testing.assert_array_equal(
        pixel_counts(nothing, mask, 2), pixel_counts(mask, mask, 2)
    )


def test_a_workdir_of_another_setting_is_refused(place, finished):
    config = small_config(place, **{"train.learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"train\.learning_rate: 0\.0001 there"):
        evaluate(config, place / "run", place / "out", say=lambda _: None)


def test_a_training_of_another_architecture_is_refused_before_it_is_read(tmp_path):
    """Interrupted there; its state would not fit, which is not damage."""
    big, small = ({"x": jnp.zeros(n)} for n in (5, 3))
    options: dict[str, Any] = dict(
        best_of=lambda state: state,
        step=lambda state, batch, k: (state, jnp.zeros(())),
        batches=lambda k: range(k, 4),
        validate=lambda state: 1.0,
    )

    def job(digest):
        identity = {"backbone": digest, "settings": {}}
        return Job("t", "a test", tmp_path, identity, dict, "m", 4, 1, 1)

    def interrupting(k):
        yield from range(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job("big"), big, **options | {"batches": interrupting})
    there = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(UserError, match="with other settings .backbone: 'big' t"):
        train(job("small"), small, **options)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == there
    assert len(train(job("big"), big, **options)[1]) == 4


def test_segmenter_comes_back_whole(place, finished):
    segmenter, record = load_segmenter(place / "out" / "teacher" / "seed0")
    assert segmenter.classes[1] == "aorta artery" and len(record["history"]) == 3
    assert not (place / "out" / "teacher" / "seed0" / "checkpoints").exists()
    files = sorted((place / "out" / "teacher" / "seed0" / "predictions").iterdir())
    from ultradino_jax.data.datasets.fass import load as load_fass

    data = load_fass(place / "data")
    rows = [int(np.flatnonzero(data.ids == f.stem)[0]) for f in files[:3]]
    images = np.stack([segmenter.preprocess.resize(data[i]) for i in rows])
    for mask, file in zip(segmenter.predict(images, 2), files[:3], strict=True):
        np.testing.assert_array_equal(mask, np.asarray(Image.open(file)))
    with pytest.raises(FileNotFoundError, match=r"no segmenter\.json"):
        load_segmenter(place)


def test_registers_scratch_and_drop_path():
    backbone = small_backbone(1e-5)
    kept, dropped = (usable_backbone(backbone, r) for r in ("keep", "drop"))
    assert kept.model.num_registers == 2 and "register_tokens" in kept.params
    assert dropped.model.num_registers == 0
    assert set(kept.params) - set(dropped.params) == {"register_tokens"}
    with pytest.raises(ValueError, match="registers='none'"):
        usable_backbone(backbone, "none")
    scratch = make_rows(read_settings(fass.get_config("n20")), dropped)["random init"]
    assert np.allclose(scratch.params["blocks"]["ls1"]["gamma"], 1.0)
    model = with_drop_path(ViT(16, 12, 2), 0.4)
    np.testing.assert_allclose(model.drop_path, 0.4 * np.arange(12) / 11)
    assert with_drop_path(USFM(), 0.4).drop_path == 0.2


def steps_of(config, row):
    return read_settings(config).recipes[row].steps


def test_budgets_are_the_papers():
    n20, full, jnu = fass.get_config("n20"), fass.get_config(), jnu_ifm.get_config()
    assert (steps_of(n20, "teacher"), steps_of(n20, "random init")) == (20_000, 45_000)
    assert steps_of(full, "teacher") == steps_of(full, "random init") == 45_000
    assert steps_of(jnu, "teacher") == steps_of(jnu, "random init") == 20_000
    assert len(n20.seeds) == len(jnu.seeds) == 5 and len(full.seeds) == 3
    n20.train.budget = "equal"
    assert steps_of(n20, "random init") == 20_000


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"subset": "k20"}, "subset 'k20'"),
        ({"train.warmup_steps": 6}, "6 warm-up steps do not fit 6"),
        ({"data.split_file": "nowhere.csv"}, "'nowhere.csv' does not exist"),
    ],
)
def test_bad_settings_are_one_line(place, finished, tmp_path, changes, message):
    config = small_config(place, **changes)
    with pytest.raises((ValueError, OSError), match=message) as error:
        evaluate(config, place / "run", tmp_path, say=lambda _: None)
    assert "\n" not in str(error.value)


def test_absent_structure_and_seen_image_are_refused(place, finished, tmp_path):
    split = (place / "out" / "splits" / "seed0.csv").read_text().splitlines()
    kept = [x for x in split[1:] if not x.endswith("train")]
    from ultradino_jax.data.datasets.fass import load as load_fass

    data = load_fass(place / "data")
    held = {line.split(",")[1] for line in kept}
    poor = [
        i for i in range(len(data))
        if data.patients[i] not in held and not (data.mask(i) == 3).any()
    ]  # fmt: skip
    assert poor
    lines = ["id,patient,split", *kept, f"{data.ids[poor[0]]},x,train"]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    config = small_config(place, **{"data.split_file": str(tmp_path / "s.csv")})
    with pytest.raises(ValueError, match="none of the 1 images of the train split has"):
        evaluate(config, place / "run", tmp_path / "out", say=lambda _: None)
    shutil.copytree(place / "run", tmp_path / "run")
    from ultradino_jax.data.phantom.layouts import FASS_FOLDER

    facts = {"root": str(place / "download" / FASS_FOLDER / "IMAGES"), "list_file": ""}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": facts}))
    with pytest.raises(ValueError, match="are among the pretraining images"):
        evaluate(
            small_config(place), tmp_path / "run", tmp_path / "o", say=lambda _: None
        )
