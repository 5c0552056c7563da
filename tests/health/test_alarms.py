"""Each alarm on its planted failure, none on a healthy run."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.health import alarms
from ultradino_jax.health.teacher import Probe
from ultradino_jax.jsonl import read_rows
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.vit import ViT
from ultradino_jax.run.meter import Meter
from ultradino_jax.run.train import train
from ultradino_jax.weights.backbone import Backbone

# The first 160 of 240 steps of configs/pretrain_smoke.py with epochs=4, log_every=10,
# health.every=40. Without timing.jsonl: the machine was busy, its data late.
HEALTHY = Path(__file__).parents[1] / "healthy_run"
PHASE = 8  # steps of each planted failure


def test_a_healthy_run_raises_no_alarm():
    rows = read_rows(HEALTHY / "metrics.jsonl")
    assert len(rows) == 16 and len(read_rows(HEALTHY / "health.jsonl")) == 4
    watch, events = alarms.replay(HEALTHY, alarms.Facts(warmup=60, num_prototypes=128))
    assert events == [] and watch.active == {}


@pytest.fixture(scope="module")
def planted(one_device, tiny_config, tmp_path_factory):
    """One run whose teacher fails in phases: healthy, uniform, one-hot, too fast."""
    import ultradino_jax.run.plan as plan_module
    import ultradino_jax.run.program as module

    make_step, make_schedules = module.make_train_step, plan_module.make_schedules

    def failing(*args, **options):
        step = make_step(*args, **options)

        def train_step(state, batch):
            phase = state.step // PHASE
            ill = (phase == 1) | (phase == 2)
            head = state.teacher["dino_head"]
            layer = head["last_layer"]
            gain = jnp.where(ill, 0.0, layer["g"])  # every logit 0
            teacher = {
                **state.teacher,
                "dino_head": {**head, "last_layer": {**layer, "g": gain}},
            }
            one = jnp.zeros(64).at[5].set(-10.0)  # one logit high
            center = jnp.where(
                phase == 2, one, jnp.where(ill, 0.0, state.centers["dino"])
            )
            centers = {**state.centers, "dino": center}
            return step(state.replace(teacher=teacher, centers=centers), batch)

        return train_step

    def fast(config, steps_per_epoch):
        schedules = make_schedules(config, steps_per_epoch)
        lr = schedules["lr"]
        return {**schedules, "lr": lambda s: jnp.where(s >= 3 * PHASE, 0.5, lr(s))}

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "make_train_step", failing)
    patch.setattr(plan_module, "make_schedules", fast)
    config = tiny_config(
        **{
            "steps_per_epoch": PHASE,
            "epochs": 4,
            "optim.warmup_epochs": 0.5,
            "optim.base_lr": 0.0005,
            "loss.centering": "centering",
            "checkpoint_every": 4 * PHASE,
        }
    )
    workdir = train(config, tmp_path_factory.mktemp("planted") / "run")
    patch.undo()
    return workdir


def starts(events):
    return {e["alarm"]: e["since"] for e in events if e["on"]}


def test_collapses_and_a_fast_step_are_seen_from_their_first_row(planted):
    events = read_rows(planted / "alarms.jsonl")
    since = starts(events)
    since.pop("data starvation", None)  # a matter of the machine
    assert since.pop("uniform collapse") == PHASE
    assert since.pop("one-hot collapse") == 2 * PHASE
    assert since.pop("learning rate and batch do not fit") >= 3 * PHASE
    assert not since
    ended = {e["alarm"]: e["step"] for e in events if not e["on"]}
    assert ended["uniform collapse"] == 2 * PHASE
    assert all(e["seen"] and e["advice"] for e in events)


def test_the_list_is_a_function_of_the_files(planted):
    facts = alarms.Facts(warmup=PHASE // 2, num_prototypes=64)
    watch, events = alarms.replay(planted, facts)
    assert events == read_rows(planted / "alarms.jsonl")
    earlier, _ = alarms.replay(planted, facts, before=2 * PHASE)
    assert "uniform collapse" in earlier.active
    assert "uniform collapse" not in watch.active


@pytest.fixture(scope="module")
def patient():
    """(backbone, head, head parameters) of a tiny untrained model, LayerScale 1."""
    model = ViT(32, 2, 2, patch_size=8, image_size=32, layerscale=1.0)
    images = np.zeros((1, 32, 32, 1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    head = DINOHead(32, 16, 64)
    head_params = head.init(jax.random.key(1), np.zeros((1, 32)))["params"]
    return Backbone(model, params, 32, 1, (0.2,), (0.2,), name="t"), head, head_params


class Copies:
    """A source in which every record is one of a few phantoms."""

    def __init__(self, distinct):
        self.source = PhantomSource(distinct, (40, 48))

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.source[index % len(self.source)]


def examine(patient, source, watch, times=2, images=16):
    backbone, head, head_params = patient
    phantom = PhantomSource(1, (40, 48), settings=1)
    probe = Probe(source, images=images, labels="", patients=4, phantom=phantom)
    probe.prepare(backbone)
    values = probe(backbone, head, head_params, np.zeros(64, np.float32))
    events = []
    for step in range(times):
        events += watch.add("health", {"step": step, **values})
    return values, starts(events)


def test_a_healthy_probe_raises_no_alarm(patient):
    watch = alarms.Watch(alarms.Facts())
    values, since = examine(patient, PhantomSource(24, (40, 48)), watch)
    assert not since and 0 <= values["knn"] <= 1 and values["dimensions"] == 16


def test_duplicate_frames(patient):
    values, since = examine(patient, Copies(12), alarms.Watch(alarms.Facts()))
    assert 0.2 < values["duplicates"] <= 1
    assert since == {"duplicate frames": 0}


def test_dead_prototypes(patient):
    backbone, head, params = patient
    last = {**params["last_layer"], "g": jnp.zeros(64).at[3].set(1.0)}
    params = {**params, "last_layer": last, "mlp_2": dict(params["mlp_2"])}
    v = params["last_layer"]["v"]
    params["mlp_2"]["bias"] = 100 * v[:, 3] / jnp.linalg.norm(v[:, 3])
    source = PhantomSource(48, (40, 48))
    ill, watch = (backbone, head, params), alarms.Watch(alarms.Facts())
    values, since = examine(ill, source, watch, images=48)
    assert values["prototypes_used"] < 0.05
    assert since == {"dead prototypes": 0}


def test_dimensional_collapse(patient):
    backbone, head, params = patient
    patch = jax.tree.map(jnp.zeros_like, backbone.params["patch_embed"])
    blind = dataclasses.replace(
        backbone, params={**backbone.params, "patch_embed": patch}
    )
    source = PhantomSource(24, (40, 48))
    values, since = examine((blind, head, params), source, alarms.Watch(alarms.Facts()))
    assert values["rankme_cls"] == pytest.approx(1, abs=1e-3)
    assert since["dimensional collapse"] == 0


def test_data_starvation_on_a_clock(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    meter = Meter(1e9, 8, "float32")
    watch, events = alarms.Watch(alarms.Facts()), []
    for step in range(20):
        meter.reset()
        meter.steps += 1
        with meter.waiting():
            clock[0] += 0.01 if step < 10 else 0.5
        clock[0] += 0.5  # the step itself
        events += watch.add("timing", {"step": step, **meter.read()})
    assert starts(events) == {"data starvation": 10}
    assert "50 % of the time" in events[0]["seen"]
    assert "data.workers" in alarms.describe(events[0])


def test_rows_without_the_numbers_are_passed_over(tmp_path):
    watch = alarms.Watch(alarms.Facts())
    assert watch.add("metrics", {"step": 0, "skipped": 1}) == []
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 0}) + '\n{"step": 1, "t'
    )
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 0}]
