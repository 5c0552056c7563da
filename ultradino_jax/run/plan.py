"""From a ConfigDict to the objects a run is made of. Nothing below takes the config."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from ultradino_jax.data.crops import NUM_GLOBAL, CropConfig
from ultradino_jax.data.masking import mask_buffer_length
from ultradino_jax.data.source_digest import stream_record
from ultradino_jax.errors import UserError, as_user_error
from ultradino_jax.health.alarms import Facts
from ultradino_jax.health.checkups import HealthSettings
from ultradino_jax.health.phantom_knn import KnnSettings
from ultradino_jax.limits import check
from ultradino_jax.models.attention import choose as choose_attention
from ultradino_jax.models.dino_head import DINOHead
from ultradino_jax.models.vit import ViT, build_vit
from ultradino_jax.optimizer import make_optimizer
from ultradino_jax.pretraining.networks import Modules
from ultradino_jax.pretraining.objective import Objective
from ultradino_jax.run.images import (
    make_crops,
    make_source,
    normalization,
    phantom_source,
)
from ultradino_jax.run.limits import DTYPES, LIMITS, OPTIONAL, WEIGHTS
from ultradino_jax.run.memory import choose_remat, device_bytes, step_bytes
from ultradino_jax.run.meter import step_flops
from ultradino_jax.run.settings import FeedSettings, LoopSettings, NanPolicy
from ultradino_jax.schedules import Schedule, cosine_schedule, linear_schedule
from ultradino_jax.sharding import resolve_groups
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import load_backbone


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a run needs besides a mesh and a workdir.

    name: e.g. 'vit_base_patch16'. stream: what identifies the source's images. dtype:
    of the model, as the config says it. notes: lines to say at the start. start: the
    weights of init_from. accum_steps: see `make_train_step`.
    """

    name: str
    source: Any
    stream: dict[str, Any]
    crops: CropConfig
    modules: Modules
    objective: Objective
    optimizer: Any
    schedules: dict[str, Schedule]
    channels: int
    dtype: str
    accum_steps: int
    steps_per_epoch: int
    total_steps: int
    flops_per_step: float
    start: Backbone | None
    notes: tuple[str, ...]
    loop: LoopSettings
    feed: FeedSettings
    nan: NanPolicy
    health: HealthSettings
    facts: Facts
    knn: KnnSettings

    @property
    def groups(self) -> int:
        """W, a multiple of the devices."""
        return self.feed.groups


def make_backbone(config: ConfigDict, attention: str) -> ViT:
    """The ViT of a config, its position grid sized for the global crops.

    attention: the implementation chosen for this device.
    """
    m = config.model
    own = ("variant", "dtype", "attention")
    overrides = {k: v for k, v in m.items() if k not in own}
    model = build_vit(
        m.variant,
        dtype=DTYPES[m.dtype],
        image_size=config.crops.global_size,
        attention=attention,
        **overrides,
    )
    if model.embed_dim % model.num_heads:
        raise UserError(
            f"model.embed_dim {model.embed_dim} is not divisible by model.num_heads "
            f"{model.num_heads}"
        )
    return model


def load_start(config: ConfigDict) -> Backbone | None:
    """The weights of `init_from`, at the run's crop size and channel count, or None.

    Raises UserError, OSError or ImportError with one line, also for a model that is
    not a ViT (USFM has no positions to resize and no mask token to train).
    """
    if not config.init_from:
        return None
    start = load_backbone(
        config.init_from,
        image_size=config.crops.global_size,
        channels=config.data.channels,
    )
    if not isinstance(start.model, ViT):
        name = type(start.model).__name__
        raise UserError(f"init_from: pretraining needs a ViT, this is a {name}")
    return start


def vit_name(config: ConfigDict) -> str:
    """E.g. 'vit_base_patch16'."""
    return f"vit_{config.model.variant}_patch{config.model.patch_size}"


def make_modules(
    config: ConfigDict, attention: str, start: Backbone | None = None
) -> Modules:
    """Backbone and heads; the architecture is that of `start` when there is one."""
    backbone = make_backbone(config, attention)
    if start is not None:
        own = ("drop_path", "dtype", "attention", "unroll", "remat")
        backbone = start.model.clone(**{k: getattr(backbone, k) for k in own})
    head = DINOHead(dtype=backbone.dtype, **config.head)
    ibot_head = None
    if config.ibot.separate_head:
        ibot_head = head.clone(num_prototypes=config.ibot.num_prototypes)
    return Modules(backbone, head, ibot_head)


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> dict[str, Schedule]:
    """Every scheduled hyper-parameter as a function of the step.

    Raises ValueError when the warm-up does not fit the run.
    """
    o, total = config.optim, config.epochs * steps_per_epoch
    peak = o.base_lr * (config.batch_size / o.reference_batch) ** 0.5
    warm = {"total": total, "warmup": int(o.warmup_epochs * steps_per_epoch)}
    freeze = int(o.freeze_last_layer_epochs * steps_per_epoch)
    t, loss = config.teacher, config.loss
    weights = {
        name: cosine_schedule(loss[name], end, total)
        for name in WEIGHTS
        if (end := loss.get(f"{name}_end")) is not None
    }
    return {
        "lr": cosine_schedule(peak, o.min_lr, **warm),
        "last_layer_lr": cosine_schedule(peak, o.min_lr, freeze=freeze, **warm),
        "weight_decay": cosine_schedule(o.weight_decay, o.weight_decay_end, total),
        "ema_momentum": cosine_schedule(t.momentum, t.momentum_end, total),
        "teacher_temp": linear_schedule(
            t.warmup_temp, t.temp, int(t.warmup_temp_epochs * steps_per_epoch)
        ),
        **weights,
    }


