import functools

import jax
import numpy as np
import pytest

from tests.golden_step import (
    GRID,
    HEAD,
    MODULES,
    SIDE,
    first_gradient,
    gradient_of,
    num_steps,
    reference_batch,
    reference_setup,
    reference_tree,
)
from ultradino_jax.optimizer import make_optimizer
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.pretraining.objective import Objective
from ultradino_jax.pretraining.step import init_state, make_train_step
from ultradino_jax.pretraining.terms import terms_in
from ultradino_jax.tree import flat_names


def assert_same_parameters(ours, theirs):
    """Within 1e-5, except key biases: their gradient is 0, so Adam steps on noise."""
    theirs = flat_names(theirs)
    for name, value in flat_names(ours).items():
        value, expected = np.asarray(value), theirs[name]
        if name.endswith("qkv/bias"):
            d = value.shape[-1] // 3
            value = np.delete(value, np.s_[d : 2 * d], axis=-1)
            expected = np.delete(expected, np.s_[d : 2 * d], axis=-1)
        np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=name)


def assert_same_gradient(state, metrics, theirs):
    theirs = flat_names(theirs)
    for name, gradient in first_gradient(state, metrics).items():
        np.testing.assert_allclose(gradient, theirs[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_training_steps_equal_the_reference(golden, sub, centering):
    g = golden("train_step")
    tag = centering.split("_")[0]
    # One image and a few masked patches at a time, or all at once.
    options = {"chunk_rows": 8} if tag == "centering" else {}
    step, state = reference_setup(g, sub, centering, **options)
    for i in range(num_steps(g)):
        before = state
        state, metrics = step(state, reference_batch(g, flipped=bool(i % 2)))
        loss = sub(g, f"{tag}/step{i}/loss/")
        for ours, theirs in {
            "dino_local": loss["dino_local_crops_loss"],
            "dino_global": loss["dino_global_crops_loss"],
            "koleo": 2 * loss["koleo_loss"],  # the reference displays half
            "ibot": 2 * loss["ibot_loss"],
            "total": loss["total"],
        }.items():
            np.testing.assert_allclose(metrics[ours], theirs, rtol=1e-5, err_msg=ours)
        for name, norm in sub(g, f"{tag}/step{i}/grad_norm_before_clip/").items():
            np.testing.assert_allclose(metrics[f"grad_norm/{name}"], norm, rtol=1e-5)
        if tag == "centering":
            for name in ("dino", "ibot"):  # theirs is the center the step used
                theirs = g[f"{tag}/step{i}/{name}_center"].ravel()
                np.testing.assert_allclose(before.centers[name], theirs, atol=1e-5)
        if i == 0 and f"{tag}/step0/grad_unclipped/backbone.cls_token" in g:
            assert_same_gradient(
                state, metrics, reference_tree(sub, g, f"{tag}/step0/grad_unclipped/")
            )
        if f"{tag}/step{i}/student/backbone.cls_token" in g:
            theirs = reference_tree(sub, g, f"{tag}/step{i}/student/")
            assert_same_parameters(state.student, theirs)
        if f"{tag}/step{i}/teacher/backbone.cls_token" in g:
            theirs = reference_tree(sub, g, f"{tag}/step{i}/teacher/")
            assert_same_parameters(state.teacher, theirs)


def random_batch(w=4, b=2, seed=0, grid=GRID, m=8):
    rng = np.random.default_rng(seed)
    masks = np.zeros((w, 2 * b, grid), bool)
    indices, weights = np.zeros((w, m), np.int32), np.zeros((w, m), np.float32)
    for i in range(w):
        n = m - rng.integers(0, 3)
        masks[i, 1, rng.permutation(grid)[:n]] = True
        indices[i, :n] = np.flatnonzero(masks[i])
        weights[i, :n] = 1 / n
    return {
        "global_crops": rng.integers(0, 256, (w, 2, b, SIDE, SIDE, 1), np.uint8),
        "local_crops": rng.integers(0, 256, (w, 3, b, *2 * (SIDE // 2,), 1), np.uint8),
        "masks": masks.reshape(w, 2, b, grid),
        "mask_indices": indices,
        "mask_weights": weights,
    }


@functools.cache  # tests share the compiled steps
def small_step(modules=MODULES, accum_steps=1, koleo_schedule=None, **objective):
    constants = {
        "learning_rate": lambda s: 1e-3,
        "last_layer_learning_rate": lambda s: 1e-3,
        "weight_decay": lambda s: 0.04,
    }
    schedules = {"teacher_temp": lambda s: 0.04, "ema_momentum": lambda s: 0.9}
    if koleo_schedule:
        schedules["koleo_weight"] = koleo_schedule
    optimizer = make_optimizer(**constants)
    step = make_train_step(
        modules,
        Objective((0.2,), (0.2,), **objective),
        optimizer,
        schedules=schedules,
        accum_steps=accum_steps,
    )
    init = jax.jit(lambda key: init_state(modules, optimizer, key, 1))
    return jax.jit(step), init(jax.random.key(3))


def assert_same_gradients(a, b, tolerance):
    """Relative to the largest entry of a leaf: the sums behind its entries are as long
    as it is large, so small entries carry the rounding of large ones."""
    theirs = gradient_of(b)
    for name, value in gradient_of(a).items():
        close = tolerance * np.abs(value).max()
        np.testing.assert_allclose(theirs[name], value, atol=close, err_msg=name)


def test_accumulation_equals_the_large_batch(accum_steps=4):
    """Also: a micro-batch is one group, whose crops are not packed together."""
    batch = random_batch()
    one, state = small_step()
    many, _ = small_step(accum_steps=accum_steps)
    (a, metrics_a), (b, metrics_b) = one(state, batch), many(state, batch)
    for name, value in metrics_a.items():
        np.testing.assert_allclose(metrics_b[name], value, rtol=2e-5, err_msg=name)
    assert_same_gradients(a, b, 1e-4)
    for name in ("dino", "ibot"):
        np.testing.assert_allclose(a.centers[name], b.centers[name], atol=1e-6)
    weights = Objective((0.2,), (0.2,)).weights
    terms = terms_in(metrics_a, weights)
    assert sorted(terms) == ["dino_global", "dino_local", "ibot", "koleo"]
    total = sum(metrics_a[name] for name in terms)
    np.testing.assert_allclose(total, metrics_a["total"], rtol=1e-6)
    with pytest.raises(ValueError, match="4 groups cannot be cut into 3"):
        small_step(accum_steps=3)[0](state, batch)


def test_a_scheduled_weight_is_that_of_its_step():
    constant, state = small_step()
    step, _ = small_step(koleo_schedule=lambda s: 0.1 * (s + 1))
    batch = random_batch()
    (a, base), (b, first) = constant(state, batch), step(state, batch)
    for name, value in base.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-5, err_msg=name)
    assert_same_gradients(a, b, 1e-4)
    c, second = step(state.replace(step=state.step + 1), batch)
    np.testing.assert_allclose(second["koleo"], 2 * first["koleo"], rtol=1e-6)
    np.testing.assert_allclose(
        second["total"] - second["koleo"], first["total"] - first["koleo"], rtol=1e-6
    )
    norm = "grad_norm/backbone"
    assert abs(second[norm] - first[norm]) > 1e-3 * first[norm]
    head = flat_names(b.opt_state[1].mu["dino_head"])  # KoLeo is not of the head
    for name, value in flat_names(c.opt_state[1].mu["dino_head"]).items():
        close = 1e-4 * np.abs(value).max()
        np.testing.assert_allclose(value, head[name], atol=close)


def test_gram_is_a_term_when_it_has_a_weight():
    plain, state = small_step()
    with_gram, _ = small_step(gram_weight=2.0)
    # Teacher and student start equal; masks alone would tell them apart.
    teacher = jax.tree.map(lambda x: 0.5 * x, state.teacher)
    state = state.replace(teacher=teacher)
    batch = random_batch()
    (a, base), (b, more) = plain(state, batch), with_gram(state, batch)
    assert "gram" not in base and more["gram"] > 0
    for name in ("dino_local", "dino_global", "koleo", "ibot"):
        np.testing.assert_allclose(more[name], base[name], rtol=1e-5)
    total = base["total"] + more["gram"]
    np.testing.assert_allclose(more["total"], total, rtol=1e-6)
    assert "gram" in terms_in(more, Objective((0.2,), (0.2,)).weights)
    # Only the backbone feels it.
    assert abs(more["grad_norm/backbone"] - base["grad_norm/backbone"]) > 1e-4
    head = flat_names(a.opt_state[1].mu["dino_head"])
    for name, value in flat_names(b.opt_state[1].mu["dino_head"]).items():
        close = 1e-4 * np.abs(value).max()
        np.testing.assert_allclose(value, head[name], atol=close)


def test_separate_ibot_head_leaves_the_dino_loss_alone():
    fewer = HEAD.num_prototypes // 2
    separate = Modules(MODULES.backbone, HEAD, HEAD.clone(num_prototypes=fewer))
    tied_step, tied = small_step()
    step, state = small_step(separate)
    assert state.centers["ibot"].shape == (fewer,)
    shared = {k: tied.student[k] for k in ("backbone", "dino_head")}
    state = state.replace(
        student={**state.student, **shared}, teacher={**state.teacher, **shared}
    )
    _, a = tied_step(tied, random_batch())
    _, b = step(state, random_batch())
    for name in ("dino_local", "dino_global", "koleo"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6)
    assert a["ibot"] != b["ibot"]
    assert "grad_norm/ibot_head" in b


@pytest.mark.parametrize("options", [{}, {"centering": "sinkhorn_knopp"}])
def test_padding_of_the_mask_buffer_has_no_effect(options):
    batch = random_batch()
    other = dict(batch)
    padding = batch["mask_weights"] == 0
    assert padding.sum() > 1
    other["mask_indices"] = np.where(padding, GRID // 2, batch["mask_indices"])
    step, state = small_step(**options)
    (a, metrics_a), (b, metrics_b) = step(state, batch), step(state, other)
    np.testing.assert_allclose(metrics_a["total"], metrics_b["total"], rtol=1e-6)
    assert_same_gradients(a, b, 1e-5)
    for name, center in a.centers.items():
        np.testing.assert_allclose(b.centers[name], center, atol=1e-7)


def test_no_local_crops_and_unknown_centering():
    batch = random_batch()
    batch["local_crops"] = batch["local_crops"][:, :0]
    step, state = small_step()
    _, metrics = step(state, batch)
    assert metrics["dino_local"] == 0
    assert np.isfinite(metrics["total"])
    with pytest.raises(ValueError, match="'mean' is none of centering, sinkhorn_k"):
        Objective((0.0,), (1.0,), centering="mean")
