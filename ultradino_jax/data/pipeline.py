"""The pretraining input pipeline: steps in, batches of crops and masks out.

The stream is a pure function of (seed, step). A batch is built from its step number
alone, so resuming means starting at another step; there is no iterator state to save,
and the number of workers, threads or processes changes nothing.

The B images of a step form W groups of b = B / W, the counterpart of one GPU's batch in
the reference: masks are drawn per group, and what the loss compares within a batch it
compares within a group. Record j of step t is position q = t B + j of an endless
sequence: pass q // n over the n records, each pass in its own order. An unreadable
record is replaced by one from elsewhere in the same pass.

A batch is a dict of arrays, W being the groups of this process, G = 2 and L global and
local crops, N patches of a global crop, M = mask_buffer_length(G b, N):
  global_crops uint8 [W, G, b, S, S, C]; local_crops uint8 [W, L, b, s, s, C];
  masks bool [W, G, b, N];
  mask_indices int32 [W, M], into the group's flattened G b N patches, padded with 0;
  mask_weights float32 [W, M], 1 / (masked patches of that crop), padded with 0;
  index int64 [W, b], the source records the images are from;
  bad int64 [W, b, MAX_BAD], the records that were unreadable there, padded with -1.
Where the crops are rendered on the device, their place is taken by what that needs:
  canvas uint8 [W, b, Q, Q, C], see `canvas`; boxes float32 [W, b, G + L, 4] and the
  other fields of CropDecisions, each [W, b, G + L, ..].
"""

import random

import grain
import numpy as np
from absl import flags

from ultradino_jax.data.canvas import place_on_canvas
from ultradino_jax.data.crops import NUM_GLOBAL, CropConfig, render_crops, sample_crops
from ultradino_jax.data.masking import sample_masks
from ultradino_jax.data.sources import BadImage
from ultradino_jax.errors import UserError

MAX_BAD = 4
CROPS = ("global_crops", "local_crops")


