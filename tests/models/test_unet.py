"""The supervised networks: sizes, gradients, parameter counts, and monai's forward."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from tests.sizes import depth_of
from ultradino_jax.models.multiresunet import MultiResUNet
from ultradino_jax.models.unet import UNet, pad_to_multiple
from ultradino_jax.models.unetr import UNETR, default_states
from ultradino_jax.tree import flat_names, map_with_name
from ultradino_jax.weights.meta import nest

SCRIPT = Path(__file__).parent.parent / "golden" / "make_monai_nets.py"
SMALL_UNETR = dict(image_size=32, width=2, embed_dim=16, num_heads=2, depth=3)
SMALL = {
    "unet": UNet(3, width=2),
    "unet, batch norm": UNet(3, width=2, norm="batch"),
    "multiresunet": MultiResUNet(3, width=4),
    "unetr": UNETR(3, **SMALL_UNETR, taps=(1, 2, 3)),
}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_monai_nets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


IMAGE = jnp.zeros((1, 32, 32, 1))


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def shapes_of(model, channels=1, height=224, width=224):
    images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def filled(model, seed=0):
    """Variables off their initial values, without compiling an initialisation."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        values = (
            rng.standard_normal(x.shape) * (3 / max(x.size / x.shape[-1], 9)) ** 0.5
        )
        if path.endswith(("scale", "var")):
            values = 1 + 0.2 * np.abs(values)
        return jnp.asarray(values, jnp.float32)

    return map_with_name(fill, shapes_of(model, height=32, width=32))


@pytest.mark.parametrize("name", [n for n in SMALL if "norm" not in n])
def test_logits_have_the_size_of_any_image(name):
    model = SMALL[name]
    variables = shapes_of(model, height=32, width=32)
    for side in [(37, 50), (5, 3)]:
        images = jax.ShapeDtypeStruct((2, *side, 1), jnp.float32)
        logits = jax.eval_shape(model.apply, variables, images)
        assert logits.shape == (2, *side, 3) and logits.dtype == jnp.float32


def test_padding_mirrors_what_numpy_mirrors():
    x = np.random.default_rng(0).standard_normal((2, 5, 18, 1)).astype(np.float32)
    pad = [(0, 0), (0, 11), (0, 14), (0, 0)]
    np.testing.assert_array_equal(
        pad_to_multiple(jnp.asarray(x), 16), np.pad(x, pad, mode="symmetric")
    )
    assert pad_to_multiple(jnp.zeros((1, 16, 32, 1)), 16).shape == (1, 16, 32, 1)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name):
    model = SMALL[name]
    rng = np.random.default_rng(0)
    # 48 pixels: a single pixel at the coarsest level would be normed to nothing.
    images = jnp.asarray(rng.standard_normal((2, 48, 40, 1)), jnp.float32)
    target = jnp.asarray(rng.standard_normal((2, 48, 40, 3)), jnp.float32)
    variables = filled(model)

    @jax.jit
    def gradients(variables):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, images, train=True,
                mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)},
            )  # fmt: skip
            return jnp.mean((logits - target) ** 2), new

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, new = gradients(variables)
    for path, g in flat_names(grads).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path
    # All running statistics moved, so none is left out of training.
    before = flat_names(variables.get("batch_stats", {}))
    assert bool(before) == (name in ("unet, batch norm", "multiresunet"))
    for path, x in flat_names(new.get("batch_stats", {})).items():
        assert not np.allclose(x, before.pop(path)), path
    assert not before


def test_dropout_acts_in_training_alone():
    model = SMALL["unet"]
    images = jnp.ones((1, 32, 32, 1))
    variables = filled(model)

    @jax.jit
    def run(key, train):
        rngs = {"dropout": key}
        return jax.lax.cond(
            train,
            lambda: model.apply(variables, images, train=True, rngs=rngs),
            lambda: model.apply(variables, images),
        )

    keys = [jax.random.key(i) for i in range(2)]
    np.testing.assert_array_equal(*(run(key, False) for key in keys))
    assert not np.allclose(*(run(key, True) for key in keys))


def test_parameter_counts_are_the_published_ones(golden):
    g = golden("monai_nets")
    unet = shapes_of(UNet(5))["params"]
    assert size(unet) == int(g["unet/full_parameters"]) == 31_030_853
    unetr = shapes_of(UNETR(5))["params"]
    assert size(unetr) == int(g["unetr/full_parameters"]) == 87_269_365
    # Half the width, one channel and one output: what public Keras summaries of the
    # U-Net count.
    assert size(shapes_of(UNet(1, width=32))["params"]) == 7_759_521
    assert size(shapes_of(MultiResUNet(1), channels=3)) == keras_multiresunet(3) - 2
    assert keras_multiresunet(3) == 7_262_750


