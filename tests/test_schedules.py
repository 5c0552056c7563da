import re
from pathlib import Path

import numpy as np
import pytest

from ultradino_jax.run.plan import make_schedules
from ultradino_jax.schedules import cosine_schedule, linear_schedule

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")


@pytest.mark.parametrize("tag", sorted({k.split("/")[0] for k in GOLDEN.files}))
def test_schedules_equal_reference(sub, tag):
    # E.g. paper_e40_len250_b256: nominal epochs, steps per epoch.
    epochs, length = map(int, re.search(r"_e(\d+)_len(\d+)_", tag).groups())
    total = epochs * length
    g = sub(GOLDEN, f"{tag}/")
    peak = float(g["lr_peak"])
    warm = {"total": total, "warmup": 10 * length}
    ours = {
        "lr": cosine_schedule(peak, 1e-6, **warm),
        "last_layer_lr": cosine_schedule(peak, 1e-6, freeze=length, **warm),
        "wd": cosine_schedule(0.04, 0.4, total),
        "momentum": cosine_schedule(0.992, 1.0, total),
        "teacher_temp": linear_schedule(0.04, 0.07, 30 * length),
    }
    for name, schedule in ours.items():
        values = schedule(g["iters"])
        np.testing.assert_allclose(values, g[name], rtol=1e-5, atol=1e-12, err_msg=name)
    # 1 - m is what the teacher moves by: it must be right in its own scale too.
    np.testing.assert_allclose(
        1 - ours["momentum"](g["iters"]), 1 - g["momentum"], rtol=1e-4, atol=1e-7
    )


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 11 steps .* run of 10"):
        cosine_schedule(1.0, 0.0, 10, warmup=11)


def test_a_loss_weight_is_scheduled_when_its_end_is_given(tiny_config):
    assert "koleo_weight" not in make_schedules(tiny_config(), 3)
    config = tiny_config(**{"loss.koleo_weight_end": 0.02})
    weight = make_schedules(config, 3)["koleo_weight"]
    total = 3 * config.epochs
    steps = np.arange(total + 1)
    expected = 0.02 + 0.04 * (1 + np.cos(np.pi * steps / total))  # from 0.1
    np.testing.assert_allclose(weight(steps), expected, rtol=1e-6)
