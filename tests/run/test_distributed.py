"""Several processes of one run: the same losses, one checkpoint, one export."""

import shutil
import socket

import jax
import numpy as np

from tests.processes import start_main
from tests.run.stubs import rows
from ultradino_jax.run.train import train
from ultradino_jax.weights.load import load_backbone


def finish(*processes):
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return outputs


def losses(workdir):
    return np.array([row["total"] for row in rows(workdir / "metrics.jsonl")])


def test_two_processes_train_as_one_which_goes_on_alone(
    tiny_flags, tiny_config, one_device, tmp_path, capsys
):
    """Four devices of two processes, and then one of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    job = [f"--coordinator={place}", "--num_processes=2"]
    both = [
        start_main(
            tmp_path / "two", *tiny_flags, *job, f"--process_id={rank}", devices=2
        )
        for rank in range(2)
    ]
    train(tiny_config(), tmp_path / "one")
    first, second = finish(*both)
    assert "step 6/6" in first and "step 6/6" not in second
    assert "GB per device: state and batch 0.01, temporaries 0." in first
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), **close
    )
    before = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/6")
    capsys.readouterr()
    train(tiny_config(), tmp_path / "two")
    assert "resumed from the checkpoint at step 4" in capsys.readouterr().out
    after = losses(tmp_path / "two")
    np.testing.assert_array_equal(after[:4], before[:4])
    np.testing.assert_allclose(after, losses(tmp_path / "one"), **close)
    two, one = (load_backbone(tmp_path / name).params for name in ("two", "one"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), two, one)
