"""What every value of a pretraining config may be. See configs/pretrain_vitb.py."""

from dataclasses import fields

import jax.numpy as jnp

from ultradino_jax.data.crops import CropConfig
from ultradino_jax.data.masking import MASK_STYLES
from ultradino_jax.data.sources import MIN_SIDE
from ultradino_jax.limits import (
    FLAG,
    SEED,
    TEXT,
    below,
    choice,
    integer,
    number,
    optional,
    pair,
    positive,
)
from ultradino_jax.models.attention import IMPLEMENTATIONS
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.normalization import NORMALIZATION
from ultradino_jax.pretraining.objective import CENTERINGS, Objective
from ultradino_jax.run.memory import KEPT

SHARE = number(0, 1)
COUNT = integer(1)
EPOCHS = number(0, 10_000)  # nominal, so also parts of one
# Where data.normalization takes the statistics of a prepared cache.
CACHE = "cache"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# The recipe of a style, and which of its flips crops.flip_prob is.
CROP_STYLES = {
    "ultrasound": (CropConfig.ultrasound, "vertical_flip_prob"),
    "imagenet": (CropConfig.imagenet, "horizontal_flip_prob"),
}

# A weight of the loss, and what a cosine takes it to: None or no such key is constant.
WEIGHTS = tuple(f.name for f in fields(Objective) if f.name.endswith("_weight"))
ENDS = {f"loss.{name}_end": optional(number(0)) for name in WEIGHTS}
# Sizes that a config may give beside, or instead of, those of model.variant.
OWN_SIZES = ("model.embed_dim", "model.depth", "model.num_heads", "model.mlp_ratio")

LIMITS = {
    "seed": SEED,
    "batch_size": COUNT,
    "groups": COUNT,
    "accum_steps": COUNT,
    "epochs": COUNT,
    "steps_per_epoch": integer(0),
    "init_from": TEXT,
    "model.variant": choice(VARIANTS),
    "model.patch_size": COUNT,
    "model.num_registers": integer(0),
    "model.layerscale": optional(positive()),
    "model.drop_path": below(1),
    "model.pos_offset": number(0),
    "model.pos_antialias": FLAG,
    "model.dtype": choice(DTYPES),
    "model.attention": choice(("auto", *IMPLEMENTATIONS)),
    "model.unroll": integer(0),
    "model.remat": choice(("auto", *KEPT)),
    **dict.fromkeys(OWN_SIZES, COUNT),
    "head.hidden_dim": COUNT,
    "head.bottleneck_dim": COUNT,
    "head.num_prototypes": integer(2),
    "head.num_layers": COUNT,
    "ibot.separate_head": FLAG,
    "ibot.num_prototypes": integer(2),
    **{f"loss.{name}": number(0) for name in WEIGHTS},
    **ENDS,
    "loss.student_temp": positive(),
    "loss.centering": choice(CENTERINGS),
    "loss.center_momentum": SHARE,
    "loss.sinkhorn_iterations": COUNT,
    "loss.chunk_rows": COUNT,
    "teacher.momentum": SHARE,
    "teacher.momentum_end": SHARE,
    "teacher.warmup_temp": positive(),
    "teacher.temp": positive(),
    "teacher.warmup_temp_epochs": EPOCHS,
    "optim.base_lr": positive(),
    "optim.reference_batch": COUNT,
    "optim.min_lr": number(0),
    "optim.warmup_epochs": EPOCHS,
    "optim.weight_decay": number(0),
    "optim.weight_decay_end": number(0),
    "optim.freeze_last_layer_epochs": EPOCHS,
    "optim.freeze_backbone_epochs": EPOCHS,
    "optim.layerwise_decay": positive(1),
    "optim.patch_embed_multiplier": number(0),
    "optim.clip_norm": positive(),
    "optim.b1": below(1),
    "optim.b2": below(1),
    "crops.style": choice(CROP_STYLES),
    "crops.global_size": COUNT,
    "crops.local_size": COUNT,
    "crops.num_local": integer(0),
    "crops.global_scale": pair(positive(1), ascending=True),
    "crops.local_scale": pair(positive(1), ascending=True),
    "crops.flip_prob": SHARE,
    "masking.probability": SHARE,
    "masking.ratio": pair(SHARE, ascending=True),
    "masking.style": choice(MASK_STYLES),
    "data.root": TEXT,
    "data.list_file": TEXT,
    "data.channels": choice((1, 3)),
    "data.normalization": choice((*NORMALIZATION, CACHE)),
    "data.phantom_images": COUNT,
    "data.phantom_size": pair(integer(MIN_SIDE)),
    "data.phantom_settings": integer(0),
    "data.phantom_seed": SEED,
    "data.workers": integer(0),
    "data.threads": integer(0),
    "data.prefetch": integer(0),
    "data.render": choice(("host", "device")),
    "data.canvas": integer(MIN_SIDE),
    "data.max_bad_fraction": SHARE,
    "mesh.fsdp": COUNT,
    "compilation_cache": TEXT,
    "log_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "keep_every": integer(0),
    "keep_best": FLAG,
    "restart": FLAG,
    "nan.policy": choice(("stop", "skip")),
    "nan.max_skips": integer(0),
    "health.every": integer(0),
    "health.images": integer(2),
    "health.labels": TEXT,
    "health.patients": integer(2),
    "health.panels_every": integer(0),
    "knn.enabled": FLAG,
    "knn.patients": integer(2),
    "knn.guard": SHARE,
}
# What need not be there.
OPTIONAL = (*OWN_SIZES, *ENDS)
