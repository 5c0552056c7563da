"""What a run does with its folder when it goes on; its steps are those of `stubs`."""

import json
import os
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.run import stubs
from tests.run.stubs import rows
from ultradino_jax.checkpoint import Retention, RunCheckpoints, checksum
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.errors import UserError
from ultradino_jax.run import loop
from ultradino_jax.run.stops import RunPaused, RunStopped
from ultradino_jax.run.train import train
from ultradino_jax.weights.load import load_backbone

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module", autouse=True)
def stubbed(one_device):
    with pytest.MonkeyPatch.context() as patch:
        stubs.stub(patch)
        yield


@pytest.fixture(scope="module")
def config_of(tiny_config):
    """tiny_config with a smaller network."""
    return lambda **changes: stubs.small(tiny_config(**changes))


@pytest.fixture(scope="module")
def finished(stubbed, config_of, tmp_path_factory):
    """A run of six steps, saved after every second one."""
    return train(config_of(), tmp_path_factory.mktemp("finished") / "run")


def interrupted(finished, tmp_path, keep_step):
    """A copy of the finished run as if it had been killed after `keep_step`."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for step in (workdir / "checkpoints").iterdir():
        if int(step.name) > keep_step:
            shutil.rmtree(step)
    return workdir


def assert_same(workdir, finished, *names):
    for name in names or ("metrics.jsonl",):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def phantom_folder(folder, count=12):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = render_phantom(i, size=(40, 48)).image
        Image.fromarray(image).save(folder / f"image{i:02d}.png")
    return folder


def test_a_finished_run_is_not_run_again(finished, config_of, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    train(config_of(), finished)
    assert "already trained for all 6 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_its_keys(finished, config_of):
    rate = config_of().optim.base_lr
    other = config_of(**{"optim.base_lr": 0.5, "head.num_prototypes": 32})
    with pytest.raises(
        UserError,
        match=r"head.num_prototypes: 64 there, 32 now; "
        rf"optim.base_lr: {rate} there, 0.5 now\); use another --workdir",
    ):
        train(other, finished)
    train(config_of(**{"data.threads": 3}), finished)  # noted anew
    saved = json.loads((finished / "config.json").read_text())
    assert saved["data"]["threads"] == 3 and saved["optim"]["base_lr"] == rate


def test_resume_after_a_cut_line_and_with_free_keys_changed(
    finished, config_of, tmp_path
):
    workdir = interrupted(finished, tmp_path, 2)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tot')  # cut by the crash
    train(config_of(**{"data.threads": 3, "checkpoint_every": 3}), workdir)
    assert_same(workdir, finished)
    assert load_backbone(workdir).digest == load_backbone(finished).digest


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_corrupt_checkpoint_falls_back(finished, config_of, tmp_path, capsys, damage):
    workdir = interrupted(finished, tmp_path, 4)
    files = [p for p in (workdir / "checkpoints/4/state").rglob("*") if p.is_file()]
    data = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    if damage == "truncate":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 0x55
        data.write_bytes(content)
    else:
        data.unlink()
    train(config_of(), workdir)
    out = capsys.readouterr().out
    assert "checkpoint 4 is not usable" in out
    assert "resumed from the checkpoint at step 2" in out
    assert (workdir / "corrupt" / "4").is_dir()
    assert_same(workdir, finished)


def test_checksum_sees_every_bit_and_no_layout():
    tree = {"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.int32)}
    base = int(checksum(tree))
    for value in (np.nextafter(np.float32(3), np.float32(4)), np.float32(-3)):
        other = tree["a"].copy()
        other[3] = value
        assert int(checksum({**tree, "a": other})) != base
    swapped = {**tree, "a": tree["a"][[1, 0, 2, 3, 4, 5]]}
    assert int(checksum(swapped)) != base


def test_other_images_and_other_groups_are_refused(config_of, tmp_path):
    folder, workdir = phantom_folder(tmp_path / "data"), tmp_path / "run"
    config = config_of(**{"data.root": str(folder), "epochs": 1, "checkpoint_every": 3})
    train(config, workdir)
    saved = workdir / "checkpoints/3/meta/metadata"
    content = saved.read_text()
    saved.write_text(json.dumps({**json.loads(content), "groups": 2}))
    with pytest.raises(UserError, match=r"trained in 2 groups, \d devices need 8"):
        train(config, workdir)
    saved.write_text(content)
    (folder / "image00.png").unlink()
    records = [(workdir / f"{n}.json").read_bytes() for n in ("config", "run")]
    config.data.threads = 5  # may differ, and would be noted anew
    with pytest.raises(UserError, match="images are not those this run started with"):
        train(config, workdir)
    assert records == [(workdir / f"{n}.json").read_bytes() for n in ("config", "run")]


def test_too_many_bad_images_stop_the_run_and_a_cut_list_is_no_obstacle(
    config_of, tmp_path
):
    folder, workdir = phantom_folder(tmp_path / "data"), tmp_path / "run"
    for i in range(4):
        (folder / f"image{i:02d}.png").write_bytes(b"not a picture")
    changes = {"data.root": str(folder), "data.max_bad_fraction": 0.1}
    with pytest.raises(RunStopped, match=r"of 12 images are unreadable.*bad_images"):
        train(config_of(**changes), workdir)
    listed = workdir / "bad_images.jsonl"
    first = rows(listed)[0]
    listed.write_text(json.dumps(first) + '\n{"index": 3, "rec')  # cut by a crash
    train(config_of(**changes | {"data.max_bad_fraction": 0.5}), workdir)
    names = [row["record"] for row in rows(listed)]
    assert names[0] == first["record"]
    assert sorted(names) == [f"image{i:02d}.png" for i in range(4)]


def test_a_prepared_cache_trains_and_resumes(config_of, tmp_path):
    """pydicom's ultrasound -> prepare -> main loop, with the cache's statistics."""
    from pydicom.data import get_testdata_file

    from ultradino_jax.prepare import prepare

    inputs = tmp_path / "pacs"
    inputs.mkdir()
    for name in ("examples_ybr_color.dcm", "examples_palette.dcm"):
        shutil.copy(get_testdata_file(name, download=False), inputs)
    cache = tmp_path / "cache"
    manifest = prepare(inputs, cache, workers=0, progress=False)
    config = config_of(
        **{"data.root": str(cache), "data.normalization": "cache", "epochs": 1}
    )
    workdir = train(config, tmp_path / "run")
    before = rows(workdir / "metrics.jsonl")
    assert len(before) == 3 and all(np.isfinite(row["total"]) for row in before)
    assert load_backbone(workdir).mean == tuple(manifest["mean"])
    shutil.rmtree(workdir / "checkpoints/3")
    train(config, workdir)
    assert rows(workdir / "metrics.jsonl") == before


def test_sigusr1_and_a_clock_that_jumps(config_of, tmp_path, monkeypatch):
    """The wall clock is set by days between two steps of both processes."""
    from ultradino_jax.run.writer import Writer

    clock, offset, write = time.time, [0], Writer.write

    def setting(self, step, *values):
        offset[0] += {0: 86400, 5: -3 * 86400}.get(step, 0)
        write(self, step, *values)

    def preempted(state, batch):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return stubs.step(state, batch)

    config = config_of(epochs=3, checkpoint_every=4)
    calm = train(config, tmp_path / "calm")
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(time, "time", lambda: clock() + offset[0])
    monkeypatch.setattr(Writer, "write", setting)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compiled_step", lambda *args: preempted)
        with pytest.raises(RunPaused, match=r"SIGUSR1: saved at step 5 of 9; the same"):
            train(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGUSR1) == before
    train(config, tmp_path / "run")
    assert offset == [-2 * 86400]
    assert_same(tmp_path / "run", calm)
    for row in rows(tmp_path / "run/timing.jsonl"):
        assert 0 < row["seconds_per_step"] < 3600 and 0 <= row["data_wait"] <= 1


def test_retention_keeps_the_last_the_best_and_every_mth(tmp_path):
    keep = Retention(
        last=2, every=4, best=True, scores={1: 0.3, 2: 0.9, 3: 0.9, 5: 0.1}
    )
    kept = keep.kept([1, 2, 3, 4, 5, 6, 7])
    assert [i for i, stays in enumerate(kept, 1) if stays] == [2, 4, 6, 7]
    assert Retention(1).kept([1, 2]) == [False, True]
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", keep=keep)
    for step in range(1, 8):
        checkpoints.save(step, {"x": jnp.full(3, step, jnp.float32)}, {"step": step})
    checkpoints.wait()
    assert checkpoints.newest() == 7
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == list("2467")