def keras_multiresunet(channels):
    """What Keras counts for the authors' release: weights and running statistics.

    Convolutions inside have no bias, batch norms behind them no gain (3 numbers per
    channel), the others a gain (4). The output layer is normalised, too: three numbers
    that we do not have, for the bias that they do not have.
    """

    def conv(d, e, side):
        return side * side * d * e + 3 * e

    def block(d, u):
        a, b, c = (int(1.67 * u * share) for share in (0.167, 0.333, 0.5))
        total = conv(d, a, 3) + conv(a, b, 3) + conv(b, c, 3) + conv(d, a + b + c, 1)
        return a + b + c, total + 8 * (a + b + c)

    def path(d, u, length):
        first = conv(d, u, 3) + conv(d, u, 1) + 4 * u
        return first + (length - 1) * (conv(u, u, 3) + conv(u, u, 1) + 4 * u)

    d, total = channels, 0
    for level in range(5):
        d, count = block(d, 32 * 2**level)
        total += count
        if level < 4:
            total += path(d, 32 * 2**level, 4 - level)
    for level in (3, 2, 1, 0):
        u = 32 * 2**level
        total += 4 * d * u + u
        d, count = block(2 * u, u)
        total += count
    return total + conv(d, 1, 1)


@pytest.mark.parametrize(
    "model, message",
    [
        (UNet(2, norm="layer"), "norm='layer'"),
        (
            UNETR(2, **SMALL_UNETR, taps=(3, 6, 9)),
            "three taps from 1 to 3, got \\(3, 6, 9\\)",
        ),
    ],
)
def test_bad_fields_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(model, height=32, width=32)


def test_states_are_the_papers():
    assert [default_states(n) for n in (12, 4, 1)] == [(3, 6, 9), (1, 2, 3), (1, 1, 1)]
    same = (UNETR(2, depth=4, taps=taps) for taps in (None, (1, 2, 3)))
    assert (
        len({str(jax.make_jaxpr(m.init)(jax.random.key(0), IMAGE)) for m in same}) == 1
    )


def test_unetr_positions_follow_the_grid():
    model = SMALL["unetr"]
    images = jnp.asarray(np.random.default_rng(3).standard_normal((1, 64, 48, 1)))
    params = filled(model)["params"]
    assert params["pos_embed"].shape == (1, 2, 2, 16)
    flat = {**params, "pos_embed": jnp.full((1, 2, 2, 16), 0.5)}
    run = jax.jit(lambda params: model.apply({"params": params}, images))
    spread = jnp.arange(64.0).reshape(1, 2, 2, 16)
    assert not np.allclose(run(flat), run({**params, "pos_embed": spread}))
    # A constant field stays constant at any size: it is as good as a bias.
    embed = params["patch_embed"]
    biased = {
        **params,
        "pos_embed": jnp.zeros((1, 2, 2, 16)),
        "patch_embed": {**embed, "bias": embed["bias"] + 0.5},
    }
    np.testing.assert_allclose(run(flat), run(biased), atol=1e-4)


ORDER = {
    "conv": "o i p q -> p q i o",
    "up": "i o p q -> i p q o",
    "dense": "o i -> i o",
}


def placed(state, names):
    """Our parameters from monai's state; names: {ours: (monai's, kind)}."""
    flat, used = {}, set()
    for ours, (theirs, kind) in names.items():
        weight = state[f"{theirs}.weight"]
        leaf = "scale" if kind == "norm" else "kernel"
        flat[f"{ours}/{leaf}"] = (
            rearrange(weight, ORDER[kind]) if kind in ORDER else weight
        )
        used.add(f"{theirs}.weight")
        if f"{theirs}.bias" in state:
            flat[f"{ours}/bias"] = state[f"{theirs}.bias"]
            used.add(f"{theirs}.bias")
    return flat, set(state) - used


def unet_names():
    names = {"classifier": ("final_conv", "conv")}
    for level in range(5):
        down = f"down_{level}.convs" if level else "conv_0"
        for i in (0, 1):
            names[f"down{level}/conv{i + 1}"] = (f"{down}.conv_{i}.conv", "conv")
            up = f"upcat_{level + 1}"
            names[f"up{level}/conv{i + 1}"] = (f"{up}.convs.conv_{i}.conv", "conv")
        names[f"upsample{level}"] = (f"{up}.upsample.deconv", "up")
    return {k: v for k, v in names.items() if "upcat_5" not in v[0]}


