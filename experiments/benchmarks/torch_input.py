"""A training step's input for the PyTorch peers, see torch_step.py."""

from pathlib import Path

import jax
import numpy as np
from einops import rearrange

from ultradino_jax.run.plan import Plan
from ultradino_jax.weights.meta import dino_head_state, vit_state


def write_input(config, plan: Plan, batch: dict[str, np.ndarray], path: Path) -> None:
    """Initial weights, batch and hyper-parameters as torch_step.py reads them.

    plan: the config's. batch: host arrays, crops rendered.
    """
    if plan.groups != 1 or config.ibot.separate_head:
        raise ValueError("the peers know one group and one head")
    state = jax.jit(plan.modules.init, static_argnums=1)(
        jax.random.key(config.seed), config.data.channels
    )
    backbone = vit_state(state["backbone"], patch_size=config.model.patch_size)
    arrays = {f"student/backbone.{k}": v for k, v in backbone.items()}
    head = dino_head_state(state["dino_head"])
    arrays |= {f"student/dino_head.{k}": v for k, v in head.items()}
    for name in ("global_crops", "local_crops"):
        crops = np.asarray(plan.objective.normalise(batch[name]))
        arrays[f"batch/{name}"] = rearrange(crops, "1 v b h w c -> (v b) c h w")
    real = batch["mask_weights"][0] > 0
    arrays["batch/masks"] = rearrange(batch["masks"], "1 v b n -> (v b) n")
    arrays["batch/mask_indices"] = batch["mask_indices"][0, real].astype(np.int64)
    arrays["batch/mask_weights"] = batch["mask_weights"][0, real]
    names = {"lr": "lr", "last_layer_lr": "last_layer_lr", "wd": "weight_decay"}
    names |= {"mom": "ema_momentum", "temp": "teacher_temp"}
    for name, schedule in names.items():
        arrays[f"hyper/{name}"] = np.asarray(plan.schedules[schedule](0), np.float64)
    arrays["drop_path"] = np.asarray(config.model.drop_path, np.float64)
    arrays["heads"] = np.asarray(plan.modules.backbone.num_heads, np.int64)
    np.savez(path, allow_pickle=False, **arrays)
