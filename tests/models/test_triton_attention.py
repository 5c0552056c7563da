"""The kernel, interpreted: on a CPU its blocks run one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.hlo import collectives
from ultradino_jax.models import packing
from ultradino_jax.models import triton_attention as module
from ultradino_jax.models.packing import Layout, pack, unpack
from ultradino_jax.models.triton_attention import Tiles, triton_attention

HEADS, WIDTH = 2, 16
SMALL = Tiles(rows=16, across=16, warps=1, stages=1)  # several blocks of few tokens


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORWARD", SMALL)
        patch.setattr(module, "BACKWARD", SMALL)
        yield


def arrays_of(layout, seed=0, size=1.0):
    """(qkv [W,R,3D], cotangent [W,R,D]) float32; padding is not zero."""
    rng = np.random.default_rng(seed)
    shape = layout.groups, layout.rows, HEADS * WIDTH
    qkv = rng.normal(size=(*shape[:2], 3 * shape[2])) * size
    return qkv.astype(np.float32), rng.normal(size=shape).astype(np.float32)


def closed_form(qkv, dout, layout):
    """(out, gradient of qkv) in float64, by the formulas of softmax attention."""
    outs, grads = [], []
    views = zip(
        unpack(np.float64(qkv), layout), unpack(np.float64(dout), layout), strict=True
    )
    for x, g in views:
        q, k, v = rearrange(x, "b t (n a e) -> n b a t e", n=3, a=HEADS)
        g = rearrange(g, "b t (a e) -> b a t e", a=HEADS)
        logits = np.einsum("bate,base->bats", q, k) * WIDTH**-0.5
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        dp = np.einsum("bate,base->bats", g, v)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * WIDTH**-0.5
        grad = [
            np.einsum("bats,base->bate", ds, k),
            np.einsum("bats,bate->base", ds, q),
            np.einsum("bats,bate->base", p, g),
        ]
        outs.append(rearrange(p @ v, "b a t e -> b t (a e)"))
        grads.append(rearrange(np.stack(grad), "n b a t e -> b t (n a e)"))
    return padded(outs, layout), padded(grads, layout)


def padded(views, layout):
    """`pack`, in numpy: padding is zero."""
    w = layout.groups
    rows = np.concatenate([x.reshape(w, -1, x.shape[-1]) for x in views], axis=1)
    return np.pad(rows, ((0, 0), (0, layout.rows - layout.used), (0, 0)))


def by_xla(qkv, layout):
    """[W,R,3D] -> [W,R,D] by jax.nn.dot_product_attention."""
    outs = []
    for x in unpack(qkv, layout):
        q, k, v = rearrange(x, "b t (n a e) -> n b t a e", n=3, a=HEADS)
        y = jax.nn.dot_product_attention(q, k, v)
        outs.append(rearrange(y, "b t a e -> b t (a e)"))
    return pack(outs, layout)


def both(function, qkv, dout):
    """(function(qkv), gradient of qkv), compiled."""

    @jax.jit
    def run(qkv, dout):
        out, back = jax.vjp(function, qkv)
        return out, back(dout)[0]

    return run(jnp.asarray(qkv), jnp.asarray(dout))


def kernel_of(layout):
    return lambda qkv: triton_attention(qkv, layout, HEADS, interpret=True)


layouts = st.builds(
    Layout,
    st.integers(1, 2),
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 40)), min_size=1, max_size=2
    ).map(tuple),
)


@given(layouts, st.sampled_from([1.0, 4.0]), st.integers(0, 99))
@example(Layout(2, ((2, 35), (3, 9))), 1.0, 0)  # several blocks, one block, padding
@example(Layout(1, ((1, 32),)), 1.0, 0)  # whole blocks only, no padding
@settings(max_examples=3, deadline=None)
def test_equals_closed_form_and_xla(layout, size, seed):
    qkv, dout = arrays_of(layout, seed, size)
    ours = both(kernel_of(layout), qkv, dout)
    xla = both(lambda qkv: by_xla(qkv, layout), qkv, dout)
    # Logits are as size^2, so is their rounding; in the gradient it meets k and v.
    near = {"rtol": 0, "atol": 2e-6 * size**4}
    for got, other, true in zip(ours, xla, closed_form(qkv, dout, layout), strict=True):
        np.testing.assert_allclose(got, true, **near)
        np.testing.assert_allclose(got, other, **near)
        assert not np.any(got[:, layout.used :])


def test_all_padding_is_cleared_where_there_is_much(monkeypatch):
    """The interpreter fills what nobody wrote with NaN, a GPU with what was there."""
    monkeypatch.setattr(packing, "padded_rows", lambda used: -(-used // 128) * 128)
    layout = Layout(2, ((1, 9), (1, 5)))
    assert layout.rows - layout.used > 100
    qkv, dout = arrays_of(layout)
    for made in both(kernel_of(layout), qkv, dout):
        assert not np.any(made[:, layout.used :])


def test_rows_beyond_a_sequence_never_overflow():
    """All logits -369 to base 2: a missing key's 0 would be exp2(369) of them."""
    layout = Layout(1, ((1, 9), (1, 19)))
    qkv, dout = arrays_of(layout)
    q, k, _ = rearrange(qkv, "w r (n f) -> n w r f", n=3)
    q[:], k[:] = -8, 8
    ours = both(kernel_of(layout), qkv, dout)
    for got, true in zip(ours, closed_form(qkv, dout, layout), strict=True):
        np.testing.assert_allclose(got, true, atol=2e-4)


