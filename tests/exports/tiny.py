"""The tiny models that the tests of exports and of embed share."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.vit import ViT
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.backbone import Backbone, save_backbone

MODEL = ViT(64, 2, 2, patch_size=16, image_size=64, layerscale=0.1, drop_path=0.3)
VARIANTS = {
    "registers": MODEL,
    "plain": MODEL.clone(num_registers=0),
    "bare": MODEL.clone(num_registers=0, layerscale=None),
}
HEAD = DINOHead(hidden_dim=16, bottleneck_dim=8, num_prototypes=12)


def random_params(module, inputs, seed=0):
    """Initial values plus noise, so that zeros and ones cannot hide a swap."""
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), params
    )


@functools.cache
def backbone(model=MODEL, channels=1):
    images = jnp.zeros((1, 64, 64, channels))
    params = random_params(model, images)
    return Backbone(
        model, params, 64, channels, (0.25,) * channels, (0.125,) * channels, "mine"
    )


def write_run(workdir):
    """The workdir of a run of two logged steps; returns its teacher."""
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
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3'  # a crash cut the last
    (workdir / "metrics.jsonl").write_text(text)
    return teacher


def equal_trees(a, b):
    a, b = flat_names(a), flat_names(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(b[name], x)
