"""The run as a user sees it: what is left on disk, bad input, more devices."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.processes import start_main
from tests.run.stubs import rows
from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.errors import UserError
from ultradino_jax.health.phantom_knn import phantom_knn
from ultradino_jax.run import loop
from ultradino_jax.run.plan import make_plan
from ultradino_jax.run.train import train
from ultradino_jax.weights.load import load_backbone

pytestmark = pytest.mark.usefixtures("one_device")
PATIENTS = 12


@pytest.fixture(scope="module")
def compiled_once(one_device):
    """Runs of the same networks and length share the step, which is traced once."""
    real, steps = loop.compiled_step, {}

    def compiled_step(plan, mesh, state):
        key = plan.modules, plan.objective, plan.crops, plan.total_steps
        return steps.setdefault(key, real(plan, mesh, state))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compiled_step", compiled_step)
        yield


@pytest.fixture(scope="module")
def finished(compiled_once, tiny_config, tmp_path_factory):
    """A run of six steps on the phantom, looked at and scored at its end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = tiny_config(
        **{
            "health.every": 6,
            "health.images": 8,
            "health.patients": PATIENTS,
            "knn.enabled": True,
            "knn.patients": PATIENTS,
        }
    )
    return config, train(config, workdir)


def test_a_run_leaves_what_users_and_tools_read(finished):
    _, workdir = finished
    metrics = rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(6))
    for row in metrics:
        terms = row["dino_local"] + row["dino_global"] + row["koleo"] + row["ibot"]
        np.testing.assert_allclose(row["total"], terms, rtol=1e-5)
        assert 0 < row["teacher_entropy"] < row["ln_k"] == np.log(64)
    assert all(row["images_per_second"] > 0 for row in rows(workdir / "timing.jsonl"))
    assert list((workdir / "tensorboard").glob("events.out.tfevents*"))
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["head"]["num_prototypes"] == 64
    assert "jax" in json.loads((workdir / "versions.json").read_text())
    names = [p.name for p in (workdir / "checkpoints").iterdir()]
    assert sorted(names) == ["2", "4", "6"]


def test_the_table_of_parameters_counts_what_the_backbone_holds(finished):
    _, workdir = finished
    lines = (workdir / "parameters.txt").read_text().splitlines()
    sizes = {
        name.strip(): int(size.replace(",", ""))
        for name, _, _, size in (x.split("|")[1:5] for x in lines if "/" in x)
    }
    ours = sum(n for name, n in sizes.items() if name.startswith("backbone/"))
    params = load_backbone(workdir).params
    assert ours == sum(x.size for x in jax.tree.leaves(params))


def test_the_probe_the_guard_and_the_final_score_are_one_number(finished):
    config, workdir = finished
    (health,) = rows(workdir / "health.jsonl")
    final = json.loads((workdir / "knn.json").read_text())
    assert health["step"] == 5 and health["knn"] == final["teacher"]
    plan = make_plan(config, 1)
    again = phantom_knn(workdir, PATIENTS, plan.knn.phantom, report=lambda text: None)
    assert again == final
    from ultradino_jax.health.phantom_knn import make_guard

    said, teacher = [], load_backbone(workdir)
    guard = make_guard(plan.knn, teacher, said.append)
    assert guard(teacher, 6) is None
    shown = f"{final['teacher']:.3f}"
    assert said == [f"guard at step 6: kNN {shown}, starting weights {shown}"]


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


def test_resume_gives_the_same_bytes(finished, tmp_path):
    config, whole = finished
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in ("4", "6"):
        shutil.rmtree(workdir / "checkpoints" / step)
    train(config, workdir)
    for name in ("metrics.jsonl", "health.jsonl", "knn.json"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    assert load_backbone(workdir).digest == load_backbone(whole).digest


def test_real_frames_train_and_resume(compiled_once, tiny_config, tmp_path):
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
    workdir = tmp_path / "run"
    config = tiny_config(
        **{"data.root": str(folder.parent), "data.max_bad_fraction": 0.5}
    )
    train(config, workdir)
    metrics = rows(workdir / "metrics.jsonl")
    assert len(metrics) == 6 and all(np.isfinite(row["total"]) for row in metrics)
    bad = {row["record"]: row["reason"] for row in rows(workdir / "bad_images.jsonl")}
    assert {Path(name).name for name in bad} == {"truncated.jpg", "sliver.bmp"}
    assert "a side below 16" in bad["Ultraschall ä/sliver.bmp"]
    shutil.rmtree(workdir / "checkpoints/6")
    train(config, workdir)
    assert rows(workdir / "metrics.jsonl") == metrics


def test_init_from_takes_architecture_and_weights(finished, tiny_config):
    start = load_backbone(finished[1])
    changes = {"init_from": str(finished[1]), "model.variant": "base"}
    plan = make_plan(tiny_config(**changes), 1)  # the file decides
    assert plan.start.digest == start.digest and plan.name == start.name
    assert plan.modules.backbone.embed_dim == start.model.embed_dim


def test_main_prints_one_line_for_bad_input(tiny_flags, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    process = start_main(tmp_path / "run", *tiny_flags, f"--config.data.root={empty}")
    output = process.communicate()[0]
    assert process.returncode == 1
    assert output.strip().splitlines()[-1].startswith("error: no picture in folder ")
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
        ({"data.normalization": "cache"}, "needs data.root to be a prepared cache"),
        ({"data.normalization": "imagenet"}, "has 3 channels, data.channels is 1"),
        ({"optim.warmup_epochs": 3.0}, "warm-up of 9 steps does not fit a run of 6"),
        ({"accum_steps": 3}, "groups must be a multiple of their product"),
        ({"mesh.fsdp": 3}, "1 devices cannot form fsdp groups of 3"),
        ({"steps_per_epoch": 0, "data.phantom_images": 4}, "do not fill one batch"),
        ({"init_from": "nothing.safetensors"}, "nothing.safetensors"),
        ({"health.labels": "gone.csv"}, "health: .*gone.csv"),
    ],
)
def test_bad_config_is_one_clear_line(
    tiny_config, tmp_path, changes, message, monkeypatch
):
    if "health.labels" in changes:  # read at the first look: no compiled step for that
        from tests.run import stubs
        from ultradino_jax.health import checkups

        probe = checkups.Probe
        stubs.stub(monkeypatch)
        monkeypatch.setattr(checkups, "Probe", probe)
        changes = {**changes, "health.every": 1}
    with pytest.raises((UserError, OSError), match=message) as caught:
        train(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
