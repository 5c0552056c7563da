"""Continued pretraining from a file that torch wrote, and the guard over it."""

import jax
import pytest

torch = pytest.importorskip("torch")

from configs import continue_pretrain  # noqa: E402
from tests.weights.test_torch_files import random_state  # noqa: E402
from ultradino_jax.run import loop, program  # noqa: E402
from ultradino_jax.run.stops import RunStopped  # noqa: E402
from ultradino_jax.run.train import train  # noqa: E402
from ultradino_jax.weights.load import load_backbone  # noqa: E402
from ultradino_jax.weights.meta import Architecture  # noqa: E402

SMALL = {
    "batch_size": 8, "groups": 8, "epochs": 3, "steps_per_epoch": 2, "log_every": 1,
    "checkpoint_every": 2, "model.dtype": "float32", "model.drop_path": 0.0,
    "model.remat": "none", "head.hidden_dim": 32, "head.bottleneck_dim": 16,
    "head.num_prototypes": 64, "teacher.warmup_temp_epochs": 1.0,
    "optim.warmup_epochs": 0.5, "crops.global_size": 32, "crops.local_size": 16,
    "crops.num_local": 2, "data.phantom_images": 24, "data.phantom_size": (40, 48),
    "data.phantom_settings": 1, "data.workers": 0, "knn.patients": 20,
}  # fmt: skip


def dinov2_file(path):
    """A DINOv2 with registers in Meta's layout: colour, and a larger position grid."""
    sizes = Architecture(128, 4, 8, 3, 9, 4, True, 512)
    torch.save(random_state(sizes.shapes(), seed=7), path)
    return path


@pytest.mark.usefixtures("one_device")
def test_it_is_frozen_then_trained_and_stopped_when_it_collapses(tmp_path, monkeypatch):
    """Two steps frozen, two trained, then the teacher dies."""
    config = continue_pretrain.get_config()
    config.update_from_flattened_dict(SMALL)
    config.init_from = str(dinov2_file(tmp_path / "dinov2.pth"))
    assert (config.optim.freeze_backbone_epochs, config.knn.guard) == (1.0, 0.05)
    converted = load_backbone(config.init_from, image_size=32, channels=1)
    assert converted.name == "dinov2_vitt8_reg4"
    seen, save = [], loop.save_backbone

    def saving(folder, teacher, step):
        seen.append((step, teacher.digest, teacher))
        save(folder, teacher, step=step)

    monkeypatch.setattr(loop, "save_backbone", saving)
    make = program.make_train_step

    def collapsing(*args, **options):
        honest = make(*args, **options)

        def train_step(state, batch):
            state, metrics = honest(state, batch)
            alive = state.step <= 4
            dead = jax.tree.map(lambda x: x * alive, state.teacher["backbone"])
            return state.replace(teacher={**state.teacher, "backbone": dead}), metrics

        return train_step

    monkeypatch.setattr(program, "make_train_step", collapsing)
    with pytest.raises(RunStopped, match=r"kNN fell to .* at step 6, .* lower optim"):
        train(config, tmp_path / "run")
    steps, digests, teachers = zip(*seen, strict=True)
    assert steps == (2, 4, 6)
    assert digests[0] == converted.digest  # frozen
    assert digests[1] != converted.digest
    assert teachers[1].model.num_registers == 4 and teachers[1].channels == 1
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()  # nothing is lost
