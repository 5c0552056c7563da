import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultradino_jax import optimizer
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.meta import dino_head_params, vit_params


def as_tree(names, values):
    """{reference name: array} -> our parameter tree."""
    parts = {"backbone": {}, "dino_head": {}}
    for name, value in zip(names, values, strict=True):
        part, rest = name.split(".", 1)
        parts[part][rest] = value
    return {
        "backbone": vit_params(parts["backbone"]),
        "dino_head": dino_head_params(parts["dino_head"]),
    }


GOLDEN = sorted(Path(__file__).parent.glob("golden/param_groups_*.npz"))


@pytest.mark.parametrize("name", [path.stem for path in GOLDEN])
def test_parameter_tables_equal_reference(golden, name):
    g = golden(name)
    # The tables do not depend on sizes: a width of two (of six for qkv) will do.
    shapes = [tuple(json.loads(s)) for s in g["shapes"]]
    width = shapes[list(g["names"]).index("backbone.cls_token")][-1]
    shapes = [tuple(2 * n // width if n >= width else n for n in s) for s in shapes]

    def expected(values):
        full = [np.full(s, v) for s, v in zip(shapes, values, strict=True)]
        return as_tree(g["names"], full)

    params = expected(np.zeros(len(shapes)))
    tables = {
        "lr_multiplier": optimizer.learning_rate_table(
            params, layerwise_decay=0.9, patch_embed_multiplier=0.2
        ),
        "wd_multiplier": optimizer.weight_decay_table(params),
        "is_last_layer": optimizer.last_layer_table(params),
    }
    for key, table in tables.items():
        theirs = flat_names(expected(g[key].astype(float)))
        ours = flat_names(table)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            shape = theirs[name].shape
            np.testing.assert_allclose(
                np.broadcast_to(value, shape), theirs[name], rtol=1e-6, err_msg=name
            )


def test_unknown_backbone_parameter_is_named():
    params = {"backbone": {"blocks": {"w": np.zeros((2, 3))}, "extra": np.zeros(3)}}
    with pytest.raises(ValueError, match="backbone/extra"):
        optimizer.learning_rate_table(
            params, layerwise_decay=0.9, patch_embed_multiplier=0.2
        )


def test_update_equals_optax_adamw_where_the_tables_are_flat():
    rng = np.random.default_rng(0)
    params = {"dino_head": {"mlp_0": {"kernel": jnp.asarray(rng.normal(size=(4, 3)))}}}
    params["backbone"] = {"blocks": {"w": jnp.asarray(rng.normal(size=(1, 2)))}}
    grads = jax.tree.map(lambda x: 0.1 * x + 0.01, params)
    ours = optimizer.make_optimizer(
        learning_rate=lambda s: 0.01 * (s + 1),
        last_layer_learning_rate=lambda s: 0.0,
        weight_decay=lambda s: 0.3,
        layerwise_decay=1.0,
        patch_embed_multiplier=1.0,
        clip_norm=1e9,
    )
    theirs = optax.adamw(lambda s: 0.01 * (s + 1), weight_decay=0.3)
    states = ours.init(params), theirs.init(params)
    a = b = params
    for _ in range(3):
        u, s0 = ours.update(grads, states[0], a)
        v, s1 = theirs.update(grads, states[1], b)
        states, a, b = (s0, s1), optax.apply_updates(a, u), optax.apply_updates(b, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_clipping_is_per_submodule():
    grads = {"backbone": jnp.full(4, 10.0), "dino_head": jnp.full(4, 0.1)}
    clip = optimizer.clip_by_submodule(3.0)
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(jnp.linalg.norm(clipped["backbone"]), 3.0, rtol=1e-6)
    np.testing.assert_array_equal(clipped["dino_head"], grads["dino_head"])
