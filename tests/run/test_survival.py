"""What happens to runs: signals, full disks, dead workers, NaN, odd clocks."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ultradino_jax.run.train as module
from tests.processes import ROOT, environment, start_main
from ultradino_jax.checkpoint import Retention, RunCheckpoints
from ultradino_jax.run.bad_steps import skip_not_finite
from ultradino_jax.run.stops import EXIT_PAUSED, RunPaused, RunStopped
from ultradino_jax.run.train import train

pytestmark = pytest.mark.usefixtures("one_device")
STEPS = 12


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def long_run(tiny_config, **changes):
    return tiny_config(**{"epochs": 4, **changes})


@pytest.fixture(scope="module")
def whole(tiny_flags, tmp_path_factory):
    """metrics.jsonl of twelve steps that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run_to_its_end(workdir, *tiny_flags, "--config.epochs=4")
    return (workdir / "metrics.jsonl").read_bytes()


def run_to_its_end(workdir, *flags):
    process = start_main(workdir, *flags)
    output = process.communicate()[0]
    assert process.returncode == 0, output


def wait_for_steps(process, workdir, count):
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def children(pid):
    """Processes of which `pid` is the parent, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if int(status[1]) == pid:
            found[int(folder.name)] = command
    return found


def test_sigterm_two_processes_and_a_dead_worker(
    tiny_flags, tiny_config, whole, tmp_path
):
    workdir, flags = tmp_path / "run", [*tiny_flags, "--config.epochs=4"]
    first = start_main(workdir, *flags)
    wait_for_steps(first, workdir, 3)
    with pytest.raises(RunStopped, match=rf"in use by process {first.pid} on .*wait"):
        train(long_run(tiny_config), workdir)
    first.send_signal(signal.SIGTERM)
    output = first.communicate()[0]
    assert first.returncode == EXIT_PAUSED, output
    assert "paused: SIGTERM: saved at step" in output.splitlines()[-1]
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved >= 3
    # Whatever it had reached, the worker of the next process dies at once.
    second = start_main(workdir, *flags, "--config.data.workers=1")
    while not (workers := [p for p, c in children(second.pid).items() if "spawn" in c]):
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert f"resumed from the checkpoint at step {saved}" in output
    assert "a data worker died at step" in output
    assert (workdir / "metrics.jsonl").read_bytes() == whole


def test_a_worker_that_keeps_dying_stops_the_run(monkeypatch):
    from ultradino_jax.run import feed as feeds

    class Dead:
        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with -9.")

        def close(self):
            pass

    monkeypatch.setattr(feeds, "pipeline", lambda *args: Dead())
    config = type("C", (), {"data": type("D", (), {"workers": 0})})
    plan = type("P", (), {"total_steps": 9})
    said = []
    meter = type("M", (), {"waiting": lambda self: module.contextlib.nullcontext()})()
    feed = feeds.Feed(
        config, plan, 4, sharding=None, meter=meter, bad=None, say=said.append
    )
    signals = module.Signals()
    try:
        with pytest.raises(
            RunStopped, match=r"died 4 times, the last at step 4.*memory"
        ):
            feed(4, signals)
    finally:
        signals.close()
    assert len(said) == feeds.MAX_RESTARTS


def test_sigusr1_and_a_clock_that_jumps(tiny_config, tmp_path, monkeypatch):
    """The wall clock is set by days between two steps of both processes."""
    from ultradino_jax.run.writer import Writer

    clock, offset, write = time.time, [0], Writer.write

    def setting(self, step, *values):
        offset[0] += {0: 86400, 5: -3 * 86400}.get(step, 0)
        write(self, step, *values)

    def preempt(teacher, begin, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(time, "time", lambda: clock() + offset[0])
    monkeypatch.setattr(Writer, "write", setting)
    config = long_run(tiny_config)
    with pytest.raises(RunPaused, match=r"SIGUSR1: saved at step 5 of 12; the same"):
        train(config, tmp_path / "run", preempt)
    assert signal.getsignal(signal.SIGUSR1) == before
    train(config, tmp_path / "run")
    monkeypatch.undo()
    assert offset == [-2 * 86400]
    train(config, tmp_path / "calm")
    name = "metrics.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (
        tmp_path / "calm" / name
    ).read_bytes()
    for row in lines(tmp_path / "run/timing.jsonl"):
        assert 0 < row["seconds_per_step"] < 3600 and 0 <= row["data_wait"] <= 1


def test_a_signal_ends_a_wait_for_data_but_not_twice():
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = module.Signals()
    try:
        with pytest.raises(module.Interrupted), signals.waiting():
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signals.close()
        signal.signal(signal.SIGINT, before)


FULL = """
set -e
if unshare -rm true 2>/dev/null; then
  mkdir -p "$1" && exec unshare -rm sh -c '
    mount -t tmpfs -o size=45m tmpfs "$1"; shift_to="$2"; space="$1"; shift 2
    code=0; "$@" --workdir="$space/run" || code=$?
    cp -a "$space/run" "$shift_to"; exit $code' sh "$@"
