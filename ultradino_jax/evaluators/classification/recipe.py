"""What the reference's linear probe and fine-tuning share: schedule and batches."""

import collections
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ultradino_jax.data.datasets.labelled import LabelledImages
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.augment import augment
from ultradino_jax.evaluators.classification.mixup import Mix, draw_mix, no_mix
from ultradino_jax.evaluators.features import Preprocess, to_channels
from ultradino_jax.schedules import warmup_cosine


class Plan:
    """Batch size and step counts for n images.

    The batch is even (a mixed batch meets its reverse) and never larger than the set.
    The last partial batch is dropped, yet the schedule counts it: the reference
    computes 46 steps per epoch of which 45 exist, so its factor ends just above 0.
    Raises UserError when n < 2.
    """

    def __init__(self, n: int, *, batch_size: int, epochs: int, warmup_epochs: int):
        if n < 2:
            raise UserError(f"training needs at least 2 images, there is {n}")
        self.batch_size = min(batch_size, n) // 2 * 2
        self.steps_per_epoch = n // self.batch_size
        self.steps = epochs * self.steps_per_epoch
        counted = -(-n // self.batch_size)
        self.warmup, self.total = warmup_epochs * counted, epochs * counted

    def factor(self, step):
        """Learning-rate factor of a step."""
        return warmup_cosine(step, self.warmup, self.total)


def epoch_order(n: int, plan: Plan, seed: int, epoch: int) -> np.ndarray:
    """int64 [steps_per_epoch, batch_size]: the shuffled rows of an epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    used = plan.steps_per_epoch * plan.batch_size
    return order[:used].reshape(plan.steps_per_epoch, plan.batch_size)


def train_batches(
    data: LabelledImages,
    preprocess: Preprocess,
    plan: Plan,
    *,
    seed: int,
    start_step: int = 0,
    mixed: bool = True,
) -> Iterator[tuple[np.ndarray, np.ndarray, Mix]]:
    """(images uint8 [B,S,S,C], labels [B], mix) of steps start_step, .., steps-1.

    Images are augmented at their own resolution, then resized; threads work two
    batches ahead. A step's content depends on (seed, step) alone.
    """

    def prepare(index, epoch):
        image = to_channels(data[index], preprocess.channels)
        image = image[:, :, 0] if preprocess.channels == 1 else image
        rng = np.random.default_rng([seed, epoch, index])
        return preprocess.resize(augment(image, rng))

    def rows_of(step):
        epoch, within = divmod(step, plan.steps_per_epoch)
        return epoch, epoch_order(len(data), plan, seed, epoch)[within]

    side = preprocess.image_size
    pool = ThreadPoolExecutor(os.cpu_count())
    ahead = collections.deque()
    try:
        for step in range(start_step, plan.steps + 2):
            if step < plan.steps:
                epoch, rows = rows_of(step)
                images = [pool.submit(prepare, int(i), epoch) for i in rows]
                ahead.append((step, rows, images))
            if ahead and ahead[0][0] <= step - 2:
                ready, rows, images = ahead.popleft()
                rng = np.random.RandomState([seed, ready])
                mix = draw_mix(rng, side, side) if mixed else no_mix()
                yield np.stack([f.result() for f in images]), data.labels[rows], mix
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
