"""Prepare interrupted and resumed, alone and in processes: always the same bytes."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.data.prepare.inputs import contents, export, run
from ultradino_jax.data.prepare.file import MemberResult, Settings, Task, run_task
from ultradino_jax.data.prepare.pool import run_in_order
from ultradino_jax.data.sources import CacheSource


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An export and the bytes of an uninterrupted run over it."""
    root = tmp_path_factory.mktemp("whole")
    export(root / "in")
    run(root / "in", root / "cache", key=root / "key", shard_records=9)
    return root, contents(root / "cache")


def test_bytes_do_not_depend_on_workers(whole, tmp_path):
    root, want = whole
    run(root / "in", tmp_path / "c", key=root / "key", shard_records=9, workers=2)
    assert contents(tmp_path / "c") == want


def prepare_and_die(inputs, output, key, at):
    """Runs prepare and is killed just before it renames a file for the at-th time."""
    left, rename = [at], os.replace

    def replace(*names):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*names)

    os.replace = replace
    run(inputs, output, key=key, shard_records=9)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 11, 20, 23])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(whole, tmp_path, at):
    root, want = whole
    arguments = (root / "in", tmp_path / "c", root / "key", at)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=prepare_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"no image|run prepare again|no manifest"):
        CacheSource(tmp_path / "c")
    run(root / "in", tmp_path / "c", key=root / "key", shard_records=9)
    assert contents(tmp_path / "c") == want


def test_killed_with_workers_it_leaves_no_process(whole, tmp_path):
    root, want = whole
    code = (
        "from ultradino_jax.prepare import prepare\n"
        f"prepare({str(root / 'in')!r}, {str(tmp_path / 'c')!r}, "
        f"key={str(root / 'key')!r}, shard_records=9, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    journal = tmp_path / "c" / ".work" / "00001.json"
    while not journal.exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the workers see the pipe close
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("a worker outlived its parent")
    run(root / "in", tmp_path / "c", key=root / "key", shard_records=9)
    assert contents(tmp_path / "c") == want


def test_finished_caches_are_left_alone(whole, tmp_path):
    root, want = whole
    options = {"key": root / "key", "shard_records": 9}
    before = {p: p.stat().st_mtime_ns for p in (root / "cache").iterdir()}
    assert run(root / "in", root / "cache", **options)["records"] == 56
    assert {p: p.stat().st_mtime_ns for p in (root / "cache").iterdir()} == before
    with pytest.raises(ValueError, match="'short_side': 256.*'short_side': 64"):
        run(root / "in", root / "cache", **options, short_side=64)
    with pytest.raises(ValueError, match="inputs was"):
        run(root / "in" / "series", root / "cache", **options)
    assert contents(root / "cache") == want


def limited(command, bytes_):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)


def test_a_full_disk_is_one_line_and_can_be_made_good(whole, tmp_path):
    root, want = whole
    code = (
        "import sys, ultradino_jax.prepare as p\n"
        "from functools import partial\n"
        "p.prepare = partial(p.prepare, shard_records=9)\n"
        "sys.exit(p.main())"
    )
    command = [sys.executable, "-c", code, "--input", root / "in", "--workers", "1"]
    command += ["--output", tmp_path / "c", "--key", root / "key"]
    done = limited(command, 100_000)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert len(done.stderr.splitlines()) == 1
    run(root / "in", tmp_path / "c", key=root / "key", shard_records=9)
    assert contents(tmp_path / "c") == want


def hostile(task, settings, emit):
    """A run_task whose inputs hang, or end its process, by name."""
    if task.name == "late":
        emit("member", MemberResult(-1))
        os._exit(1)
    if task.stop is None:
        emit("split", (4, 2, False))
        return
    for member in range(task.start, task.stop):
        emit("beat", member)
        if task.name == "hang" and member == 1:
            time.sleep(60)
        if task.name == "die" and member == 2:
            os._exit(1)
        emit("member", MemberResult(member))


def test_processes_that_hang_or_die_cost_one_member():
    names = ("fine", "hang", "die", "ok", "late")
    tasks = [Task(i, "", name) for i, name in enumerate(names)]
    results = run_in_order(tasks, Settings(), 2, 0.8, run=hostile)
    got = [(entry, result.member, result.reason) for entry, result in results]
    want = [(entry, member, "") for entry in range(4) for member in range(4)]
    want[4 + 1] = (1, 1, "timeout")
    want[8 + 2] = (2, 2, "worker_died")
    want.append((4, -1, ""))
    assert got == want
    assert not multiprocessing.active_children()


def test_stopping_early_ends_the_processes(tmp_path):
    root = export(tmp_path / "in")
    tasks = [Task(0, str(root / "more.zip"), "more.zip")] * 3
    results = run_in_order(tasks, Settings(), 2, 20)
    next(results)
    results.close()
    assert not multiprocessing.active_children()


def test_archives_are_read_in_parts_that_resume(tmp_path):
    root = export(tmp_path / "in")
    task = Task(5, str(root / "more.zip"), "more.zip")
    everything = [r.member for _, r in run_in_order([task], Settings(), 0, 9)]
    assert everything == list(range(40))
    rest = run_in_order([task._replace(start=33)], Settings(), 0, 9)
    assert [(entry, r.member) for entry, r in rest] == [(5, m) for m in range(33, 40)]
    events = []
    run_task(task, Settings(), lambda *event: events.append(event))
    assert events[-1] == ("split", (40, 32, False))