fi
out="$2"; shift 2; ulimit -f 8000; exec "$@" --workdir="$out"
"""


def test_a_full_disk_keeps_the_last_good_step(tiny_flags, whole, tmp_path):
    """45 MB hold one checkpoint of 13 MB and the backbone, not all that follow."""
    flags = [*tiny_flags, "--config.epochs=4", "--config.keep_checkpoints=9"]
    program = [sys.executable, "main.py", *flags]
    process = subprocess.run(
        ["sh", "-c", FULL, "sh", tmp_path / "space", tmp_path / "run", *program],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert process.returncode == 1, process.stdout + process.stderr
    # Orbax's own thread may report after it.
    (line,) = [x for x in process.stderr.splitlines() if x.startswith("error: ")]
    assert "failed (" in line
    good = int(line.rpartition("last good checkpoint: step ")[2])
    kept = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert str(good) in kept
    run_to_its_end(tmp_path / "run", *flags)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == whole


def poisoned(make, steps):
    """make_train_step whose gradient is NaN in the given steps."""

    def build(*args, **options):
        step = make(*args, **options)

        def train_step(state, batch):
            bad = jnp.isin(state.step, jnp.array(steps))
            new, metrics = step(state, batch)
            nan = jnp.where(bad, jnp.nan, 0.0)
            student = jax.tree.map(lambda x: x + nan, new.student)
            return new.replace(student=student), {
                **metrics,
                "ibot": metrics["ibot"] + nan,
            }

        return train_step

    return build


def test_nan_is_skipped_exactly_and_stops_after_n(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "make_train_step", poisoned(module.make_train_step, [3, 6, 7])
    )
    config = tiny_config(**{"epochs": 3, "nan.policy": "skip"})
    workdir = train(config, tmp_path / "run")
    rows = lines(workdir / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert "total" not in rows[3] and np.isfinite(rows[8]["total"])
    skipped = lines(workdir / "skipped.jsonl")
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


def test_a_skipped_step_changes_counters_only(tiny_config):
    """Against Adam's own state: moments stay, the schedules' counter goes on."""
    import optax

    from ultradino_jax.optimizer import make_optimizer
    from ultradino_jax.pretraining.step import TrainState

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


def test_retention_keeps_the_last_the_best_and_every_mth(tmp_path):
    keep = Retention(
        last=2, every=4, best=True, scores={1: 0.3, 2: 0.9, 3: 0.9, 5: 0.1}
    )
    assert keep.kept([1, 2, 3, 4, 5, 6, 7]) == [
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert Retention(1).kept([1, 2]) == [False, True]
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", keep=keep)
    for step in range(1, 8):
        checkpoints.save(step, {"x": jnp.full(3, step, jnp.float32)}, {"step": step})
    checkpoints.wait()
    assert checkpoints.newest() == 7
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == list("2467")


def test_the_lock_is_the_kernels(tmp_path):
    from ultradino_jax.run.workdir import Lock

    lock = Lock(tmp_path / "run")
    with (tmp_path / "run/lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()
    Lock(tmp_path / "run").close()  # a stale file is no obstacle


def test_an_unknown_policy_is_one_line(tiny_config, tmp_path):
    with pytest.raises(RunStopped, match=r"nan.policy 'ignore' is none of stop, skip"):
        train(tiny_config(**{"nan.policy": "ignore"}), tmp_path / "run")
