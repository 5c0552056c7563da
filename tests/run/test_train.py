"""The run as a user sees it: start, resume, bad input, what is left on disk."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.processes import start_main
from ultradino_jax.checkpoint import RunCheckpoints, checksum
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.run.train import RunStopped, train
from ultradino_jax.weights.load import load_backbone

ROOT = Path(__file__).parents[2]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def phantom_folder(folder, count=12):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = render_phantom(i, size=(40, 48)).image
        Image.fromarray(image).save(folder / f"image{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A run of six steps on the phantom, in this process, on eight devices."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return tiny_config(), train(tiny_config(), workdir)


def test_a_run_leaves_what_users_and_tools_read(finished):
    _, workdir = finished
    rows = lines(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    for row in rows:
        terms = row["dino_local"] + row["dino_global"] + row["koleo"] + row["ibot"]
        np.testing.assert_allclose(row["total"], terms, rtol=1e-5)
        assert 0 < row["teacher_entropy"] < row["ln_k"] == np.log(64)
    assert all(row["images_per_second"] > 0 for row in lines(workdir / "timing.jsonl"))
    assert list((workdir / "tensorboard").glob("events.out.tfevents*"))
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["head"]["num_prototypes"] == 64
    assert "jax" in json.loads((workdir / "versions.json").read_text())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
        "2",
        "4",
        "6",
    ]


def test_the_exported_backbone_is_the_teacher(finished):
    _, workdir = finished
    backbone = load_backbone(workdir)
    assert backbone.mean == (0.1842924807,) and backbone.channels == 1
    manager = RunCheckpoints(workdir / "checkpoints").manager
    everything = ocp.args.Composite(state=ocp.args.StandardRestore())
    saved = manager.restore(6, args=everything)
    teacher = saved["state"]["teacher"]["backbone"]
    jax.tree.map(np.testing.assert_array_equal, backbone.params, teacher)
    out = backbone.model.apply({"params": backbone.params}, np.zeros((1, 32, 32, 1)))
    assert np.isfinite(out.cls_token).all()


def test_a_finished_run_is_not_run_again(finished, capsys):
    config, workdir = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    train(config, workdir)
    assert "already trained for all 6 steps" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_with_its_keys(finished, tiny_config):
    config, workdir = finished
    other = tiny_config(**{"optim.base_lr": 0.5, "head.num_prototypes": 32})
    with pytest.raises(
        RunStopped,
        match=r"head.num_prototypes: 64 there, 32 now; "
        rf"optim.base_lr: {config.optim.base_lr} there",
    ):
        train(other, workdir)


def interrupted(finished, tmp_path, keep_step):
    """A copy of the finished run as if it had been killed after `keep_step`."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[1], workdir)
    for step in (workdir / "checkpoints").iterdir():
        if int(step.name) > keep_step:
            shutil.rmtree(step)
    return workdir


def test_resume_gives_the_same_bytes(finished, tiny_config, tmp_path):
    workdir = interrupted(finished, tmp_path, 2)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tot')  # cut by the crash
    # What does not touch the numbers may change.
    train(tiny_config(**{"data.threads": 3, "checkpoint_every": 3}), workdir)
    for name in ("metrics.jsonl",):
        assert (workdir / name).read_bytes() == (finished[1] / name).read_bytes()
    assert load_backbone(workdir).digest == load_backbone(finished[1]).digest


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing"])
def test_a_corrupt_checkpoint_falls_back(
    finished, tiny_config, tmp_path, capsys, damage
):
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
    train(tiny_config(), workdir)
    out = capsys.readouterr().out
    assert "checkpoint 4 is not usable" in out
    assert "resumed from the checkpoint at step 2" in out
    assert (workdir / "corrupt" / "4").is_dir()
    name = "metrics.jsonl"
    assert (workdir / name).read_bytes() == (finished[1] / name).read_bytes()