def test_bfloat16_is_rounded_in_few_places():
    layout = Layout(1, ((2, 35), (1, 9)))
    qkv, dout = (jnp.asarray(x, jnp.bfloat16) for x in arrays_of(layout))
    ours = both(kernel_of(layout), qkv, dout)
    for got, true in zip(ours, closed_form(qkv, dout, layout), strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.float64(got) - true
        assert np.linalg.norm(error) < 2**-8 * np.linalg.norm(true)


def test_groups_on_eight_devices_equal_one_device():
    layout = Layout(8, ((1, 19), (1, 5)))
    qkv, dout = arrays_of(layout)
    expected = both(kernel_of(layout), qkv, dout)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arrays = jax.device_put((qkv, dout), spread)

    def run(qkv, dout):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, back = jax.vjp(kernel_of(layout), qkv)
            return out, back(dout)[0]

    compiled = jax.jit(run).lower(*arrays).compile()
    assert not collectives(compiled.as_text(), mesh.size)
    for got, want in zip(compiled(*arrays), expected, strict=True):
        assert got.sharding.is_equivalent_to(spread, 3)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("attention", "lse"), ()])
def test_what_the_gradient_needs_is_kept_by_name(names):
    layout = Layout(1, ((1, 5),))
    qkv, dout = arrays_of(layout)
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    attention = jax.checkpoint(kernel_of(layout), policy=policy)
    _, back = jax.vjp(attention, jnp.asarray(qkv))
    kept = [x.shape for x in jax.tree.leaves(back)]
    lse = 1, HEADS, layout.rows
    assert sorted(kept) == sorted([qkv.shape, *([dout.shape, lse] if names else [])])


def test_refuses_what_it_cannot_do():
    layout = Layout(2, ((1, 5),))
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    qkv, _ = arrays_of(layout)
    with pytest.raises(ValueError, match="not those of"):
        triton_attention(qkv[:, :-1], layout, HEADS)
    with pytest.raises(ValueError, match="not 3 x 3 heads"):
        triton_attention(qkv, layout, 3)
    with pytest.raises(ValueError, match="not 3 x 4 heads of 16"):
        triton_attention(qkv, layout, 4)
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(ValueError, match="2 groups cannot be shared by 3 devices"),
    ):
        triton_attention(qkv, layout, HEADS)
