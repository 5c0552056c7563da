"""Checkpoints are set aside when they are damaged, and for no other reason."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.run import stubs
from ultradino_jax.checkpoint import WAITS, RunCheckpoints
from ultradino_jax.errors import StaleFile, UserError, of_file_system
from ultradino_jax.run import loop
from ultradino_jax.run.stops import RunStopped
from ultradino_jax.run.train import train
from ultradino_jax.weights.load import load_backbone

ABSTRACT = {"x": jnp.zeros(3)}
FAILURES = ("ESTALE", "EIO", "ENOSPC", "EACCES", "EPERM", "ETIMEDOUT", "EMFILE")


def of(name):
    code = getattr(errno, name)
    return OSError(code, os.strerror(code), "checkpoints/2/state/manifest.ocdbt")


def as_tensorstore_says(name):
    code = getattr(errno, name)
    return ValueError(
        "FAILED_PRECONDITION: Error reading local file [tensorstore_spec='{..}']\n"
        f"OS error {code}: {name} {os.strerror(code)}"
    )


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 1 and 2."""
    checkpoints = RunCheckpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.full(3, step, jnp.float32)}, {"step": step})
    checkpoints.wait()
    checkpoints.close()
    return tmp_path


def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def restore(saved):
    """restore(*errors, **options): what comes back, after reads that raised these."""

    def call(*errors, **options):
        waited, left = [], list(errors)
        checkpoints = RunCheckpoints(saved / "checkpoints", sleep=waited.append)
        real = checkpoints.manager.restore

        def failing(*args, **kwargs):
            if left:
                raise left.pop(0)
            return real(*args, **kwargs)

        checkpoints.manager.restore = failing
        try:
            found = checkpoints.restore(ABSTRACT, report=lambda line: None, **options)
        finally:
            checkpoints.close()
        return found, waited

    return call


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("make", [of, as_tensorstore_says])
def test_a_failing_file_system_is_waited_for(saved, restore, name, make):
    before = contents(saved)
    (state, meta), waited = restore(make(name), make(name))
    assert meta["step"] == 2 and (np.asarray(state["x"]) == 2).all()
    assert tuple(waited) == WAITS[:2]
    errors = [make(name)] * (len(WAITS) + 1)
    with pytest.raises(UserError, match="cannot be read now.*nothing was changed") as e:
        restore(*errors)
    assert "\n" not in str(e.value)
    assert contents(saved) == before


def damage(saved, *steps):
    for step in steps:
        for path in (saved / f"checkpoints/{step}/state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"damaged")


def test_damage_goes_aside_once_another_is_usable(saved, restore):
    damage(saved, 2)
    (state, meta), waited = restore()
    assert meta["step"] == 1 and (np.asarray(state["x"]) == 1).all() and not waited
    assert os.listdir(saved / "corrupt") == ["2"]


def test_where_none_is_usable_nothing_begins_again_unasked(saved, restore):
    damage(saved, 1, 2)
    before = contents(saved)
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the checkpoints .* is usable; x"):
            restore(advice="x")
        assert contents(saved) == before
    assert restore(restart=True)[0] is None
    assert sorted(os.listdir(saved / "corrupt")) == ["1", "2"]
    assert restore()[0] is None  # now there are none


def test_another_job_is_refused_before_its_state_is_read(saved, restore):
    damage(saved, 2)  # only the state

    def check(meta):
        raise UserError(f"step {meta['step']} is of another job")

    before = contents(saved)
    with pytest.raises(UserError, match="step 2 is of another job"):
        restore(check=check)
    assert contents(saved) == before


def test_what_a_file_holds_is_no_failure_of_the_file_system():
    for error in (
        ValueError("DATA_LOSS: Error reading manifest: crc mismatch"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        json.JSONDecodeError("Expecting value", "", 0),
        ValueError("NOT_FOUND: OS error 2: ENOENT No such file or directory"),
        KeyError("state"),
        OSError("image file is truncated"),
    ):
        assert not of_file_system(error)


def test_a_run_with_only_damaged_checkpoints_stops(
    one_device, tiny_config, tmp_path, monkeypatch, capsys
):
    stubs.stub(monkeypatch)
    config = stubs.small(tiny_config(epochs=1, checkpoint_every=3))
    workdir = train(config, tmp_path / "run")
    metrics = (workdir / "metrics.jsonl").read_bytes()
    for path in (workdir / "checkpoints/3/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    before = contents(workdir)
    with pytest.raises(UserError, match=r"--config.restart=True begins again at step"):
        train(config, workdir)
    assert contents(workdir) == before
    config.restart = True
    train(config, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == metrics
    train(config, workdir)  # the flag does not throw a usable checkpoint away
    assert "already trained for all 3 steps" in capsys.readouterr().out


def test_a_backbone_that_lags_behind_is_said_and_made_anew(
    one_device, tiny_config, tmp_path, monkeypatch, capsys
):
    """The disk was full when the last step's backbone was to be written."""
    stubs.stub(monkeypatch)
    config = stubs.small(tiny_config(checkpoint_every=3))
    calm = train(config, tmp_path / "calm")
    save = loop.save_backbone

    def full(folder, backbone, *, step):
        if step == 6:
            raise of("ENOSPC")
        save(folder, backbone, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_backbone", full)
        with pytest.raises(RunStopped, match="last good checkpoint: step 6"):
            train(config, tmp_path / "run")
    line = r"is of step 3, the newest checkpoint of its run of step 6"
    for path in (tmp_path / "run", tmp_path / "run/backbone"):
        with pytest.warns(StaleFile, match=line):
            load_backbone(path)
    train(config, tmp_path / "run")
    assert "not of step 6: written anew" in capsys.readouterr().out
    assert load_backbone(tmp_path / "run").digest == load_backbone(calm).digest
    shutil.rmtree(calm / "backbone/params")  # lost in another way
    train(config, calm)
    assert load_backbone(tmp_path / "run").digest == load_backbone(calm).digest