def unetr_names():
    names = {"norm": ("vit.norm", "norm"), "classifier": ("out.conv.conv", "conv")}

    def block(ours, theirs, shortcut):
        names[f"{ours}/conv1"] = (f"{theirs}.conv1.conv", "conv")
        names[f"{ours}/conv2"] = (f"{theirs}.conv2.conv", "conv")
        if shortcut:
            names[f"{ours}/shortcut"] = (f"{theirs}.conv3.conv", "conv")

    block("skip0", "encoder1.layer", True)
    for level in (1, 2, 3):
        encoder = f"encoder{level + 1}"
        names[f"skip{level}_up0"] = (f"{encoder}.transp_conv_init.conv", "up")
        for i in range(1, 4 - level):
            names[f"skip{level}_up{i}"] = (f"{encoder}.blocks.{i - 1}.0.conv", "up")
            block(f"skip{level}_block{i}", f"{encoder}.blocks.{i - 1}.1", False)
    for level in (3, 2, 1, 0):
        decoder = f"decoder{level + 2}"
        names[f"up{level}"] = (f"{decoder}.transp_conv.conv", "up")
        block(f"block{level}", f"{decoder}.conv_block", True)
    return names


def unetr_blocks(state, depth):
    parts = {
        "norm1": ("norm1", "norm"), "norm2": ("norm2", "norm"),
        "qkv": ("attn.qkv", "dense"), "proj": ("attn.out_proj", "dense"),
        "mlp/fc1": ("mlp.linear1", "dense"), "mlp/fc2": ("mlp.linear2", "dense"),
    }  # fmt: skip
    stacks = []
    for i in range(depth):
        prefix = f"vit.blocks.{i}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if prefix in k}
        flat, rest = placed(own, parts)
        assert rest == {"norm_cross_attn.weight", "norm_cross_attn.bias"}
        stacks.append(flat)
    return {f"blocks/{k}": np.stack([s[k] for s in stacks]) for k in stacks[0]}


@pytest.mark.parametrize("name", ["unet", "unetr"])
def test_forward_equals_monais(golden, sub, recipe, name):
    g = sub(golden("monai_nets"), f"{name}/")
    shapes = json.loads(str(g["shapes"]))
    state = {k: recipe.fill(k, tuple(s)) for k, s in shapes.items()}
    if name == "unet":
        flat, rest = placed(state, unet_names())
        assert not rest
        width = len(state["conv_0.conv_0.conv.weight"])
        model = UNet(len(state["final_conv.weight"]), width=width)
    else:
        flat, rest = placed(state, unetr_names())
        embedding = "vit.patch_embedding."
        assert {k for k in rest if "vit.blocks" not in k} == {
            f"{embedding}{k}" for k in
            ("position_embeddings", "patch_embeddings.weight", "patch_embeddings.bias")
        }  # fmt: skip
        kernel = state[f"{embedding}patch_embeddings.weight"]
        flat["patch_embed/kernel"] = rearrange(kernel, "d c p q -> (p q c) d")
        flat["patch_embed/bias"] = state[f"{embedding}patch_embeddings.bias"]
        flat["pos_embed"] = rearrange(
            state[f"{embedding}position_embeddings"],
            "1 (h w) d -> 1 h w d",
            h=recipe.SIDE // kernel.shape[-1],
        )
        depth = depth_of(state, "vit.blocks.")
        flat |= unetr_blocks(state, depth)
        model = UNETR(
            len(state["out.conv.conv.weight"]),
            image_size=recipe.SIDE,
            width=len(state["encoder1.layer.conv1.conv.weight"]),
            embed_dim=len(kernel),
            num_heads=recipe.UNETR["num_heads"],
            depth=depth,
            taps=tuple(depth // 4 * i + 1 for i in (1, 2, 3)),
        )
    variables = {"params": nest(flat)}
    images = jnp.asarray(recipe.images().transpose(0, 2, 3, 1))
    expected = shapes_of(model, height=recipe.SIDE, width=recipe.SIDE)["params"]
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(
        jnp.shape, dict(expected)
    )
    run = jax.jit(functools.partial(model.apply, variables))
    logits = run(images)[:, :: recipe.STRIDE, :: recipe.STRIDE]
    wanted = rearrange(g["logits"], "b y h w -> b h w y")
    assert np.std(wanted) > 0.5
    error = float(np.abs(logits - wanted).max())
    print(f"{name}: max |difference| {error:.2e}")
    assert error < 1e-4
    if name == "unetr":  # the paper's taps are another network
        other = jax.jit(functools.partial(model.clone(taps=None).apply, variables))
        other = other(images)[:, :: recipe.STRIDE, :: recipe.STRIDE]
        assert np.abs(other - wanted).max() > 0.1
