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
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ultradino_jax.backbone import Backbone
from ultradino_jax.checkpoint import RunCheckpoints
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.recipe import check_same_run
from ultradino_jax.evaluators.progress import Progress
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
from ultradino_jax.schedules import warmup_linear
from ultradino_jax.sharding import row_sharding
from ultradino_jax.tree import map_with_name

WEIGHT_DECAY = 0.01


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
    train: Pairs,
    val: Pairs,
    classes: tuple[str, ...],
    *,
    seed: int,
    workdir: str | Path,
    split_hash: str,
    steps: int = 20_000,
    warmup_steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 1e-4,
    weight_decay: float = WEIGHT_DECAY,
    drop_path: float = 0.4,
    dice: str = "reference",
    norm: str = "none",
    head_channels: int = 0,
    translation: str = "reference",
    validate_every: int = 450,
    checkpoint_every: int = 4,
    letterbox: bool = False,
    name: str = "segmentation",
) -> tuple[Segmenter, list[dict]]:
    """(the segmenter of the best step, one {'step','loss','val_dice'} per validation).

    drop_path, norm, head_channels (0 for the backbone's D) are UperNet's. letterbox
    says how the pairs were made from images, for those to come.
    The state is kept in `workdir` every `checkpoint_every` validations; running it
    again goes on from there, or returns at once when it had ended. Raises UserError
    when the workdir belongs to another backbone, split or setting, when the warm-up
    is not shorter than the training, or when the loss is not finite.
    """
    if not 0 < warmup_steps < steps:
        raise UserError(
            f"{name}: {warmup_steps} warm-up steps do not fit {steps} steps of training"
        )
    workdir = Path(workdir)
    identity = {
        "backbone": backbone.digest,
        "split": split_hash,
        "settings": [seed, steps, warmup_steps, batch_size, learning_rate, drop_path,
                     dice, norm, head_channels, translation, validate_every,
                     backbone.image_size, _registers(backbone)],
    }  # fmt: skip
    if weight_decay != WEIGHT_DECAY:
        identity["settings"].append(weight_decay)
    if letterbox:
        identity["settings"].append("letterbox")
    if (workdir / "segmenter").is_dir():
        segmenter, record = load_segmenter(workdir)
        check_same_run(record["identity"], identity, workdir, "segmentation")
        return segmenter, record["history"]
    model = segmentation_model(
        backbone, len(classes), norm=norm, head_channels=head_channels
    )
    segmenter = Segmenter(backbone, model, None, tuple(classes), letterbox)
    optimizer = make_optimizer(learning_rate, warmup_steps, steps, weight_decay)
    variables = initial_variables(model, backbone, seed)
    _, everywhere = row_sharding(batch_size)
    state = SegmentationState(variables, optimizer.init(variables["params"]))
    state = jax.device_put(state, everywhere)
    checkpoints = RunCheckpoints(workdir / "checkpoints", keep=1)
    try:
        run = _Run(checkpoints, identity, state)
        run.restore()
        training = model
        if isinstance(backbone, Backbone):
            training = model.clone(backbone=with_drop_path(backbone.model, drop_path))
        batches = pair_batches(
            train,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            start_step=run.step,
            translation=translation,
        )
        step = functools.partial(
            train_step, training, segmenter.preprocess, optimizer, dice
        )
        _train(
            run, batches, step, segmenter, val,
            seed=seed, steps=steps, batch_size=batch_size, name=name,
            validate_every=validate_every, checkpoint_every=checkpoint_every,
        )  # fmt: skip
    finally:
        checkpoints.close()
    best = dataclasses.replace(segmenter, variables=jax.device_get(run.best))
    save_segmenter(workdir / "segmenter", best, identity=identity, history=run.history)
    shutil.rmtree(workdir / "checkpoints")
    return best, run.history


def _registers(backbone) -> int:
    return 0 if isinstance(backbone, Network) else backbone.model.num_registers


def _train(
    run, batches, train_one, segmenter, val, *, seed, steps, batch_size, name,
    validate_every, checkpoint_every,
) -> None:  # fmt: skip
    """Steps, validations and checkpoints until the end; results are in `run`."""
    by_row, _ = row_sharding(batch_size)
    progress = Progress(name, steps, unit="step")
    key = jax.random.key(seed)
    losses = []
    for batch in batches:
        batch = jax.device_put(batch, by_row)
        run.state, terms = train_one(
            run.state, batch, jax.random.fold_in(key, run.step)
        )
        run.step += 1
        losses.append(sum(terms))
        if len(losses) % 10 == 0:  # the host must not run far ahead of the device
            jax.block_until_ready(losses[-1])
        progress.update(run.step)
        if run.step % validate_every and run.step != steps:
            continue
        loss = float(np.mean(jax.device_get(losses)))
        losses = []
        if not np.isfinite(loss):
            raise UserError(f"{name}: the loss is not finite before step {run.step}")
        now = dataclasses.replace(segmenter, variables=run.state.variables)
        run.validated(loss, validation_dice(now, val, batch_size))
        if len(run.history) % checkpoint_every == 0 and run.step != steps:
            run.save()
    progress.close()


class _Run:
    """What a checkpoint of a training holds."""

    def __init__(self, checkpoints, identity, state):
        self.checkpoints, self.identity, self.state = checkpoints, identity, state
        self.best = jax.tree.map(jnp.copy, state.variables)
        self.history: list[dict] = []
        self.step = 0

    def validated(self, loss: float, dice: float) -> None:
        """Note a validation; the first of equals stays the best."""
        if not self.history or dice > max(h["val_dice"] for h in self.history):
            self.best = jax.tree.map(jnp.copy, self.state.variables)
        self.history.append({"step": self.step, "loss": loss, "val_dice": dice})

    def save(self) -> None:
        """Start writing the state as of now."""
        tree = {"state": self.state, "best": self.best}
        meta = {"identity": self.identity, "history": self.history}
        self.checkpoints.save(self.step, tree, meta)
        self.checkpoints.wait()  # the next step donates what is being written

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"state": self.state, "best": self.best},
        )
        restored = self.checkpoints.restore(abstract)
        if restored is None:
            return
        tree, meta = restored
        folder = self.checkpoints.directory
        check_same_run(meta["identity"], self.identity, folder, "segmentation")
        self.state, self.best = tree["state"], tree["best"]
        self.history = list(meta["history"])
        self.step = self.history[-1]["step"]