def make_loop(config: ConfigDict) -> LoopSettings:
    """How often the run logs and saves, and what it keeps."""
    return LoopSettings(
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_last=config.keep_checkpoints,
        keep_every=config.keep_every,
        keep_best=config.keep_best,
        max_bad_fraction=config.data.max_bad_fraction,
        restart=config.restart,
    )


def make_feed(config: ConfigDict, patch_size: int, num_devices: int) -> FeedSettings:
    """What the input pipeline is built with; groups are raised for the devices.

    Raises ValueError or UserError when batch, groups and accum_steps do not divide, or
    when nothing would be masked.
    """
    side = config.crops.global_size
    groups = resolve_groups(config.groups, config.batch_size, num_devices)
    if groups % (config.accum_steps * num_devices):
        raise UserError(
            f"{groups} groups on {num_devices} devices cannot be cut into accum_steps "
            f"{config.accum_steps}: groups must be a multiple of their product"
        )
    data, masking = config.data, config.masking
    crops, patches = NUM_GLOBAL * config.batch_size // groups, (side // patch_size) ** 2
    ratio = tuple(masking.ratio)
    if not mask_buffer_length(crops, patches, masking.probability, ratio):
        raise UserError(
            f"masking.probability {masking.probability} and ratio {ratio} mask no "
            f"patch of a group's {crops} crops of {patches} patches"
        )
    return FeedSettings(
        batch_size=config.batch_size,
        groups=groups,
        patch_size=patch_size,
        canvas=data.canvas if data.render == "device" else None,
        mask_probability=masking.probability,
        mask_ratio=ratio,
        mask_style=masking.style,
        seed=config.seed,
        num_workers=data.workers,
        num_threads=data.threads,
        prefetch=data.prefetch,
    )


def make_notes(config: ConfigDict, groups: int) -> tuple[str, ...]:
    """What the user should know and may not have meant."""
    notes = []
    if not config.data.root:
        notes.append(
            "data.root is empty: training on the built-in phantom, not on real images"
        )
    if groups != config.groups:
        notes.append(
            f"groups raised from {config.groups} to {groups} for the devices: masks, "
            f"KoLeo and drop path now work on {config.batch_size // groups} images at "
            "a time"
        )
    return tuple(notes)


def fit_to_device(
    config: ConfigDict,
    modules: Modules,
    crops: CropConfig,
    feed: FeedSettings,
    num_devices: int,
) -> tuple[Modules, str]:
    """The networks with remat and unroll for here, and a line about memory."""

    def need(remat, unroll):
        return step_bytes(
            modules,
            crops,
            feed,
            chunk_rows=config.loss.chunk_rows,
            accum_steps=config.accum_steps,
            devices=num_devices,
            remat=remat,
            unroll=unroll,
        )

    m, depth = config.model, modules.backbone.depth
    remat, unroll, line = choose_remat(
        m.remat, m.unroll, depth, need, device_bytes(), jax.default_backend()
    )
    backbone = modules.backbone.clone(remat=remat, unroll=unroll)
    return dataclasses.replace(modules, backbone=backbone), line


def make_plan(config: ConfigDict, num_devices: int) -> Plan:
    """Build and check everything. Raises UserError or OSError, one line each."""
    check(config, LIMITS, OPTIONAL)
    source = make_source(config)
    crops = make_crops(config)
    start = load_start(config)
    with as_user_error():
        attention, why = choose_attention(
            config.model.attention, DTYPES[config.model.dtype], jax.default_backend()
        )
    modules = make_modules(config, attention, start)
    patch_size, channels = modules.backbone.patch_size, config.data.channels
    for side in (crops.global_size, crops.local_size):
        if side % patch_size:
            raise UserError(
                f"crop size {side} is not divisible by patch size {patch_size}"
            )
    with as_user_error():
        feed = make_feed(config, patch_size, num_devices)
    modules, memory = fit_to_device(config, modules, crops, feed, num_devices)
    mean, std = normalization(config.data.normalization, source, channels)
    steps_per_epoch = config.steps_per_epoch or len(source) // config.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"{len(source)} images do not fill one batch of {config.batch_size}; "
            "set steps_per_epoch"
        )
    with as_user_error():
        schedules = make_schedules(config, steps_per_epoch)
    o, phantom = config.optim, phantom_source(config)
    optimizer = make_optimizer(
        learning_rate=schedules["lr"],
        last_layer_learning_rate=schedules["last_layer_lr"],
        weight_decay=schedules["weight_decay"],
        layerwise_decay=o.layerwise_decay,
        patch_embed_multiplier=o.patch_embed_multiplier,
        freeze_backbone_steps=int(o.freeze_backbone_epochs * steps_per_epoch),
        clip_norm=o.clip_norm,
        b1=o.b1,
        b2=o.b2,
    )
    constants = {k: v for k, v in config.loss.items() if not k.endswith("_end")}
    return Plan(
        name=start.name if start else vit_name(config),
        source=source,
        stream=stream_record(source),
        crops=crops,
        modules=modules,
        objective=Objective(mean, std, **constants),
        optimizer=optimizer,
        schedules=schedules,
        channels=channels,
        dtype=config.model.dtype,
        accum_steps=config.accum_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        flops_per_step=step_flops(modules, crops, feed, channels),
        start=start,
        notes=(
            *make_notes(config, feed.groups),
            f"attention: {attention} ({why})",
            memory,
        ),
        loop=make_loop(config),
        feed=feed,
        nan=NanPolicy(**config.nan),
        health=HealthSettings(phantom=phantom, **config.health),
        facts=Facts(
            warmup=int(o.warmup_epochs * steps_per_epoch),
            dino_weight=config.loss.dino_weight,
            num_prototypes=config.head.num_prototypes,
        ),
        knn=KnnSettings(phantom=phantom, **config.knn),
    )
