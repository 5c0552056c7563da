"""Rows without a checkpoint: supervised networks and ViTs from scratch."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import fass, fetal_planes, jnu_ifm
from ultradino_jax.evaluators.classification import evaluate as classification
from ultradino_jax.evaluators.segmentation import evaluate as segmentation
from ultradino_jax.evaluators.segmentation.evaluate import make_rows, start_of
from ultradino_jax.evaluators.segmentation.networks import (
    NETWORKS,
    Network,
)
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    load_segmenter,
    save_segmenter,
)
from ultradino_jax.evaluators.segmentation.settings import read_settings
from ultradino_jax.models.multiresunet import MultiResUNet
from ultradino_jax.models.unet import UNet
from ultradino_jax.models.unetr import UNETR
from ultradino_jax.normalization import NORMALIZATION
from ultradino_jax.segment import segment

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[3]
CLASSES = ("background", "square")
SMALL = {
    "unet": {"width": 2},
    "multiresunet": {"width": 4},
    "unetr": {"width": 2, "embed_dim": 8, "num_heads": 2},
}


def write_squares(root, n=9):
    """Bright squares on dark noise, every image its own patient."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(n):
        image = rng.integers(0, 60, (40, 48)).astype(np.uint8)
        mask = np.zeros(image.shape, np.uint8)
        y, x = rng.integers(2, 20, 2)
        mask[y : y + 16, x : x + 20] = 1
        Image.fromarray(image + 150 * mask).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")


def small_config(**changes):
    c = fass.get_config("n3")
    c.data.name, c.data.classes = "folder", CLASSES
    c.model.image_size, c.seeds, c.replicates = 32, (0,), 20
    c.train.batch_size, c.train.validate_every, c.train.warmup_steps = 4, 5, 2
    for row, fields in SMALL.items():
        c[row].steps = 10
        c.update_from_flattened_dict({f"{row}.{k}": v for k, v in fields.items()})
    c.update_from_flattened_dict(changes)
    return c


def make_network(config, row, like=None):
    config.rows = (row,)
    return make_rows(read_settings(config), like)[row]


def recipe_of(config, row):
    return read_settings(config).recipes[row]


def test_recipes_stand_in_the_config():
    """Full sizes by default, the steps of every other row from scratch."""
    c, jnu = fass.get_config("n20"), jnu_ifm.get_config()
    built = {row: make_network(c, row, None).build(5) for row in NETWORKS}
    assert built == {
        "unet": UNet(5, width=64),
        "multiresunet": MultiResUNet(5, width=32),
        "unetr": UNETR(5, image_size=224, width=16, embed_dim=768),
    }
    for row in (*NETWORKS, "random init"):
        assert recipe_of(c, row).steps == 45_000
        assert recipe_of(jnu, row).steps == 20_000
    for row in NETWORKS:
        assert recipe_of(c, row).learning_rate == c[row].learning_rate > 0
        assert recipe_of(c, row).weight_decay == c[row].weight_decay >= 0
    c.train.budget = "equal"
    assert {recipe_of(c, row).steps for row in NETWORKS} == {20_000}


def test_input_without_checkpoint_is_that_of_pretraining():
    network = make_network(fass.get_config(), "unet", None)
    assert (network.image_size, network.channels) == (224, 1)
    (mean, std) = NORMALIZATION["fus"]
    assert (network.mean, network.std) == (mean, std)
    c = small_config(**{"model.arch": "tiny", "model.patch_size": 8})
    c.rows = ("random init",)
    vit = start_of(read_settings(c), None)
    assert vit is not None
    assert (vit.image_size, vit.channels, vit.model.patch_size) == (32, 1, 8)
    assert vit.mean == mean and vit.model.num_registers == 0
    # Beside a backbone, networks get its input.
    three = dataclasses.replace(vit, channels=3, mean=(0.1,) * 3, std=(0.2,) * 3)
    beside = make_network(small_config(), "unet", three)
    assert (beside.channels, beside.mean, beside.image_size) == (3, (0.1,) * 3, 32)


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        (("unet", "teacher"), {}, "row 'teacher' needs --checkpoint"),
        (("random init",), {}, "without --checkpoint the size of the network is"),
        (
            ("random init",),
            {"model.arch": "tiny", "model.patch_size": 14},
            "image size 32 is not a multiple of the patch size 14",
        ),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, rows, changes, message):
    write_squares(tmp_path / "data")
    config = small_config(**{"data.path": str(tmp_path / "data"), **changes})
    config.rows = rows
    with pytest.raises(ValueError, match=message) as error:
        segmentation.evaluate(config, None, tmp_path / "out", say=lambda _: None)
    assert "\n" not in str(error.value)


