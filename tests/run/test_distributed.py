"""Several processes of one run: the same losses, one checkpoint, one export."""

import json
import shutil
import socket
from pathlib import Path

import jax
import numpy as np

from tests.processes import start_main
from ultradino_jax.weights.load import load_backbone

ROOT = Path(__file__).parents[2]


def start(workdir, flags, *, devices, coordinator=None, count=1, rank=0):
    if coordinator:
        flags = [
            *flags,
            f"--coordinator={coordinator}",
            f"--num_processes={count}",
            f"--process_id={rank}",
        ]
    return start_main(workdir, *flags, devices=devices)


def finish(*processes):
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return outputs


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return np.array([row["total"] for row in rows(workdir)])


def test_two_processes_train_as_one_and_resume_as_one(tiny_flags, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [
        start(
            tmp_path / "two",
            [*tiny_flags, "--config.epochs=1"],
            devices=2,
            coordinator=place,
            count=2,
            rank=rank,
        )
        for rank in range(2)
    ]
    first, second = finish(*both)
    assert "step 3/3" in first and "step 3/3" not in second
    flags = [*tiny_flags, "--config.epochs=1"]
    finish(start(tmp_path / "one", flags, devices=4))
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5
    )
    shutil.rmtree(tmp_path / "two/checkpoints/3")
    (again,) = finish(start(tmp_path / "two", flags, devices=4))
    assert "resumed from the checkpoint at step 2" in again
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5
    )
    two, one = (load_backbone(tmp_path / name).params for name in ("two", "one"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), two, one)
