import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import below, dino_head_of, vit_of
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.packing import layout_of, pack, random_subset, unpack
from ultradino_jax.models.pos_embed import interpolate_pos_embed
from ultradino_jax.models.vit import ViT, build_vit
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.meta import dino_head_params, vit_params

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "vit.npz")
SMALL = vit_of(below(GOLDEN, "param/"), num_heads=2)
SIDE, PATCH = SMALL.image_size, SMALL.patch_size
PREFIX = 1 + SMALL.num_registers
run = jax.jit(SMALL.apply, static_argnames=("layers", "norm_layers", "groups"))


def at_side(side=SIDE):
    """The file's images of that many pixels."""
    return channels_last(GOLDEN[f"x{side}"])


SIDES = {int(k[1:]) for k in GOLDEN.files if re.fullmatch(r"x\d+", k)}
(OTHER,) = SIDES - {SIDE}
FORWARD = [k.removesuffix("/x_prenorm") for k in GOLDEN.files if "x_prenorm" in k]


def channels_last(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


@pytest.fixture(scope="module")
def vit(golden, sub):
    arrays = golden("vit")
    return arrays, {"params": vit_params(sub(arrays, "param/"))}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_equals_reference(vit, name):
    g, variables = vit
    side = int(re.search(r"\d+", name)[0])
    masks = jnp.asarray(g[f"mask{side}"]) if name.endswith("_mask") else None
    out = run(variables, at_side(side), masks)
    for ours, theirs in [
        (out.cls_token, "x_norm_clstoken"),
        (out.register_tokens, "x_norm_regtokens"),
        (out.patch_tokens, "x_norm_patchtokens"),
        (out.prenorm, "x_prenorm"),
    ]:
        np.testing.assert_allclose(ours, g[f"{name}/{theirs}"], rtol=1e-5, atol=2e-5)


def test_intermediate_layers_equal_reference(vit):
    g, variables = vit
    last = len([k for k in g if re.fullmatch(r"intermediate_n\d+/\d+_cls", k)])
    out = run(variables, at_side(), layers=tuple(range(-last, 0)))
    for i, tokens in enumerate(out.layers):
        theirs = f"intermediate_n{last}/{i}"
        np.testing.assert_allclose(tokens[:, 0], g[f"{theirs}_cls"], atol=2e-5)
        np.testing.assert_allclose(tokens[:, PREFIX:], g[f"{theirs}_patch"], atol=2e-5)
    key = next(k for k in g if k.endswith("_reshape_nonorm/0"))[: -len("/0")]
    *layers, side = map(int, re.findall(r"\d+", key))
    out = run(variables, at_side(side), layers=tuple(layers), norm_layers=False)
    for i, tokens in enumerate(out.layers):
        maps = rearrange(tokens[:, PREFIX:], "b (h w) d -> b d h w", h=side // PATCH)
        np.testing.assert_allclose(maps, g[f"{key}/{i}"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["pos_embed_14", "vit"])
def test_position_interpolation_equals_reference(golden, name):
    g = golden(name)
    start = g["pos_embed" if "pos_embed" in g else "param/pos_embed"]
    compared = 0
    for key, expected in g.items():
        found = re.fullmatch(
            r"(?:pos_embed/)?img(\d+)(?:x(\d+))?_off([\d.]+)_aa(\d)", key
        )
        if found is None:
            continue
        height, width, offset, antialias = found.groups()
        ours = interpolate_pos_embed(
            jnp.asarray(start),
            (int(height) // PATCH, int(width or height) // PATCH),
            offset=float(offset),
            antialias=antialias == "1",
        )
        np.testing.assert_allclose(ours, expected, atol=1e-4, err_msg=key)
        compared += 1
    assert compared >= 4


def test_head_and_its_gradients_equal_reference(golden, sub):
    g = golden("dino_head")
    head = dino_head_of(sub(g, "param/"))
    params = dino_head_params(sub(g, "param/"))

    def apply(params, x):
        return head.apply({"params": params}, x)

    out, vjp = jax.vjp(apply, params, jnp.asarray(g["x"]))
    np.testing.assert_allclose(out, g["out"], rtol=1e-5, atol=1e-6)
    grads, grad_x = vjp(jnp.asarray(g["cotangent"]))
    np.testing.assert_allclose(grad_x, g["grad_x"], rtol=1e-5, atol=1e-5)
    expected = flat_names(dino_head_params(sub(g, "grad/")))
    for name, value in flat_names(grads).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant, backbone, head",
    [("small", 21_480_192, 22_352_128), ("base", 85_427_712, None)],
)
def test_parameter_counts_are_the_published_ones(variant, backbone, head):
    model = build_vit(variant)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 1)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == backbone
    if head:
        shapes = jax.eval_shape(
            DINOHead().init, jax.random.key(0), jnp.zeros((1, model.embed_dim))
        )
        assert sum(x.size for x in jax.tree.leaves(shapes)) == head


def test_drop_path_runs_an_exact_subset_of_each_group():
    layout = layout_of([(24, 1)], 2)
    x = jnp.arange(layout.rows * 2, dtype=jnp.float32).reshape(2, layout.rows, 1)
    kept = int(12 * 0.7)

    def update(key):
        subset = random_subset([key], layout, 0.3)
        assert subset.layout.views == ((kept, 1),)
        return subset.back(jnp.ones_like(subset.of(x)))

    per_group = np.asarray(update(jax.random.key(1)))[:, :12, 0]
    assert (np.isclose(per_group, 12 / kept).sum(axis=1) == kept).all()
    assert (np.isclose(per_group, 0).sum(axis=1) == 12 - kept).all()
    # Each row's expected update is the branch itself.
    keys = jax.random.split(jax.random.key(2), 2000)
    mean = jax.vmap(update)(keys).mean(axis=0)[:, :12]
    np.testing.assert_allclose(mean, 1.0, atol=0.06)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    st.floats(0, 0.95),
    st.integers(0, 99),
)
def test_a_subset_takes_whole_sequences_and_puts_them_back(groups, views, rate, seed):
    layout = layout_of([(groups * r, t) for r, t in views], groups)
    keys = jax.random.split(jax.random.key(seed), len(views))
    subset = random_subset(keys, layout, rate)
    x = np.arange(1, groups * layout.rows + 1, dtype=np.float32)
    x = x.reshape(groups, layout.rows, 1)
    taken, back = np.asarray(subset.of(x)), np.asarray(subset.back(subset.of(x)))
    assert taken.shape == (groups, subset.layout.rows, 1)
    assert (taken[:, subset.layout.used :] == 0).all()
    for w in range(groups):
        places = zip(layout.views, layout.starts, subset.layout.views, strict=True)
        for (r, t), start, (m, _) in places:
            assert m == max(int(r * (1 - rate)), 1)
            rows = back[w, start : start + r * t, 0].reshape(r, t)
            full = x[w, start : start + r * t, 0].reshape(r, t) * np.float32(r / m)
            there = (rows == full).all(axis=1)
            assert there.sum() == m
            assert (rows[~there] == 0).all()

    # The gradient is that of plain indexing, which adds by scatter.
    def loss(x, of, back):
        return jnp.sin(back(jnp.cos(of(x)))).sum()

    def plain_back(y):
        wide = jnp.zeros_like(x)
        put = jax.vmap(lambda a, i, v: a.at[i].add(v, mode="drop"))
        return put(wide, subset.rows, y) * subset.scale

    def plain_of(x):
        return jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(
            x, subset.rows
        )

    ours = jax.grad(loss)(x, subset.of, subset.back)
    np.testing.assert_allclose(
        ours, jax.grad(loss)(x, plain_of, plain_back), rtol=1e-6, atol=1e-6
    )


def test_training_pass_differs_and_plain_pass_ignores_drop_path(vit):
    _, variables = vit
    dropped = SMALL.clone(drop_path=0.5)
    images = jnp.concatenate([at_side()] * 2)
    plain = jax.jit(dropped.apply)(variables, images).cls_token
    np.testing.assert_array_equal(plain, run(variables, images).cls_token)
    rngs = {"drop_path": jax.random.key(0)}
    train = jax.jit(functools.partial(dropped.apply, groups=2, train=True, rngs=rngs))
    train = train(variables, images)
    assert not np.allclose(plain, train.cls_token)


def test_rates_per_block_zero_whole_branches_of_rows():
    model = ViT(16, 2, 2, patch_size=8, image_size=16, num_registers=0, layerscale=1.0)
    images = jax.random.normal(jax.random.key(0), (400, 16, 16, 1))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    rngs = {"drop_path": jax.random.key(2)}

    def layers(model, **options):
        options |= {"layers": (0, 1), "norm_layers": False}
        apply = jax.jit(functools.partial(model.apply, **options))
        return apply(variables, images).layers

    plain, dropped = layers(model), model.clone(drop_path=(0.0, 0.5))
    np.testing.assert_array_equal(layers(dropped), plain)
    first, second = layers(dropped, train=True, rngs=rngs)
    np.testing.assert_allclose(first, plain[0], atol=1e-6)
    # Both branches of a row are dropped in a quarter of the rows.
    untouched = np.asarray(first == second).all(axis=(1, 2)).mean()
    assert abs(untouched - 0.25) < 0.08
    with pytest.raises(ValueError, match="3 drop path rates for 2 blocks"):
        model.clone(drop_path=(0.0, 0.1, 0.2)).apply(
            variables, images, train=True, rngs=rngs
        )


def test_rematerialisation_and_unrolling_change_no_gradient(vit):
    _, variables = vit
    images = at_side(OTHER)

    def gradient(**options):
        model = SMALL.clone(**options)

        def loss(params):
            return jnp.square(model.apply({"params": params}, images).cls_token).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    plain = gradient()
    for options in ({"remat": "norms"}, {"remat": "matmuls"}, {"unroll": SMALL.depth}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            plain,
            gradient(**options),
        )


def test_bfloat16_stays_close_and_keeps_float32_parameters(vit):
    g, variables = vit
    half = SMALL.clone(dtype=jnp.bfloat16)
    images = at_side()
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = jax.jit(half.apply)(variables, images).cls_token
    assert out.dtype == jnp.float32
    error = np.abs(out - g[f"img{SIDE}_nomask/x_norm_clstoken"]).max()
    assert 1e-5 < error < 0.1


def test_attention_maps_are_distributions(vit):
    _, variables = vit
    images = at_side()
    apply = jax.jit(functools.partial(SMALL.apply, mutable=["intermediates"]))
    out, sown = apply(variables, images)
    (maps,) = sown["intermediates"]["blocks"]["attn"]["attention"]
    tokens = out.prenorm.shape[1]
    shape = (SMALL.depth, len(images), SMALL.num_heads, tokens, tokens)
    assert maps.shape == shape
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_bad_input_is_named():
    wrong = SIDE - PATCH + 2
    message = f"{wrong}x{SIDE} pixels .* patch size {PATCH}"
    with pytest.raises(ValueError, match=message):
        SMALL.init(jax.random.key(0), jnp.zeros((1, wrong, SIDE, 1)))
    with pytest.raises(ValueError, match="'huge'.*tiny, small, base, large"):
        build_vit("huge")
    with pytest.raises(ValueError, match="not a square grid"):
        interpolate_pos_embed(
            jnp.zeros((1, 13, 4)), (2, 2), offset=0.0, antialias=False
        )


def test_images_of_two_sizes_go_through_the_blocks_together(vit):
    """The same outputs as one after the other, and the same gradients summed."""
    _, variables = vit
    rng = np.random.default_rng(0)
    large = rng.normal(size=(4, SIDE, SIDE, 1)).astype(np.float32)
    small = rng.normal(size=(6, SIDE // 2, SIDE // 2, 1)).astype(np.float32)
    masks = rng.random((4, (SIDE // PATCH) ** 2)) < 0.5

    def together(variables):
        return SMALL.apply(variables, (large, small), (masks, None), groups=2)

    def apart(variables):
        return SMALL.apply(variables, large, masks), SMALL.apply(variables, small)

    def total(variables, forward):
        outputs = forward(variables)
        return sum((out.prenorm**2).sum() for out in outputs), outputs

    grads, outputs = zip(
        *(
            jax.jit(jax.grad(total, has_aux=True), static_argnums=1)(variables, f)
            for f in (together, apart)
        ),
        strict=True,
    )
    for ours, theirs in zip(*outputs, strict=True):
        for name in ("cls_token", "register_tokens", "patch_tokens"):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(theirs, name), atol=1e-5
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), *grads
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_packing_keeps_every_group_to_itself(groups, sizes):
    views = [
        np.arange(groups * r * t, dtype=np.float32).reshape(groups * r, t, 1) + 100 * i
        for i, (r, t) in enumerate(sizes)
    ]
    layout = layout_of([v.shape[:2] for v in views], groups)
    packed = np.asarray(pack(views, layout))
    alone = groups == len(sizes) == 1
    assert packed.shape[1] % (sizes[0][0] * sizes[0][1] if alone else 8) == 0
    for ours, theirs in zip(unpack(packed, layout), views, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for i, group in enumerate(packed):
        expected = [np.split(v, groups)[i].ravel() for v in views]
        expected = np.concatenate(expected)
        np.testing.assert_array_equal(group.ravel()[: len(expected)], expected)
        assert not group.ravel()[len(expected) :].any()
