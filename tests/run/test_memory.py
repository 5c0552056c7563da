import pytest
from ml_collections import ConfigDict

from configs import pretrain_vitb, pretrain_vits
from ultradino_jax.run.images import make_crops
from ultradino_jax.run.memory import choose_remat, step_bytes
from ultradino_jax.run.plan import make_feed, make_modules

# GB that XLA's buffer assignment takes on each of two H100s, of
# experiments/results/roofline.json: model, remat, unroll, images per GPU, accum_steps.
BY_XLA = {
    ("b", "matmuls", 12, 256, 1): 29.64,
    ("b", "matmuls", 1, 256, 1): 31.43,
    ("b", "norms", 1, 256, 1): 11.67,
    ("b", "none", 12, 256, 1): 42.59,
    ("b", "norms", 1, 1024, 1): 39.67,
    ("b", "matmuls", 12, 1024, 4): 30.13,
    ("s", "matmuls", 12, 256, 1): 15.02,
    ("s", "matmuls", 1, 256, 1): 15.73,
    ("s", "norms", 1, 256, 1): 5.84,
    ("s", "none", 12, 256, 1): 21.47,
    ("s", "norms", 1, 1024, 1): 20.27,
}


def gigabytes(model, remat, unroll, images, accum_steps):
    config: ConfigDict = (pretrain_vitb if model == "b" else pretrain_vits).get_config()
    config.batch_size, config.groups = 2 * images, 2 * accum_steps
    config.accum_steps = accum_steps
    need = step_bytes(
        make_modules(config, "xla"),
        make_crops(config),
        make_feed(config, 16, 2),
        chunk_rows=config.loss.chunk_rows,
        accum_steps=accum_steps,
        devices=2,
        remat=remat,
        unroll=unroll,
    )
    return need / 1e9


@pytest.mark.parametrize("setting", BY_XLA, ids=str)
def test_estimate_is_what_xla_allocates(setting):
    assert gigabytes(*setting) == pytest.approx(BY_XLA[setting], rel=0.05)


@pytest.mark.parametrize(
    ("wanted", "unroll", "limit", "platform", "expected"),
    [
        ("auto", 0, 60, "gpu", ("matmuls", 12)),
        ("auto", 0, 24, "gpu", ("norms", 1)),
        ("auto", 2, 24, "gpu", ("norms", 2)),
        ("auto", 0, 64, "cpu", ("none", 12)),
        ("auto", 0, 30.8, "cpu", ("matmuls", 12)),
        ("norms", 0, 60, "gpu", ("norms", 1)),
        ("none", 0, 60, "gpu", ("none", 12)),
    ],
)
def test_auto_is_the_fastest_that_fits(wanted, unroll, limit, platform, expected):
    *chosen, line = choose_remat(
        wanted,
        unroll,
        12,
        lambda *setting: 1e9 * gigabytes("b", *setting, 256, 1),
        limit * 1e9,
        platform,
    )
    assert tuple(chosen) == expected
    assert ("the fastest that fits" in line) == (wanted == "auto")
    assert "run out of memory" not in line


def test_what_does_not_fit_is_said_with_what_helps():
    def need(*setting):
        return 1e9 * gigabytes("b", *setting, 1024, 1)

    remat, unroll, line = choose_remat("auto", 0, 12, need, 24e9, "gpu")
    assert (remat, unroll) == ("norms", 1)
    assert "the smallest there is" in line and "accum_steps=4" in line
    assert gigabytes("b", remat, unroll, 1024, 4) < 24