def filled(model):
    rng = np.random.default_rng(1)
    images = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.0, x.shape), jnp.float32),
        dict(jax.eval_shape(model.init, jax.random.key(0), images)),
    )


@pytest.mark.parametrize("row", NETWORKS)
def test_segmenters_of_networks_come_back_whole(tmp_path, row):
    network = make_network(small_config(), row, None)
    model = network.build(2)
    segmenter = Segmenter(network, model, filled(model), CLASSES)
    save_segmenter(tmp_path / "segmenter", segmenter, identity={}, history=[])
    loaded, record = load_segmenter(tmp_path)
    assert (loaded.backbone, loaded.model) == (network, model)
    assert loaded.classes == CLASSES and loaded.preprocess == segmenter.preprocess
    assert jax.tree.all(
        jax.tree.map(np.array_equal, loaded.variables, segmenter.variables)
    )
    record["network"]["name"] = "vnet"
    (tmp_path / "segmenter" / "segmenter.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="unknown segmentation network 'vnet'"):
        load_segmenter(tmp_path)


def test_digest_says_what_was_built():
    one = make_network(small_config(), "unet", None)
    again = Network.from_record(json.loads(json.dumps(one.record())))
    assert again == one and again.digest == one.digest
    other = make_network(small_config(**{"unet.width": 3}), "unet", None)
    assert other.digest != one.digest


def test_unet_runs_from_config_to_masks(tmp_path):
    """No checkpoint anywhere: trained, tested, saved, and used on a folder."""
    write_squares(tmp_path / "data")
    config = small_config(**{"data.path": str(tmp_path / "data")})
    config.rows = ("unet",)
    config.unet.learning_rate = 1e-2
    config.unet.norm = "batch"
    quiet = dict(say=lambda _: None)
    results = segmentation.evaluate(config, None, tmp_path / "out", **quiet)
    assert results["checkpoint"]["path"] is None
    assert results["checkpoint"]["name"] == "unet"
    assert results["overlap"] == {"checked": False, "reason": "nothing was pretrained"}
    entry = results["entries"]["unet"]
    assert entry["method"] == "unet" and entry["runs"][0]["choice"]["of"] == 10
    history = load_segmenter(tmp_path / "out" / "unet" / "seed0")[1]["history"]
    assert history[-1]["loss"] < history[0]["loss"]
    counts = segment(
        tmp_path / "out" / "unet" / "seed0",
        tmp_path / "data" / "images",
        tmp_path / "masks",
        say=print,
    )
    assert counts == {"images": 9, "failed": 0}
    with Image.open(tmp_path / "masks" / "0.png.mask.png") as mask:
        assert mask.size == (48, 40)
    config.unet.weight_decay = 0.1
    with pytest.raises(ValueError, match=r"weight_decay: 0\.01 there, 0\.1 now"):
        segmentation.evaluate(config, None, tmp_path / "out", **quiet)


def test_classification_from_scratch(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for k, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                image = rng.integers(100 * k, 100 * k + 100, (20, 20)).astype(np.uint8)
                path = tmp_path / "data" / split / name / f"{split}{i}.png"
                Image.fromarray(image).save(path)
    c = fetal_planes.get_config("knn")
    c.data.name, c.data.path = "folder", str(tmp_path / "data")
    c.model.arch, c.model.image_size, c.model.patch_size = "tiny", 16, 8
    c.rows, c.knn.ks, c.replicates, c.batch_size = ("random init",), (1,), 20, 8
    lines = []
    out = tmp_path / "out"
    results = classification.evaluate(c, None, out, say=lines.append)
    assert any("vit_tiny8 from scratch" in line for line in lines)
    assert list(results["entries"]) == ["random init/knn"]
    assert results["checkpoint"]["path"] is None
    c.rows = ("teacher", "random init")
    with pytest.raises(ValueError, match="row 'teacher' needs --checkpoint"):
        classification.evaluate(c, None, out, say=lines.append)


def test_eval_needs_no_checkpoint_flag(tmp_path):
    run = subprocess.run(
        [sys.executable, "eval.py", "--config=configs/fass.py:n20",
         f"--workdir={tmp_path}", "--config.rows=('vnet',)"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 1
    assert (
        run.stderr.strip().splitlines()[-1].startswith("error: config.rows=('vnet',)")
    )
