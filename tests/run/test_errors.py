"""What a user can mend is one line and exit code 1, wherever it happens."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment
from tests.run import stubs
from ultradino_jax import cli, jsonl
from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.errors import Paused, UserError, user_line
from ultradino_jax.health.checkups import Doctor
from ultradino_jax.run import loop
from ultradino_jax.run.feed import Feed
from ultradino_jax.run.stops import RunPaused, RunStopped
from ultradino_jax.run.train import train
from ultradino_jax.run.writer import Board, Writer

pytestmark = pytest.mark.usefixtures("one_device")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# As TensorStore and Orbax say it.
WRAPPED = ValueError(
    "RESOURCE_EXHAUSTED: Error writing local file [tensorstore_spec='{..}']\n"
    f"OS error 28: ENOSPC {os.strerror(errno.ENOSPC)}"
)


@pytest.fixture
def stubbed(monkeypatch):
    return stubs.stub(monkeypatch)


@pytest.fixture
def looked_at(tiny_config):
    """Three steps; saved, looked at and drawn after the second and the third."""
    return stubs.small(tiny_config(**{"epochs": 1, "health.every": 2}))


def failing(function, error, when):
    """The function, raising instead when `when(*its arguments)`."""

    def call(*args, **options):
        if when(*args, **options):
            raise error
        return function(*args, **options)

    return call


def into(name):
    return lambda file, row: (
        file.name.endswith(name) and (row.get("step", 0) >= 2 or name == "alarms.jsonl")
    )


ANY = "any"
PLACES = {
    "look": (Doctor, "look", FULL, lambda self, source, row: row["step"] == 2, 2),
    "feed": (Feed, "__call__", FULL, lambda self, step, signals: step == 2, None),
    "first picture": (Writer, "image", FULL, lambda *args: True, None),
    "panel": (Writer, "image", FULL, lambda self, name, step, *rest: step == 2, 2),
    "alarms": (jsonl, "append", FULL, into("alarms.jsonl"), None),
    "metrics": (jsonl, "append", FULL, into("metrics.jsonl"), 2),
    "timing": (jsonl, "append", FULL, into("timing.jsonl"), 2),
    "health": (jsonl, "append", FULL, into("health.jsonl"), 2),
    "board": (Board, "scalars", FULL, lambda self, step, values: step == 2, 2),
    "checkpoint": (RunCheckpoints, "save", WRAPPED, lambda self, n, *x: n == 3, 2),
    "waiting": (RunCheckpoints, "wait", WRAPPED, lambda self: True, ANY),
    "backbone": (loop, "save_backbone", WRAPPED, lambda *x, step: step == 3, 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_anywhere_is_one_line(
    stubbed, looked_at, tmp_path, monkeypatch, place
):
    owner, name, error, when, good = PLACES[place]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), error, when))
    with pytest.raises(SystemExit) as stopped:
        cli.command(train, looked_at, tmp_path / "run")
    line = stopped.value.code
    assert isinstance(line, str)  # Python prints it and ends with exit code 1
    assert line.startswith("error: ") and "\n" not in line
    assert "No space left on device" in line
    assert "; last good checkpoint: " in line
    shown = line.rpartition(": ")[2]
    assert good == ANY or shown == ("none yet" if good is None else f"step {good}")


@pytest.mark.parametrize("error", [TypeError("planted"), KeyError("planted")])
def test_a_fault_of_the_program_keeps_its_traceback(
    stubbed, looked_at, tmp_path, monkeypatch, error
):
    monkeypatch.setattr(Doctor, "look", failing(Doctor.look, error, lambda *x: True))
    with pytest.raises(type(error), match="planted"):
        cli.command(train, looked_at, tmp_path / "run")


def test_a_run_stopped_at_a_look_makes_up_for_it(
    stubbed, looked_at, tmp_path, monkeypatch, capsys
):
    """A signal before step 2 ends, after which the teacher is to be looked at."""
    calm = train(looked_at, tmp_path / "calm")

    def preempted(state, batch):
        if state.step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return stubs.step(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "compiled_step", lambda plan, mesh, state: preempted)
        with pytest.raises(RunPaused, match="SIGUSR1: saved at step 2 of 3"):
            train(looked_at, tmp_path / "run")
    train(looked_at, tmp_path / "run")
    for name in ("metrics", "health", "alarms"):
        ours, theirs = (x / f"{name}.jsonl" for x in (tmp_path / "run", calm))
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_a_user_can_mend():
    cause = RuntimeError("a library gives up")
    cause.__cause__ = FULL
    lines = {
        UserError("bad table"): "bad table",
        RunStopped("stopped"): "stopped",
        FileNotFoundError(2, "No such file", "x.csv"): "[Errno 2] No such file: 'x.csv",
        MemoryError(): "out of memory",
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"): "the device is out of mem",
        RuntimeError("Unable to initialize backend 'cuda': x"): "Unable to initialize",
        WRAPPED: "OS error 28: ENOSPC No space left on device",
        cause: "[Errno 28] No space left",
    }
    for error, line in lines.items():
        assert (user_line(error) or "").startswith(line)
    for error in (TypeError("x"), ValueError("x"), AssertionError(), KeyError(28)):
        assert user_line(error) is None


def test_saved_on_a_signal_is_exit_code_75(capsys):
    def work():
        raise Paused("saved at step 3")

    with pytest.raises(SystemExit) as stopped:
        cli.command(work)
    assert stopped.value.code == cli.EXIT_PAUSED == 75
    assert capsys.readouterr().out == "paused: saved at step 3\n"


def program(*command, **env):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**environment(), **env},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_backend_that_is_not_there_is_one_line(tiny_flags, tmp_path):
    out = tmp_path / "x.npz"
    there = ROOT / "tests/made_by_b84d464"
    embed = ["-m", "ultradino_jax.embed", "--checkpoint", there / "run"]
    commands = [
        ["main.py", *tiny_flags, f"--workdir={tmp_path / 'run'}"],
        [*embed, "--input", there / "images", "--out", out],
    ]
    for command in commands:
        code, line = program(*command, JAX_PLATFORMS="cuda")
        assert code == 1 and line.startswith("error: ")
        assert "JAX_PLATFORMS is 'cuda'" in line


def test_every_command_ends_with_a_line_for_a_path_that_is_not_there(tmp_path, capsys):
    from ultradino_jax import embed, export, phantom, prepare, report, segment
    from ultradino_jax.evaluators.classification import compare

    there, gone = str(tmp_path / "file"), str(tmp_path / "gone")
    (tmp_path / "file").write_text("no folder")
    out = ["--out", str(tmp_path / "out")]
    calls = {
        embed: ["--checkpoint", gone, "--input", gone, *out],
        export: ["--checkpoint", gone, "--format", "safetensors", *out],
        segment: ["--checkpoint", gone, "--input", gone, "--output", there],
        phantom: ["--layout=fass", "--patients=1", "--out", f"{there}/below"],
        prepare: ["--input", gone, "--output", str(tmp_path / "cache")],
        report: [gone],
        compare: [there, gone],
    }
    for module, flags in calls.items():
        with pytest.raises(SystemExit, match="error: ") as stopped:
            cli.command(module.main, flags)
        assert "\n" not in str(stopped.value)
