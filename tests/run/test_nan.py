"""Steps whose numbers are not finite; the steps are those of `stubs`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.run import stubs
from tests.run.stubs import rows
from ultradino_jax.optimizer import make_optimizer
from ultradino_jax.pretraining.step import TrainState
from ultradino_jax.run.bad_steps import skip_not_finite
from ultradino_jax.run.stops import RunStopped
from ultradino_jax.run.train import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def config_of(tiny_config):
    return lambda **changes: stubs.small(tiny_config(**changes))


def test_nan_stops_with_step_terms_and_records(config_of, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        stubs.stub(patch, stubs.nan_at(3))
        with pytest.raises(
            RunStopped,
            match=r"not finite at step 3 .*ibot=nan.*phantom/.*checkpoint: step 2",
        ):
            train(config_of(), workdir)
    report = json.loads((workdir / "nan.json").read_text())
    assert report["step"] == 3 and len(report["records"]) == 8
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    stubs.stub(monkeypatch)
    train(config_of(), workdir)  # nothing was lost
    calm = train(config_of(), tmp_path / "calm")
    name = "metrics.jsonl"
    assert (workdir / name).read_bytes() == (calm / name).read_bytes()


def test_nan_is_skipped_exactly_and_stops_after_n(config_of, tmp_path, monkeypatch):
    stubs.stub(monkeypatch, stubs.nan_at(3, 6, 7))
    config = config_of(**{"epochs": 3, "nan.policy": "skip"})
    workdir = train(config, tmp_path / "run")
    metrics = rows(workdir / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert "total" not in metrics[3] and np.isfinite(metrics[8]["total"])
    skipped = rows(workdir / "skipped.jsonl")
    assert [row["step"] for row in skipped] == [3, 6, 7]
    assert len(skipped[0]["records"]) == 8 and skipped[0]["terms"] == {"ibot": "nan"}
    # Resumed from step 6, with steps 6 and 7 still to be skipped: the same bytes.
    shutil.copytree(workdir, tmp_path / "again")
    for step in (8, 9):
        shutil.rmtree(tmp_path / f"again/checkpoints/{step}")
    train(config, tmp_path / "again")
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (workdir / name).read_bytes()
    config.nan.max_skips = 2
    with pytest.raises(
        RunStopped, match=r"3 steps were not finite.*checkpoint: step 6"
    ):
        train(config, tmp_path / "few")


def test_a_skipped_step_changes_counters_only():
    """Against Adam's own state: moments stay, the schedules' counter goes on."""
    constant = {
        "learning_rate": lambda s: 0.1,
        "last_layer_learning_rate": lambda s: 0.1,
    }
    optimizer = make_optimizer(
        **constant, weight_decay=lambda s: 0.0, layerwise_decay=1.0
    )
    params = {"backbone": {"blocks": {"w": jnp.ones((2, 3))}, "norm": jnp.ones(3)}}

    def step(state, batch):
        grads = jax.tree.map(lambda x: 0 * x + batch, state.student)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        new = TrainState(state.step + 1, student, student, opt_state, {})
        return new, {"total": jnp.sum(jnp.asarray(batch))}

    state = TrainState(jnp.int32(0), params, params, optimizer.init(params), {})
    guarded = jax.jit(skip_not_finite(step))
    state, metrics = guarded(state, 1.0)
    after, seen = guarded(state, jnp.nan)
    assert (metrics["skipped"], seen["skipped"]) == (0, 1)
    assert after.step == 2 and after.opt_state[2].count == 2
    assert after.opt_state[1].count == 1
    for now, before in ((after.student, state.student), (after.opt_state[1].mu,) * 2):
        jax.tree.map(np.testing.assert_array_equal, now, before)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state[1], state.opt_state[1])
