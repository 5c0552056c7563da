import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from ultradino_jax.models.block import pack, subset_residual, unpack
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.pos_embed import interpolate_pos_embed
from ultradino_jax.models.vit import ViT, build_vit
from ultradino_jax.tree import flat_names
from ultradino_jax.weights.meta import dino_head_params, vit_params

SMALL = ViT(64, 3, 2, patch_size=16, image_size=64, num_registers=4)


def channels_last(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


@pytest.fixture(scope="module")
def vit(golden, sub):
    arrays = golden("vit")
    return arrays, {"params": vit_params(sub(arrays, "param/"))}


@pytest.mark.parametrize("name", ["img64_nomask", "img64_mask", "img48"])
def test_forward_equals_reference(vit, name):
    g, variables = vit
    images = channels_last(g["x64" if "64" in name else "x48"])
    masks = jnp.asarray(g["mask64"]) if name == "img64_mask" else None
    out = jax.jit(SMALL.apply)(variables, images, masks)
    for ours, theirs in [
        (out.cls_token, "x_norm_clstoken"),
        (out.register_tokens, "x_norm_regtokens"),
        (out.patch_tokens, "x_norm_patchtokens"),
        (out.prenorm, "x_prenorm"),
    ]:
        np.testing.assert_allclose(ours, g[f"{name}/{theirs}"], rtol=1e-5, atol=2e-5)


def test_intermediate_layers_equal_reference(vit):
    g, variables = vit
    out = SMALL.apply(variables, channels_last(g["x64"]), layers=(-2, -1))
    for i in range(2):
        tokens = out.layers[i]
        np.testing.assert_allclose(
            tokens[:, 0], g[f"intermediate_n2/{i}_cls"], atol=2e-5
        )
        np.testing.assert_allclose(
            tokens[:, 5:], g[f"intermediate_n2/{i}_patch"], atol=2e-5
        )
    out = SMALL.apply(
        variables, channels_last(g["x48"]), layers=(0, 2), norm_layers=False
    )
    for i in range(2):
        maps = rearrange(out.layers[i][:, 5:], "b (h w) d -> b d h w", h=3)
        theirs = g[f"intermediate_0_2_img48_reshape_nonorm/{i}"]
        np.testing.assert_allclose(maps, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("offset", [0.1, 0.0])
@pytest.mark.parametrize("antialias", [False, True])
def test_position_interpolation_equals_reference(golden, vit, offset, antialias):
    tag = f"off{offset}_aa{int(antialias)}"
    options = {"offset": offset, "antialias": antialias}
    g = golden("pos_embed_14")
    for side in (96, 224, 256, 384, 512):
        ours = interpolate_pos_embed(
            jnp.asarray(g["pos_embed"]), (side // 16, side // 16), **options
        )
        np.testing.assert_allclose(ours, g[f"img{side}_{tag}"], atol=1e-4)
    g, variables = vit
    for name, grid in [("img48", (3, 3)), ("img32", (2, 2)), ("img80x96", (5, 6))]:
        pos = variables["params"]["pos_embed"]
        ours = interpolate_pos_embed(jnp.asarray(pos), grid, **options)
        if f"pos_embed/{name}_{tag}" in g:
            np.testing.assert_allclose(ours, g[f"pos_embed/{name}_{tag}"], atol=1e-4)


def test_head_and_its_gradients_equal_reference(golden, sub):
    g = golden("dino_head")
    head = DINOHead(hidden_dim=64, bottleneck_dim=24, num_prototypes=80)
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
    x = jnp.arange(24, dtype=jnp.float32).reshape(24, 1, 1)
    seen = []

    def branch(views):
        seen.extend(y.shape[0] for y in views)
        return tuple(map(jnp.ones_like, views))

    def update(key):
        (out,) = subset_residual((x,), branch, [key], rate=0.3, groups=2)
        return out - x

    out = update(jax.random.key(1))
    per_group = np.asarray(out).reshape(2, 12)
    kept = int(12 * 0.7)
    assert seen == [2 * kept]
    assert (np.isclose(per_group, 12 / kept).sum(axis=1) == kept).all()
    assert (np.isclose(per_group, 0).sum(axis=1) == 12 - kept).all()
    # Each row's expected update is the branch itself.
    keys = jax.random.split(jax.random.key(2), 2000)
    mean = jax.vmap(update)(keys).mean(axis=0)
    np.testing.assert_allclose(mean, 1.0, atol=0.06)


def test_training_pass_differs_and_plain_pass_ignores_drop_path(vit):
    g, variables = vit
    dropped = ViT(64, 3, 2, image_size=64, drop_path=0.5)
    images = jnp.concatenate([channels_last(g["x64"])] * 2)
    plain = dropped.apply(variables, images).cls_token
    np.testing.assert_array_equal(plain, SMALL.apply(variables, images).cls_token)
    rngs = {"drop_path": jax.random.key(0)}
    train = dropped.apply(variables, images, groups=2, train=True, rngs=rngs)
    assert not np.allclose(plain, train.cls_token)


def test_rates_per_block_zero_whole_branches_of_rows():
    model = ViT(16, 2, 2, patch_size=8, image_size=16, num_registers=0, layerscale=1.0)
    images = jax.random.normal(jax.random.key(0), (400, 16, 16, 1))
    variables = model.init(jax.random.key(1), images)
    options = {"layers": (0, 1), "norm_layers": False}
    plain = model.apply(variables, images, **options).layers
    dropped = model.clone(drop_path=(0.0, 0.5))
    same = dropped.apply(variables, images, **options).layers
    np.testing.assert_array_equal(same, plain)
    rngs = {"drop_path": jax.random.key(2)}
    first, second = dropped.apply(
        variables, images, train=True, rngs=rngs, **options
    ).layers
    np.testing.assert_allclose(first, plain[0], atol=1e-6)
    # Both branches of a row are dropped in a quarter of the rows.
    untouched = np.asarray(first == second).all(axis=(1, 2)).mean()
    assert abs(untouched - 0.25) < 0.08
    with pytest.raises(ValueError, match="3 drop path rates for 2 blocks"):
        model.clone(drop_path=(0.0, 0.1, 0.2)).apply(
            variables, images, train=True, rngs=rngs
        )


@pytest.mark.parametrize(
    "options", [{"remat": "full"}, {"remat": "dots"}, {"unroll": 3}]
)
def test_rematerialisation_and_unrolling_change_no_gradient(vit, options):
    g, variables = vit
    images = channels_last(g["x48"])

    def loss(params, model):
        return jnp.square(model.apply({"params": params}, images).cls_token).sum()

    plain = jax.grad(loss)(variables["params"], SMALL)
    other = jax.grad(loss)(variables["params"], ViT(64, 3, 2, image_size=64, **options))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        plain,
        other,
    )


def test_bfloat16_stays_close_and_keeps_float32_parameters(vit):
    g, variables = vit
    half = ViT(64, 3, 2, image_size=64, dtype=jnp.bfloat16)
    images = channels_last(g["x64"])
    shapes = jax.eval_shape(half.init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out = half.apply(variables, images).cls_token
    assert out.dtype == jnp.float32
    error = np.abs(out - g["img64_nomask/x_norm_clstoken"]).max()
    assert 1e-5 < error < 0.1


def test_attention_maps_are_distributions(vit):
    g, variables = vit
    images = channels_last(g["x64"])
    _, sown = SMALL.apply(variables, images, mutable=["intermediates"])
    (maps,) = sown["intermediates"]["blocks"]["attn"]["attention"]
    assert maps.shape == (3, 2, 2, 21, 21)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="50x64 pixels .* patch size 16"):
        SMALL.init(jax.random.key(0), jnp.zeros((1, 50, 64, 1)))
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
    large = rng.normal(size=(4, 64, 64, 1)).astype(np.float32)
    small = rng.normal(size=(6, 32, 32, 1)).astype(np.float32)
    masks = rng.random((4, 16)) < 0.5

    def together(variables):
        return SMALL.apply(variables, (large, small), (masks, None), groups=2)

    def apart(variables):
        return SMALL.apply(variables, large, masks), SMALL.apply(variables, small)

    def total(variables, forward):
        return sum((out.prenorm**2).sum() for out in forward(variables))

    for ours, theirs in zip(together(variables), apart(variables), strict=True):
        for name in ("cls_token", "register_tokens", "patch_tokens"):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(theirs, name), atol=1e-5
            )
    grads = [jax.grad(total)(variables, f) for f in (together, apart)]
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
    packed = pack(views, groups)
    for ours, theirs in zip(
        unpack(packed, [v.shape[:2] for v in views], groups), views, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    if len(views) > 1:
        for i, group in enumerate(np.asarray(packed)):
            expected = [np.split(v, groups)[i].ravel() for v in views]
            np.testing.assert_array_equal(group.ravel(), np.concatenate(expected))