def build_pipeline(
    source,
    crops: CropConfig,
    *,
    batch_size: int,
    groups: int,
    patch_size: int,
    canvas: int | None = None,
    mask_probability: float = 0.5,
    mask_ratio: tuple[float, float] = (0.1, 0.5),
    mask_style: str = "block",
    seed: int = 0,
    start_step: int = 0,
    num_steps: int,
    num_workers: int = 0,
    num_threads: int = 1,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over the batches of steps start_step .. start_step + num_steps - 1.

    Process p of P gets groups p W/P .. (p+1) W/P of every step. The batches and the
    order of the records are described at the top of this module.

    Args:
      source: see `sources`; pickled to the workers if there are any.
      crops: the multi-crop recipe.
      batch_size: B, images per step over all processes.
      groups: W over all processes.
      patch_size: P of the backbone.
      canvas: Q, to leave the rendering to the device; None renders here.
      mask_probability: fraction of the global crops of a group that are masked.
      mask_ratio: lowest and highest fraction of masked patches in such a crop.
      mask_style: "block" or "random".
      seed: of order, crops and masks; another seed is another stream.
      start_step: first step, 0 unless resuming.
      num_steps: how many batches to yield.
      num_workers: spawned processes; 0 keeps the work in threads of this one.
      num_threads: batches under construction at once, in each worker if there are any;
        0 builds a batch when it is asked for.
      prefetch: finished batches to hold, in each worker if there are any.
      process_index: p.
      process_count: P.

    Returns:
      An iterator with `close()`, which stops its workers and threads.

    Raises:
      UserError: B does not divide into groups, groups into processes, a crop into
        patches, or a value is out of range.
      RuntimeError: while iterating, if MAX_BAD + 1 records in a row are unreadable.
    """
    _check_division("batch_size", batch_size, "groups", groups)
    _check_division("groups", groups, "process_count", process_count)
    _check_crops(crops, patch_size, canvas)
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} of {process_count} processes")
    _check_not_negative(seed=seed, start_step=start_step, num_steps=num_steps)
    local_groups = groups // process_count
    side = crops.global_size // patch_size
    first_group = process_index * local_groups
    load = _BatchLoader(
        source,
        crops,
        batch_size=batch_size,
        group_size=batch_size // groups,
        groups=range(first_group, first_group + local_groups),
        grid=(side, side),
        canvas=canvas,
        masking={
            "probability": mask_probability,
            "ratio": tuple(mask_ratio),
            "style": mask_style,
        },
        seed=seed,
    )
    load.masks(start_step)  # a wrong mask setting fails here, not in a worker
    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    return _iterate(steps.map(load), num_workers, num_threads, prefetch)


def _iterate(
    batches: grain.MapDataset, num_workers: int, num_threads: int, prefetch: int
) -> grain.DatasetIterator:
    _check_not_negative(
        num_workers=num_workers, num_threads=num_threads, prefetch=prefetch
    )
    buffered = max(prefetch, num_threads) if num_threads else 0
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads, buffered))
    if num_workers:
        # Grain's workers read absl flags, which nobody parses in pytest or a notebook.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers, per_worker_buffer_size=max(prefetch, 1)
            )
        )
    return iter(dataset)


class _BatchLoader:
    """Maps a step number to this process's part of that step's batch."""

    def __init__(
        self,
        source,
        crops: CropConfig,
        *,
        batch_size: int,
        group_size: int,
        groups: range,
        grid: tuple[int, int],
        canvas: int | None,
        masking: dict,
        seed: int,
    ):
        self.source = source
        self.crops = crops
        self.batch_size = batch_size
        self.group_size = group_size
        self.groups = groups
        self.grid = grid
        self.canvas = canvas
        self.masking = masking
        self.seed = seed
        # Grain adds the pass number to the seed of a shuffle; hashing keeps pass 1 of
        # seed 0 from being pass 0 of seed 1.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        W, b = len(self.groups), self.group_size
        batch = {
            "index": np.empty((W, b), np.int64),
            "bad": np.full((W, b, MAX_BAD), -1, np.int64),
        }
        for w, group in enumerate(self.groups):
            for j in range(b):
                position = step * self.batch_size + group * b + j
                image, index, bad = self._read(position)
                rng = np.random.default_rng([self.seed, position])
                height, width = image.shape[:2]
                decisions = sample_crops(rng, height, width, self.crops)
                if self.canvas:
                    parts = place_on_canvas(image, decisions, self.canvas)
                    where = (w, j)
                else:
                    views = render_crops(image, decisions, self.crops)
                    parts = dict(zip(CROPS, views, strict=True))
                    where = (w, slice(None), j)
                for name, part in parts.items():
                    if name not in batch:  # C is known once an image is read
                        shape = (W, b, *part.shape)
                        if name in CROPS:
                            shape = (W, part.shape[0], b, *part.shape[1:])
                        batch[name] = np.empty(shape, part.dtype)
                    batch[name][where] = part
                batch["index"][w, j] = index
                batch["bad"][w, j, : len(bad)] = bad
        return batch | self.masks(step)

    def _read(self, position: int) -> tuple[np.ndarray, int, list[int]]:
        """The image at a position, its record, and the bad records tried before it."""
        count = len(self.source)
        done, place = divmod(position, count)
        # Far apart in the pass: the stand-in is rarely in the same batch, and the five
        # candidates are five records whenever there are as many.
        stride = max(1, count // (MAX_BAD + 1))
        bad, reasons = [], []
        for attempt in range(MAX_BAD + 1):
            shifted = done * count + (place + attempt * stride) % count
            index = self.order[shifted]
            assert index is not None  # a shuffle leaves no record out
            index = int(index)
            try:
                return self.source[index], index, bad
            except BadImage as error:
                bad.append(index)
                reasons.append(f"{self.source.record_id(index)} ({error.reason})")
        raise RuntimeError(
            f"{len(bad)} unreadable images in a row at position {position}: "
            + ", ".join(dict.fromkeys(reasons))
        )

    def masks(self, step: int) -> dict[str, np.ndarray]:
        """masks, mask_indices and mask_weights of a step."""
        rows = NUM_GLOBAL * self.group_size
        drawn = [
            sample_masks(
                random.Random(f"masks/{self.seed}/{step}/{group}"),
                rows,
                self.grid,
                **self.masking,
            )
            for group in self.groups
        ]
        masks, indices, weights = (
            np.stack(arrays) for arrays in zip(*drawn, strict=True)
        )
        return {
            "masks": masks.reshape(len(drawn), NUM_GLOBAL, self.group_size, -1),
            "mask_indices": indices,
            "mask_weights": weights,
        }


def _check_division(what: str, number: int, by: str, divisor: int) -> None:
    if divisor < 1 or number < 1 or number % divisor:
        raise UserError(f"{what} {number} is not divisible by {by} {divisor}")


def _check_crops(crops: CropConfig, patch_size: int, canvas: int | None) -> None:
    _check_division("global crop size", crops.global_size, "patch_size", patch_size)
    if crops.num_local:
        _check_division("local crop size", crops.local_size, "patch_size", patch_size)
    if canvas is not None and canvas < crops.global_size:
        raise UserError(
            f"a canvas of {canvas} pixels is smaller than a global crop of "
            f"{crops.global_size}"
        )


def _check_not_negative(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise UserError(f"{name} must not be negative, got {value}")
