"""Writes the exports beside this file; run on commit b84d464, from its root.

python PATH/make.py PATH
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.checkpoint import Backbone, save_backbone
from ultradino_jax.evaluators.classifier import Classifier, save_classifier
from ultradino_jax.export import export, our_features
from ultradino_jax.models.vit import ViT

SIDE = 32
OUT = Path(sys.argv[1])
MODEL = ViT(16, 2, 2, image_size=SIDE, layerscale=0.1, num_registers=1)


def main():
    rng = np.random.default_rng(0)
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes
    )
    backbone = Backbone(MODEL, params, SIDE, 1, (0.25,), (0.125,), "made_by_b84d464")
    work = OUT / "work"
    save_backbone(work / "own", backbone)
    for kind in ("safetensors", "meta"):
        export(work / "own", kind, OUT / kind)
    head = {"kernel": rng.normal(size=(16, 3)), "bias": rng.normal(size=3)}
    head = {name: x.astype(np.float32) for name, x in head.items()}
    names = ("head", "femur", "abdomen")
    classifier = Classifier(backbone, head, 1, False, names)
    save_classifier(work / "classifier", classifier)
    export(work / "classifier", "safetensors", OUT / "classifier")
    images = rng.normal(size=(2, SIDE, SIDE, 1)).astype(np.float32)
    cls, patches = our_features(backbone, images)
    logits = classifier.logits(images)
    np.savez_compressed(
        OUT / "expected.npz", images=images, cls=cls, patches=patches, logits=logits
    )


main()
