"""Every key of every config has a limit, and what is beyond it is one line."""

import math

import pytest
from ml_collections import ConfigDict

from tests.test_configs import NAMES, flat, get_config
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification import settings as classification
from ultradino_jax.evaluators.evaluate import evaluate
from ultradino_jax.evaluators.segmentation import settings as segmentation
from ultradino_jax.limits import check
from ultradino_jax.run.limits import LIMITS, OPTIONAL
from ultradino_jax.run.plan import make_plan

PRETRAINING = ("pretrain_smoke", "seconds")


def limits_of(config):
    kinds = {"classification": classification, "segmentation": segmentation}
    kind = kinds.get(config.get("task", ""))
    return (LIMITS, OPTIONAL) if kind is None else (kind.LIMITS, ())


def changed(config, key, value):
    """The config as a plain dict, which does not mind another type."""
    values = config.to_dict()
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    return values


@pytest.mark.parametrize(("name", "argument"), NAMES)
def test_what_no_value_may_be(name, argument):
    """Values of another type, and numbers that no key takes, are named at every key."""
    config = get_config(name, argument)
    limits = limits_of(config)
    check(config, *limits)
    for key, value in flat(config):
        wrong: list = [object()]
        if not isinstance(value, str):
            wrong.append("nonsense")
        if not isinstance(value, tuple):
            wrong += [-1, math.nan, math.inf, ()]
        for bad in wrong:
            with pytest.raises(UserError) as refused:
                check(changed(config, key, bad), *limits)
            line = str(refused.value)
            assert line.startswith(f"config.{key}={bad!r}: it must be ")
            assert "\n" not in line


def test_a_key_too_many_and_one_too_few():
    config = get_config(*PRETRAINING)
    with pytest.raises(UserError, match=r"has no key 'optim\.lr': nothing would"):
        check(changed(config, "optim.lr", 1), *limits_of(config))
    del config.optim["b1"]
    with pytest.raises(UserError, match=r"lacks the key 'optim\.b1'"):
        check(config, *limits_of(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.dtype": "int8"}, "model.dtype='int8': .* 'float32', 'bfloat16'"),
        (
            {"model.remat": "all"},
            "model.remat='all': .*'auto', 'norms', 'matmuls'",
        ),
        ({"model.variant": "huge"}, "model.variant='huge': .*'tiny', 'small', 'base'"),
        ({"model.drop_path": 1.0}, "model.drop_path=1.0: .*below 1"),
        ({"loss.centering": "mean"}, "'centering', 'sinkhorn_knopp'"),
        ({"crops.style": "xray"}, "crops.style='xray': .*'ultrasound', 'imagenet'"),
        ({"crops.global_scale": (0.5,)}, r"global_scale=\(0.5,\): .*two values"),
        ({"crops.local_scale": (0.5, 0.2)}, "ascending"),
        ({"masking.style": "dots"}, "masking.style='dots': .*'block', 'random'"),
        ({"masking.probability": 0.0}, r"mask no patch of a group's 2 crops"),
        ({"masking.ratio": (0.0, 0.05)}, r"mask no patch of a group's 2 crops"),
        ({"data.normalization": "mri"}, "'fus', 'imagenet', 'cache'"),
        ({"data.channels": 2}, "data.channels=2: it must be one of 1, 3"),
        ({"data.render": "gpu"}, "data.render='gpu': .*'host', 'device'"),
        ({"data.phantom_size": (8, 64)}, "phantom_size=.* at least 16"),
        ({"nan.policy": "ignore"}, "nan.policy='ignore': .*'stop', 'skip'"),
        ({"batch_size": 0}, "batch_size=0: .*of at least 1"),
        ({"seed": 2**32}, "seed=4294967296: .*0 to 4294967295"),
        ({"teacher.temp": 0.0}, "teacher.temp=0.0: .*above 0"),
        ({"optim.base_lr": math.nan}, "optim.base_lr=nan"),
        ({"optim.freeze_backbone_epochs": 1e30}, "freeze_backbone_epochs=1e"),
        ({"model.embed_dim": 100, "model.num_heads": 3}, "100 is not divisible by"),
    ],
)
def test_a_bad_pretraining_value_is_named(changes, message):
    values = get_config(*PRETRAINING).to_dict()
    for key, value in changes.items():
        values = changed(ConfigDict(values), key, value)
    with pytest.raises(UserError, match=message) as refused:
        make_plan(ConfigDict(values), 1)
    assert "\n" not in str(refused.value)


LINEAR, N20 = ("fetal_planes", "linear"), ("fass", "n20")


@pytest.mark.parametrize(
    "config, key, value, message",
    [
        (LINEAR, "mode", "svm", "mode='svm': .*'linear', 'finetune', 'knn'"),
        (LINEAR, "data.name", "imagenet", "'fetal_planes', 'african_planes', 'csv'"),
        (LINEAR, "data.split_files", ("a.csv",), "no or three files"),
        (LINEAR, "rows", ("student",), "rows=.*'teacher', 'random init'"),
        (LINEAR, "rows", (), "1 or more different values"),
        (LINEAR, "seeds", (1, 1), "different values"),
        (LINEAR, "linear.recipe", "fast", "'paper', 'cached'"),
        (LINEAR, "linear.warmup_epochs", 11, "11 warm-up epochs do not fit 10 epochs"),
        (LINEAR, "finetune.layerwise", "none", "'reference', 'intended'"),
        (LINEAR, "fewshot.unit", "videos", "'images', 'patients'"),
        (LINEAR, "fewshot.methods", ("svm",), "'linear', 'logreg', 'knn'"),
        (LINEAR, "logreg.log10_c", (-6.0, 5.0), "powers from, to, and how many"),
        (LINEAR, "model.channels", 2, "one of 0, 1, 3"),
        (N20, "rows", ("vnet",), "'random init', 'unet', 'multiresunet', 'unetr'"),
        (N20, "data.name", "cityscapes", "'fass', 'jnu_ifm', 'psfhs', 'folder'"),
        (N20, "data.group_by", "week", "'examination', 'day'"),
        (N20, "model.arch", "huge", "'', 'tiny', 'small', 'base', 'large'"),
        (N20, "model.norm", "layer", "'none', 'batch'"),
        (N20, "model.registers", "some", "'drop', 'keep'"),
        (N20, "model.resize", "crop", "'stretch', 'letterbox'"),
        (N20, "train.budget", "long", "'paper', 'equal'"),
        (N20, "train.dice", "tversky", "'reference', 'softmax_dice'"),
        (N20, "train.translation", "left", "'reference', 'symmetric'"),
        (N20, "train.warmup_steps", 20_000, "20000 warm-up steps do not fit 20000"),
    ],
)
def test_a_bad_value_of_an_evaluation_is_named(tmp_path, config, key, value, message):
    values = ConfigDict(changed(get_config(*config), key, value))
    with pytest.raises(UserError, match=message) as refused:
        evaluate(values, None, tmp_path)
    assert "\n" not in str(refused.value)
