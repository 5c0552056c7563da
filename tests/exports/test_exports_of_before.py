"""Exports that commit b84d464 made load, and compute what they computed there."""

import json
from pathlib import Path

import numpy as np
import pytest

from ultradino_jax.exports.formats import load_task
from ultradino_jax.exports.subject import our_features, task_logits
from ultradino_jax.weights.load import load_backbone

MADE = Path(__file__).parent.parent / "made_by_b84d464" / "exports"


@pytest.fixture(scope="module")
def expected():
    with np.load(MADE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("kind", ["safetensors", "meta"])
def test_backbones(expected, kind):
    if kind == "meta":
        pytest.importorskip("torch")
    backbone = load_backbone(MADE / kind)
    report = json.loads((MADE / kind / "export_report.json").read_text())
    assert backbone.digest == report["parameters_sha256"]
    assert (backbone.name, backbone.mean) == (report["name"], (0.25,))
    cls, patches = our_features(backbone, expected["images"])
    np.testing.assert_allclose(cls, expected["cls"], atol=1e-5)
    np.testing.assert_allclose(patches, expected["patches"], atol=1e-5)


def test_classifier(expected):
    classifier = load_task(MADE / "classifier")
    assert classifier.classes == ("head", "femur", "abdomen")
    logits = task_logits(classifier, expected["images"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
