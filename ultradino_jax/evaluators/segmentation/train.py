"""Training of a segmentation network, as the paper's left half of Table 1 does it.

UperNet with its backbone, or a supervised network from scratch, on the same batches.
Cross entropy and Dice, AdamW with one rate and a decay of 0.01 for everything (which
is what the reference's optimiser does, whatever its config says), linear warm-up and
decay, joint augmentation; the step of highest validation mean Dice is kept.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ultradino_jax.errors import UserError, as_user_error
from ultradino_jax.evaluators.segmentation.augment import augment_pair
from ultradino_jax.evaluators.segmentation.loss import cross_entropy, dice_loss
from ultradino_jax.evaluators.segmentation.metrics import mean_dice, pixel_counts
from ultradino_jax.evaluators.segmentation.networks import Network
from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    initial_variables,
    load_segmenter,
    save_segmenter,
    segmentation_model,
    with_drop_path,
)
from ultradino_jax.evaluators.training import Job, train
from ultradino_jax.schedules import warmup_linear
from ultradino_jax.sharding import row_sharding
from ultradino_jax.tree import map_with_name
from ultradino_jax.weights.backbone import Backbone

WEIGHT_DECAY = 0.01
METRIC = "val_dice"
FOLDER = "segmenter"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained; by default as the paper does it.

    drop_path, norm, head_channels (0 for the backbone's D) are UperNet's. letterbox
    says how the pairs were made from images, for those to come. validate_every: steps,
    checkpoint_every: validations. Raises UserError when the warm-up is too long.
    """

    steps: int = 20_000
    warmup_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-4
    weight_decay: float = WEIGHT_DECAY
    drop_path: float = 0.4
    dice: str = "reference"
    norm: str = "none"
    head_channels: int = 0
    translation: str = "reference"
    validate_every: int = 450
    checkpoint_every: int = 4
    letterbox: bool = False

    def __post_init__(self):
        if self.warmup_steps >= self.steps:
            raise UserError(
                f"{self.warmup_steps} warm-up steps do not fit {self.steps} steps of "
                "training"
            )


# The order in which settings were recorded before they had names.
LISTED = ("seed", "steps", "warmup_steps", "batch_size", "learning_rate", "drop_path",
          "dice", "norm", "head_channels", "translation", "validate_every",
          "image_size", "registers")  # fmt: skip


def named_settings(listed: list) -> dict[str, Any]:
    """{name: value} of settings that were recorded as a list.

    A weight decay or the word 'letterbox' followed where they were not the default.
    """
    others = [value for value in listed[len(LISTED) :] if value != "letterbox"]
    return {
        **dict(zip(LISTED, listed, strict=False)),
        "weight_decay": others[0] if others else WEIGHT_DECAY,
        "letterbox": "letterbox" in listed[len(LISTED) :],
    }


class Pairs(NamedTuple):
    """Images uint8 [n,S,S,C] and their masks uint8 [n,S,S], of the network's size."""

    images: np.ndarray
    masks: np.ndarray


class SegmentationState(NamedTuple):
    """variables {'params', 'batch_stats'} and the optimiser's state."""

    variables: Any
    opt_state: Any


