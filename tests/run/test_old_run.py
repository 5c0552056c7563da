"""Runs and caches made before the second house: see tests/made_by_b84d464."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.made_by_b84d464 import config as old_config
from ultradino_jax.data.sources import CacheSource, open_source
from ultradino_jax.run.train import train
from ultradino_jax.weights.load import load_backbone

OLD = Path(__file__).parents[1] / "made_by_b84d464"


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_cache_opens_with_the_same_pixels():
    source = open_source(OLD / "cache")
    assert isinstance(source, CacheSource) and len(source) == 8
    assert source.digest() == json.loads((OLD / "run/run.json").read_text())["digest"]
    images = {path.read_bytes() for path in (OLD / "images").iterdir()}
    assert len(images) == 8
    wanted = {np.asarray(Image.open(p)).tobytes() for p in (OLD / "images").iterdir()}
    assert {source[i].tobytes() for i in range(8)} == wanted


def test_the_backbone_loads():
    backbone = load_backbone(OLD / "run")
    assert backbone.name == "vit_tiny_patch8" and backbone.image_size == 32
    assert len(backbone.digest) == 64


def test_the_run_goes_on(one_device, tmp_path, capsys):
    """From its checkpoint at step 2 to the numbers and weights of its four steps."""
    workdir = tmp_path / "run"
    shutil.copytree(OLD / "run", workdir)
    config = old_config.get_config()
    config.data.root = str(OLD / "cache")
    train(config, workdir)
    assert "resumed from the checkpoint at step 2" in capsys.readouterr().out
    ours, theirs = rows(workdir), rows(OLD / "run")
    assert ours[:2] == theirs[:2] and len(ours) == len(theirs) == 4
    for now, then in zip(ours, theirs, strict=True):
        assert then.keys() <= now.keys()
        for name, value in then.items():
            assert now[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        load_backbone(workdir).params,
        load_backbone(OLD / "run").params,
    )