def test_checksum_sees_every_bit_and_no_layout():
    tree = {"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.int32)}
    base = int(checksum(tree))
    for value in (np.nextafter(np.float32(3), np.float32(4)), np.float32(-3)):
        other = tree["a"].copy()
        other[3] = value
        assert int(checksum({**tree, "a": other})) != base
    swapped = {**tree, "a": tree["a"][[1, 0, 2, 3, 4, 5]]}
    assert int(checksum(swapped)) != base


def test_other_images_are_refused_on_resume(tiny_config, tmp_path):
    folder = phantom_folder(tmp_path / "data")
    config = tiny_config(**{"data.root": str(folder), "epochs": 1})
    train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/3")
    (folder / "image00.png").unlink()
    with pytest.raises(RunStopped, match="images are not those this run started with"):
        train(config, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(tiny_flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("main") / "run"
    process = start_main(workdir, *tiny_flags, "--config.epochs=5")
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_rerun_gives_the_same_bytes(
    tiny_flags, uninterrupted, tmp_path, workers
):
    flags = [*tiny_flags, "--config.epochs=5", f"--config.data.workers={workers}"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    victim = start_main(tmp_path / "run", *flags, start_new_session=True)
    # Any step will do; which one is left to the scheduler and to this draw.
    wanted = np.random.default_rng().integers(3, 12)
    while victim.poll() is None:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= wanted:
            os.killpg(victim.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert metrics.read_bytes() != uninterrupted
    second = start_main(tmp_path / "run", *flags)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert "resumed from the checkpoint" in output
    assert metrics.read_bytes() == uninterrupted


def test_real_frames_train_and_resume(tiny_flags, tmp_path):
    """The ultrasound frames in pydicom and the pictures in scikit-image, as files."""
    skimage_data = pytest.importorskip("skimage.data")
    from pydicom import examples

    folder = tmp_path / "frames" / "Ultraschall ä"
    folder.mkdir(parents=True)
    cine = examples.ybr_color.pixel_array
    for i, frame in enumerate(cine[::6]):
        Image.fromarray(frame).save(folder / f"cine{i}.jpg")
    Image.fromarray(examples.rgb_color.pixel_array).save(folder / "doppler.PNG")
    for name in ("camera", "coins", "moon", "brick"):
        Image.fromarray(getattr(skimage_data, name)()).save(folder / f"{name}.tif")
    Image.fromarray(skimage_data.astronaut()).convert("RGBA").save(folder / "a.png")
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen.png")
    (folder / "truncated.jpg").write_bytes((folder / "cine0.jpg").read_bytes()[:1500])
    Image.fromarray(np.zeros((8, 40), np.uint8)).save(folder / "sliver.bmp")
    flags = [*tiny_flags, f"--config.data.root={folder.parent}"]
    flags += ["--config.data.max_bad_fraction=0.5"]
    first = start_main(tmp_path / "run", *flags)
    output = first.communicate()[0]
    assert first.returncode == 0, output
    rows = lines(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 6 and all(np.isfinite(row["total"]) for row in rows)
    bad = {
        row["record"]: row["reason"] for row in lines(tmp_path / "run/bad_images.jsonl")
    }
    assert {Path(name).name for name in bad} == {"truncated.jpg", "sliver.bmp"}
    assert "a side below 16" in bad["Ultraschall ä/sliver.bmp"]
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    again = start_main(tmp_path / "run", *flags)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert "resumed from the checkpoint at step 4" in output
    assert lines(tmp_path / "run/metrics.jsonl") == rows


def test_a_prepared_cache_trains_and_resumes(tiny_config, tmp_path):
    """pydicom's ultrasound -> prepare -> main loop, with the cache's statistics."""
    from pydicom.data import get_testdata_file

    from ultradino_jax.prepare import prepare

    inputs = tmp_path / "pacs"
    inputs.mkdir()
    for name in ("examples_ybr_color.dcm", "examples_palette.dcm"):
        shutil.copy(get_testdata_file(name, download=False), inputs)
    cache = tmp_path / "cache"
    manifest = prepare(inputs, cache, workers=0, progress=False)
    config = tiny_config(
        **{"data.root": str(cache), "data.normalization": "cache", "epochs": 1}
    )
    workdir = train(config, tmp_path / "run")
    rows = lines(workdir / "metrics.jsonl")
    assert len(rows) == 3 and all(np.isfinite(row["total"]) for row in rows)
    assert load_backbone(workdir).mean == tuple(manifest["mean"])
    shutil.rmtree(workdir / "checkpoints/3")
    train(config, workdir)
    assert lines(workdir / "metrics.jsonl") == rows


def test_main_prints_one_line_for_bad_input(tiny_flags, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    process = start_main(tmp_path / "run", *tiny_flags, f"--config.data.root={empty}")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith("error: no image (")
    assert "Traceback" not in output
    process = start_main(tmp_path / "run", *tiny_flags, "--config.optim.lr=1")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert output == "error: the config has no key 'optim.lr'\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.root": "/nowhere/at/all"}, "'/nowhere/at/all' does not exist"),
        ({"batch_size": 12}, "batch_size 12 is not divisible by 8 groups"),
        ({"crops.global_size": 30}, "crop size 30 is not divisible by patch size 8"),
        ({"crops.local_size": 20}, "crop size 20 is not divisible by patch size 8"),
        ({"crops.style": "xray"}, "crops.style 'xray' is none of ultrasound, imagenet"),
        ({"masking.style": "dots"}, "mask style 'dots' is none of"),
        ({"model.variant": "huge"}, "unknown ViT variant 'huge'"),
        ({"model.dtype": "int8"}, "model.dtype 'int8' is none of"),
        ({"loss.centering": "mean"}, "centering must be"),
        ({"data.normalization": "mri"}, "data.normalization 'mri' is none of"),
        ({"data.normalization": "cache"}, "needs data.root to be a prepared cache"),
        ({"data.normalization": "imagenet"}, "has 3 channels, data.channels is 1"),
        ({"optim.warmup_epochs": 3.0}, "warm-up of 9 steps does not fit a run of 6"),
        ({"accum_steps": 2}, "groups must be a multiple of their product"),
        ({"mesh.fsdp": 3}, "8 devices cannot form fsdp groups of 3"),
        ({"steps_per_epoch": 0, "data.phantom_images": 4}, "do not fill one batch"),
    ],
)
def test_bad_config_is_one_clear_line(tiny_config, tmp_path, changes, message):
    with pytest.raises(RunStopped, match=message) as caught:
        train(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_too_many_bad_images_stop_the_run(tiny_config, tmp_path):
    folder = phantom_folder(tmp_path / "data")
    for i in range(4):
        (folder / f"image{i:02d}.png").write_bytes(b"not a picture")
    config = tiny_config(**{"data.root": str(folder), "data.max_bad_fraction": 0.1})
    with pytest.raises(RunStopped, match=r"of 12 images are unreadable.*bad_images"):
        train(config, tmp_path / "run")
    assert lines(tmp_path / "run/bad_images.jsonl")


def test_nan_stops_with_step_terms_and_records(
    finished, tiny_config, tmp_path, monkeypatch
):
    workdir = interrupted(finished, tmp_path, 2)
    import ultradino_jax.run.train as module

    make = module.make_train_step

    def poisoned(*args, **options):
        step = make(*args, **options)

        def train_step(state, batch):
            state, metrics = step(state, batch)
            nan = jax.numpy.where(state.step == 4, jax.numpy.nan, metrics["ibot"])
            return state, {**metrics, "ibot": nan}

        return train_step

    monkeypatch.setattr(module, "make_train_step", poisoned)
    with pytest.raises(
        RunStopped,
        match=r"not finite at step 3 .*ibot=nan.*phantom/.*checkpoint: step 2",
    ):
        train(tiny_config(), workdir)
    report = json.loads((workdir / "nan.json").read_text())
    assert report["step"] == 3 and len(report["records"]) == 8
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    monkeypatch.undo()
    train(tiny_config(), workdir)  # nothing was lost
    name = "metrics.jsonl"
    assert (workdir / name).read_bytes() == (finished[1] / name).read_bytes()


def test_continued_pretraining_starts_from_the_weights(finished, tiny_config, tmp_path):
    """Architecture and backbone of the file, fresh heads, frozen for an epoch."""
    config = tiny_config(
        **{
            "init_from": str(finished[1]),
            "model.variant": "base",  # the file decides
            "optim.freeze_backbone_epochs": 1.0,
            "checkpoint_every": 3,
        }
    )
    start = load_backbone(finished[1])
    seen = []
    train(config, tmp_path / "run", lambda *call: seen.append(call))
    (frozen, given, step), (trained, _, last) = seen
    assert (step, last) == (3, 6)
    assert given.digest == frozen.digest == start.digest
    assert trained.digest != start.digest
    assert trained.model == frozen.model


def test_the_guard_stops_a_collapse(finished, tiny_config, tmp_path, monkeypatch):
    import ultradino_jax.run.train as module
    from ultradino_jax.data.phantom.source import PhantomSource
    from ultradino_jax.health.phantom_knn import make_guard

    source = PhantomSource(1, (40, 48), settings=1)
    check = make_guard(20, source, 0.05, report=lambda text: None)
    start = load_backbone(finished[1])
    assert check(start, start, 0) is None

    def guard(teacher, start, step):
        if problem := check(teacher, start, step):
            raise RunStopped(problem)

    make = module.make_train_step

    def collapsing(*args, **options):
        step = make(*args, **options)

        def train_step(state, batch):
            state, metrics = step(state, batch)
            dead = jax.tree.map(lambda x: 0 * x, state.teacher["backbone"])
            teacher = {**state.teacher, "backbone": dead}
            return state.replace(teacher=teacher), metrics

        return train_step

    monkeypatch.setattr(module, "make_train_step", collapsing)
    config = tiny_config(init_from=str(finished[1]))
    with pytest.raises(RunStopped, match=r"kNN fell to .* at step 2, .* lower optim"):
        train(config, tmp_path / "run", guard)


def test_init_from_names_what_is_wrong(tiny_config, tmp_path):
    missing = tmp_path / "nothing.safetensors"
    with pytest.raises(RunStopped, match=r"nothing.safetensors"):
        train(tiny_config(init_from=str(missing)), tmp_path / "run")


def test_a_run_goes_on_with_another_number_of_devices(finished, tiny_flags, tmp_path):
    workdir = interrupted(finished, tmp_path, 4)  # trained on eight
    process = start_main(workdir, *tiny_flags, devices=1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "resumed from the checkpoint at step 4" in output
    assert "GB per device: state and batch 0.01, temporaries 0." in output
    ours, theirs = (
        lines(workdir / "metrics.jsonl"),
        lines(finished[1] / "metrics.jsonl"),
    )
    assert ours[:4] == theirs[:4]
    for a, b in zip(ours[4:], theirs[4:], strict=True):
        np.testing.assert_allclose(a["total"], b["total"], rtol=1e-4)


def test_devices_that_need_other_groups_are_refused(tiny_config, tmp_path):
    config = tiny_config(**{"epochs": 1, "checkpoint_every": 3})
    workdir = train(config, tmp_path / "run")
    saved = workdir / "checkpoints/3/meta/metadata"
    content = json.loads(saved.read_text())
    content["groups"] = 2
    saved.write_text(json.dumps(content))
    with pytest.raises(RunStopped, match=r"trained in 2 groups, 8 devices need 8"):
        train(config, workdir)
