import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from ultradino_jax.models.usfm import (
    USFM,
    _source_axis,
    relative_bias,
    relative_position_index,
    resize_table,
    table_resize_matrix,
)
from ultradino_jax.weights.usfm import usfm_params

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "usfm_vit.npz")
META = json.loads(str(GOLDEN["meta"]))
SIDE, PATCH, D, DEPTH = (META[k] for k in ("img", "patch", "embed_dim", "depth"))
TINY = USFM(D, DEPTH, META["heads"], patch_size=PATCH, image_size=SIDE)
LAYERS = tuple(range(DEPTH))
CELLS = SIDE // PATCH
REMAPS = sorted({k.split("/")[1] for k in GOLDEN.files if k.startswith("remap/")})
run = jax.jit(TINY.apply, static_argnames="layers")


def channels_last(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


@pytest.fixture(scope="module")
def usfm(golden, sub):
    arrays = golden("usfm_vit")
    params, sizes, ignored = usfm_params(sub(arrays, "param/"))
    assert sizes.pop("channels") == arrays["input/x"].shape[1]
    assert USFM(**sizes) == TINY
    assert {n.split(".")[0] for n in ignored} == {"fc_norm", "head", "rel_pos_bias"}
    return arrays, params


@pytest.fixture(scope="module")
def outputs(usfm):
    g, params = usfm
    return g, run({"params": params}, channels_last(g["input/x"]), layers=LAYERS)


def test_forward_equals_the_official_model(outputs):
    g, out = outputs
    for i in LAYERS:
        np.testing.assert_allclose(out.layers[i], g[f"out/block{i}"], atol=2e-5)
    last = g[f"out/block{LAYERS[-1]}"]
    np.testing.assert_allclose(out.patch_tokens, last[:, 1:], atol=2e-5)
    np.testing.assert_allclose(out.cls_token, g["out/pooled_mean"], atol=2e-5)
    np.testing.assert_array_equal(out.prenorm, out.layers[-1])
    assert out.register_tokens.shape == (len(g["input/x"]), 0, D)


def test_classification_head_on_the_representation_equals_the_official_one(outputs):
    g, out = outputs
    x = out.cls_token
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    pooled = x * g["param/fc_norm.weight"] + g["param/fc_norm.bias"]
    np.testing.assert_allclose(pooled, g["out/pooled"], atol=2e-5)
    logits = pooled @ g["param/head.weight"].T + g["param/head.bias"]
    np.testing.assert_allclose(logits, g["out/logits"], atol=5e-5)


def test_probe_features_carry_the_bias_that_the_reference_leaves_out(usfm, outputs):
    g, out = outputs
    without = f"ultradino_noabs_eps6/get_intermediate_layers/n{DEPTH}"
    for i in LAYERS:
        theirs = g[f"{without}/{i}/patch"]
        assert np.abs(out.layers[i][:, 1:] - theirs).max() > 0.05
    # With the tables set to zero the same function gives the reference's features, so
    # the bias is all that differs.
    params = jax.tree.map(jnp.asarray, usfm[1])
    table = params["blocks"]["attn"]["rel_pos_table"]
    params["blocks"]["attn"]["rel_pos_table"] = jnp.zeros_like(table)
    images = channels_last(g["input/x"])
    bare = run({"params": params}, images, layers=LAYERS)
    for i in LAYERS:
        np.testing.assert_allclose(
            bare.layers[i][:, 1:], g[f"{without}/{i}/patch"], atol=2e-5
        )
        np.testing.assert_allclose(
            bare.layers[i][:, 0], g[f"{without}/{i}/cls"], atol=2e-5
        )


def test_a_table_for_each_block_equals_the_official_fine_tuning_model(golden, sub):
    g = golden("usfm_vit")
    state = sub(g, "param/") | sub(g, "perblock/param/")
    state.pop("rel_pos_bias.relative_position_bias_table")
    params, _, _ = usfm_params(state)
    out = run({"params": params}, channels_last(g["input/x"]), layers=LAYERS)
    for i in LAYERS:
        theirs = g[f"perblock/out/block{i}"]
        np.testing.assert_allclose(out.layers[i], theirs, atol=2e-5)
    np.testing.assert_allclose(out.cls_token, g["perblock/out/pooled_mean"], atol=2e-5)


def test_index_and_bias_equal_the_official_ones(golden):
    g = golden("usfm_vit")
    other = tuple(side // PATCH for side in META["nonsquare"])
    for prefix, grid in (("rel_pos", (CELLS, CELLS)), ("nonsquare/rel_pos", other)):
        index = relative_position_index(grid)
        np.testing.assert_array_equal(index, g[f"{prefix}/relative_position_index"])
        table = f"{prefix.removesuffix('rel_pos')}param/rel_pos_bias."
        bias = relative_bias(g[table + "relative_position_bias_table"], grid, grid)
        np.testing.assert_array_equal(bias, g[f"{prefix}/relative_position_bias"])


@pytest.mark.parametrize("remap", REMAPS)
def test_table_resize_equals_scipys_with_the_axes_in_place(golden, remap):
    g, tag = golden("usfm_vit"), f"remap/{remap}"
    source, target = map(int, remap.split("to"))
    np.testing.assert_allclose(
        _source_axis(source, target), g[f"{tag}/src_axis"], atol=1e-5
    )
    ours = resize_table(jnp.asarray(g[f"{tag}/src"]), 2 * (source,), 2 * (target,))
    np.testing.assert_allclose(ours, g[f"{tag}/axes_swapped_back"], atol=1e-4)
    assert np.abs(ours - g[f"{tag}/official_out"]).max() > 0.1


def test_resize_is_finite_where_the_official_one_is_not_and_keeps_offset_zero():
    for target in (16, 21, 24, 28, 37):
        matrix = table_resize_matrix(14, target)
        assert np.isfinite(matrix).all()
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
        middle = np.eye(27)[13]
        np.testing.assert_allclose(matrix[target - 1], middle, atol=1e-6)


def test_other_image_sizes_run_with_resized_tables(usfm):
    g, params = usfm
    x = channels_last(g["nonsquare/input/x"])
    shapes = jax.eval_shape(TINY.apply, {"params": params}, x)
    cells = math.prod(side // PATCH for side in x.shape[1:3])
    assert shapes.patch_tokens.shape == (len(x), cells, D)
    # The same tables, resized beforehand, in a model whose window has that size.
    tables = jnp.asarray(params["blocks"]["attn"]["rel_pos_table"])
    window, larger = (CELLS, CELLS), (CELLS + 2, CELLS + 2)
    grown = jnp.stack([resize_table(t, window, larger) for t in tables])
    attn = {**params["blocks"]["attn"], "rel_pos_table": grown}
    resized = {**params, "blocks": {**params["blocks"], "attn": attn}}
    side = SIDE + 2 * PATCH
    x = np.random.default_rng(0).normal(size=(1, side, side, x.shape[-1]))
    x = jnp.asarray(x, jnp.float32)
    late = run({"params": params}, x).cls_token
    early = jax.jit(TINY.clone(image_size=side).apply)({"params": resized}, x).cls_token
    np.testing.assert_allclose(late, early, atol=1e-5)


def test_attention_maps_are_distributions_and_training_drops_rows(usfm):
    g, params = usfm
    images = channels_last(g["input/x"])
    apply = jax.jit(functools.partial(TINY.apply, mutable=["intermediates"]))
    _, sown = apply({"params": params}, images)
    (maps,) = sown["intermediates"]["blocks"]["attn"]["attention"]
    tokens = 1 + CELLS**2
    assert maps.shape == (DEPTH, len(images), TINY.num_heads, tokens, tokens)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    rngs = {"drop_path": jax.random.key(0)}
    dropped = TINY.clone(drop_path=0.5)
    dropped = jax.jit(functools.partial(dropped.apply, train=True, rngs=rngs))
    dropped = dropped({"params": params}, jnp.concatenate([images] * 4))
    plain = np.concatenate([g["out/pooled_mean"]] * 4)
    assert not np.allclose(dropped.cls_token, plain)


def test_fresh_parameters_have_the_tree_of_loaded_ones(usfm):
    image = channels_last(usfm[0]["input/x"])[:1]
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), image)
    assert jax.tree.map(np.shape, usfm[1]) == jax.tree.map(
        lambda x: x.shape, shapes["params"]
    )


def test_bad_input_is_named(golden, sub):
    wrong = SIDE - PATCH + 2
    message = f"{wrong}x{SIDE} pixels .* patch size {PATCH}"
    with pytest.raises(ValueError, match=message):
        TINY.init(jax.random.key(0), jnp.zeros((1, wrong, SIDE, 3)))
    masks = jnp.ones((1, CELLS**2), bool)
    with pytest.raises(ValueError, match="USFM takes no masks"):
        TINY.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), masks)
    state, heads = sub(golden("usfm_vit"), "param/"), TINY.num_heads
    for change, message in [
        ({"blocks.1.attn.q_bias": None}, r"missing: blocks\.1\.attn\.q_bias; unexp"),
        ({"blocks.1.attn.k_bias": np.ones(D)}, r"unexpected: blocks\.1\.attn\.k_bias"),
        (
            {"blocks.2.norm1.bias": np.ones(D - 1)},
            rf"norm1\.bias is \[{D - 1}\], needs \[{D}\]",
        ),
        ({"cls_token": None}, "missing: cls_token"),
        (
            {"rel_pos_bias.relative_position_bias_table": None},
            r"missing: rel_pos_bias\.relative_position_bias_table",
        ),
        (
            {"rel_pos_bias.relative_position_bias_table": np.ones((50, heads))},
            "50 rows is not that of a square window",
        ),
    ]:
        changed = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            usfm_params(changed)