def pair_batches(
    pairs: Pairs,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    start_step: int = 0,
    translation: str = "reference",
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images [B,S,S,C], masks [B,S,S]) of steps start_step .. steps-1, augmented.

    Shuffled epochs follow one another without a gap, so a batch may hold an image
    several times, differently augmented, where the set is smaller (the reference's
    endless sampler). A step's content depends on (seed, step) alone; threads work two
    batches ahead.
    """
    n = len(pairs.images)

    @functools.lru_cache(maxsize=4)
    def order(epoch):
        return np.random.default_rng([seed, epoch]).permutation(n)

    def prepare(step, slot):
        epoch, place = divmod(step * batch_size + slot, n)
        row = order(epoch)[place]
        rng = np.random.default_rng([seed, step, slot])
        return augment_pair(pairs.images[row], pairs.masks[row], rng, translation)

    ahead = collections.deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for step in range(start_step, steps + 2):
            if step < steps:
                ahead.append(
                    [pool.submit(prepare, step, slot) for slot in range(batch_size)]
                )
            if ahead and (len(ahead) > 2 or step >= steps):
                done = [future.result() for future in ahead.popleft()]
                images, masks = zip(*done, strict=True)
                yield np.stack(images), np.stack(masks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@functools.cache  # one object per setting, so that seeds share a compiled step
def make_optimizer(
    learning_rate: float, warmup: int, steps: int, weight_decay: float = WEIGHT_DECAY
) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8); everything decays but the unused mask token."""

    def decayed(params):
        return map_with_name(lambda name, _: "mask_token" not in name, params)

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_schedule(
            lambda step: (
                -learning_rate * warmup_linear(step, warmup=warmup, total=steps)
            )
        ),
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "preprocess", "optimizer", "dice"),
    donate_argnames=("state",),
)
def train_step(model, preprocess, optimizer, dice, state, batch, key):
    """Images and masks of a batch -> (state, (cross entropy, Dice loss))."""
    images, masks = batch
    x = preprocess.normalise(images)
    streams = dict(zip(("dropout", "drop_path"), jax.random.split(key), strict=True))
    params = state.variables["params"]

    def loss_fn(params):
        logits, new = model.apply(
            {**state.variables, "params": params},
            x,
            train=True,
            rngs=streams,
            mutable=["batch_stats"],
        )
        terms = cross_entropy(logits, masks), dice_loss(logits, masks, dice)
        return sum(terms), (terms, new)

    (_, (terms, new)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    variables = {
        **state.variables,
        **new,
        "params": optax.apply_updates(params, updates),
    }
    return SegmentationState(variables, opt_state), terms


def validation_dice(segmenter: Segmenter, pairs: Pairs, batch_size: int) -> float:
    """Mean Dice over all classes, background included, pixels pooled over the set."""
    predicted = segmenter.predict(pairs.images, batch_size)
    y = len(segmenter.classes)
    counts = [pixel_counts(*p, y) for p in zip(predicted, pairs.masks, strict=True)]
    return float(mean_dice(np.sum(counts, axis=0)))


def train_segmenter(
    backbone: Backbone | Network,
    pairs: Pairs,
    val: Pairs,
    classes: tuple[str, ...],
    recipe: Recipe,
    *,
    seed: int,
    workdir: str | Path,
    split_hash: str,
    name: str = "segmentation",
) -> tuple[Segmenter, list[dict]]:
    """(the segmenter of the best step, one {'step','loss','val_dice'} per validation).

    The state is kept in `workdir` while it trains; running it again goes on from there,
    or returns at once when it had ended. Raises UserError when the workdir belongs to
    another training, or when the loss is not finite.
    """
    steps, batch_size = recipe.steps, recipe.batch_size
    identity = _identity(backbone, split_hash, recipe, seed)
    job = _job(recipe, identity, Path(workdir), name)
    if (job.workdir / FOLDER).is_dir():
        segmenter, record = load_segmenter(job.workdir)
        job.check(record["identity"])
        return segmenter, record["history"]
    with as_user_error():
        model = segmentation_model(
            backbone, len(classes), norm=recipe.norm, head_channels=recipe.head_channels
        )
        variables = initial_variables(model, backbone, seed)
    segmenter = Segmenter(backbone, model, None, tuple(classes), recipe.letterbox)
    optimizer = make_optimizer(
        recipe.learning_rate, recipe.warmup_steps, steps, recipe.weight_decay
    )
    by_row, everywhere = row_sharding(batch_size)
    state = SegmentationState(variables, optimizer.init(variables["params"]))
    if isinstance(backbone, Backbone):
        dropping = with_drop_path(backbone.model, recipe.drop_path)
        model = model.clone(backbone=dropping)
    key = jax.random.key(seed)

    def step(state, batch, k):
        batch, own = jax.device_put(batch, by_row), jax.random.fold_in(key, k)
        state, terms = train_step(
            model, segmenter.preprocess, optimizer, recipe.dice, state, batch, own
        )
        return state, terms[0] + terms[1]

    def batches(k):
        return pair_batches(
            pairs,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            start_step=k,
            translation=recipe.translation,
        )

    def validate(state):
        now = dataclasses.replace(segmenter, variables=state.variables)
        return validation_dice(now, val, batch_size)

    best, history = train(
        job,
        jax.device_put(state, everywhere),
        best_of=lambda state: state.variables,
        step=step,
        batches=batches,
        validate=validate,
    )
    segmenter = dataclasses.replace(segmenter, variables=best)
    facts = {"identity": job.identity, "history": history}
    save_segmenter(job.workdir / FOLDER, segmenter, **facts)
    job.clear()
    return segmenter, history


def _identity(backbone, split_hash, recipe, seed) -> dict:
    settings = {"seed": seed, **dataclasses.asdict(recipe)}
    del settings["checkpoint_every"]  # changes no number
    registers = 0 if isinstance(backbone, Network) else backbone.model.num_registers
    settings |= {"image_size": backbone.image_size, "registers": registers}
    return {"backbone": backbone.digest, "split": split_hash, "settings": settings}


def _job(recipe: Recipe, identity: dict, workdir: Path, name: str) -> Job:
    return Job(
        name=name,
        what="a segmentation",
        workdir=workdir,
        identity=identity,
        named=named_settings,
        metric=METRIC,
        steps=recipe.steps,
        validate_every=recipe.validate_every,
        checkpoint_every=recipe.checkpoint_every,
    )
