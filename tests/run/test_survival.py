"""What happens to processes: signals, full disks, dead workers, kill -9.

Their steps are those of `stubs`, so that all else of a run can be tried often.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.processes import ROOT, environment, start_main
from tests.run import stubs
from ultradino_jax.cli import EXIT_PAUSED
from ultradino_jax.errors import UserError
from ultradino_jax.run.stops import Interrupted, RunStopped, Signals
from ultradino_jax.run.train import train

pytestmark = pytest.mark.usefixtures("one_device")


PROGRAM = ("-m", "tests.run.stubbed_main")


@pytest.fixture(scope="module", autouse=True)
def stubbed(one_device):
    with pytest.MonkeyPatch.context() as patch:
        stubs.stub(patch)
        yield


@pytest.fixture(scope="module")
def config(tiny_config):
    """Twelve steps; the flags of the processes say the same."""
    return tiny_config(epochs=4)


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, "--config.epochs=4"]


@pytest.fixture(scope="module")
def whole(stubbed, config, tmp_path_factory):
    """metrics.jsonl of twelve steps that nothing happened to."""
    workdir = train(config, tmp_path_factory.mktemp("whole") / "run")
    return (workdir / "metrics.jsonl").read_bytes()


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


def test_sigterm_two_processes_and_a_dead_worker(flags, config, whole, tmp_path):
    workdir = tmp_path / "run"
    first = start_main(workdir, *flags, program=PROGRAM)
    wait_for_steps(first, workdir, 3)
    with pytest.raises(UserError, match=rf"in use by process {first.pid} on .*wait"):
        train(config, workdir)
    first.send_signal(signal.SIGTERM)
    output = first.communicate()[0]
    assert first.returncode == EXIT_PAUSED, output
    assert "paused: SIGTERM: saved at step" in output.splitlines()[-1]
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert saved >= 3
    # Whatever it had reached, the worker of the next process dies at once.
    second = start_main(workdir, *flags, "--config.data.workers=1", program=PROGRAM)
    while not (workers := [p for p, c in children(second.pid).items() if "spawn" in c]):
        assert second.poll() is None, second.communicate()[0]
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert f"resumed from the checkpoint at step {saved}" in output
    assert "a data worker died at step" in output
    assert "shared_memory" not in output  # nothing is left of what was shared
    assert (workdir / "metrics.jsonl").read_bytes() == whole


def test_a_worker_that_keeps_dying_stops_the_run(monkeypatch):
    from ultradino_jax.run import feed as feeds

    class Dead:
        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with -9.")

        def close(self):
            pass

    monkeypatch.setattr(feeds, "pipeline", lambda *args: Dead())
    plan = SimpleNamespace(total_steps=9, feed=SimpleNamespace(num_workers=0))
    meter, said = SimpleNamespace(waiting=contextlib.nullcontext), []
    feed = feeds.Feed(plan, 4, sharding=None, meter=meter, bad=None, say=said.append)
    signals = Signals()
    try:
        with pytest.raises(
            RunStopped, match=r"died 4 times, the last at step 4.*memory"
        ):
            feed(4, signals)
    finally:
        signals.close()
    assert len(said) == feeds.MAX_RESTARTS


def test_a_signal_ends_a_wait_for_data_but_not_twice():
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signals = Signals()
    try:
        with pytest.raises(Interrupted), signals.waiting():
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


def test_a_full_disk_keeps_the_last_good_step(flags, config, whole, tmp_path):
    """45 MB hold one checkpoint of 13 MB and the backbone, not all that follow."""
    program = [sys.executable, *PROGRAM, *flags, "--config.keep_checkpoints=9"]
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
    good = int(line.rpartition("last good checkpoint: step ")[2])
    kept = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert str(good) in kept
    train(config, tmp_path / "run")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == whole


def test_kill_9_with_and_without_workers_gives_the_same_bytes(
    flags, config, whole, tmp_path
):
    """Killed without workers, then with two, then left alone."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    # Any step will do; which one is left to the scheduler and to this draw.
    first = np.random.default_rng().integers(3, 6)
    for workers, wanted in ((0, first), (2, first + 3)):
        victim = start_main(
            tmp_path / "run",
            *flags,
            f"--config.data.workers={workers}",
            program=PROGRAM,
            start_new_session=True,
        )
        wait_for_steps(victim, tmp_path / "run", wanted)
        os.killpg(victim.pid, signal.SIGKILL)
        output = victim.communicate()[0]
        assert victim.returncode == -signal.SIGKILL
        assert metrics.read_bytes() != whole
    assert "resumed from the checkpoint" in output
    train(config, tmp_path / "run")
    assert metrics.read_bytes() == whole


def test_the_lock_is_the_kernels(tmp_path):
    from ultradino_jax.whole import Lock

    lock = Lock(tmp_path / "run")
    with (tmp_path / "run/lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()
    Lock(tmp_path / "run").close()  # a stale file is no obstacle
