"""Which patches of a global crop the student does not see (iBOT masks).

The block style follows the reference's generator (BEiT, arXiv:2106.08254, as used by
iBOT, arXiv:2111.07832) call for call: with the same `random.Random` it gives the same
masks. Rows are global crops; N = grid height x grid width patches.
"""

import itertools
import math
import random
from collections.abc import Callable

import numpy as np

from ultradino_jax.errors import UserError

MIN_BLOCK = 4
_ATTEMPTS = 10
_ASPECT = (0.3, 1 / 0.3)


def block_mask(
    rng: random.Random, grid: tuple[int, int], num_masked: int
) -> np.ndarray:
    """Covers the grid with random rectangles until `num_masked` patches are masked.

    A rectangle may overlap earlier ones; it counts for what it adds, which never
    exceeds what is still wanted. Ten misses in a row end the search, so a few per cent
    of the masks fall short by a patch or two; none has more than `num_masked`.

    Args:
      rng: Python's generator; the order of its calls is part of the behaviour.
      grid: (h, w) in patches. A rectangle's sides are strictly smaller.
      num_masked: wanted number of masked patches.

    Returns:
      bool [h, w].
    """
    height, width = grid
    # The reference's ((S/2 // P) * S) // P of a crop of side S, in grid terms.
    max_block = float(height // 2 * width)
    log_aspect = (math.log(_ASPECT[0]), math.log(_ASPECT[1]))
    mask = np.zeros((height, width), bool)
    missing = num_masked
    while missing > 0:
        added = _add_block(rng, mask, min(missing, max_block), log_aspect)
        if not added:
            break
        missing -= added
    return mask


def _add_block(
    rng: random.Random,
    mask: np.ndarray,
    limit: float,
    log_aspect: tuple[float, float],
) -> int:
    """Masks one more rectangle in place; returns how many patches that added."""
    height, width = mask.shape
    for _ in range(_ATTEMPTS):
        area = rng.uniform(MIN_BLOCK, limit)
        aspect = math.exp(rng.uniform(*log_aspect))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if w >= width or h >= height:
            continue
        top = rng.randint(0, height - h)
        left = rng.randint(0, width - w)
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= limit:
            block[:] = True
            return added
    return 0


def random_mask(
    rng: random.Random, grid: tuple[int, int], num_masked: int
) -> np.ndarray:
    """Masks exactly `num_masked` patches, uniformly without replacement.

    Returns:
      bool [h, w].
    """
    height, width = grid
    mask = np.zeros(height * width, bool)
    mask[rng.sample(range(height * width), num_masked)] = True
    return mask.reshape(height, width)


MASK_STYLES: dict[str, Callable[..., np.ndarray]] = {
    "block": block_mask,
    "random": random_mask,
}


def sample_masks(
    rng: random.Random,
    num_rows: int,
    grid: tuple[int, int],
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    style: str = "block",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the masks of `num_rows` global crops as the reference's collate does.

    k = int(num_rows * probability) rows are masked. `ratio` is cut into k equal
    intervals and row i < k masks a fraction drawn from the i-th one; then all rows are
    shuffled, so that an image may have none, one or all of its global crops masked.

    Args:
      rng: Python's generator.
      num_rows: global crops, crop-major (G * b for one group).
      grid: (h, w) in patches, N = h * w.
      probability: fraction of the rows that are masked.
      ratio: lowest and highest fraction of masked patches in a masked row.
      style: a key of MASK_STYLES.

    Returns:
      masks bool [num_rows, N]; mask_indices int32 [M], positions of the masked patches
      in the flattened [num_rows * N], ascending, padded with 0; mask_weights
      float32 [M], 1 / (masked patches of that row), padded with 0.
      M = mask_buffer_length(num_rows, N, probability, ratio).

    Raises:
      UserError: unknown style, or probability or ratio outside [0, 1].
    """
    if style not in MASK_STYLES:
        raise UserError(f"mask style {style!r} is none of {sorted(MASK_STYLES)}")
    draw = MASK_STYLES[style]
    num_patches = grid[0] * grid[1]
    edges = _ratio_edges(num_rows, probability, ratio)
    rows = []
    for low, high in itertools.pairwise(edges):
        # float32 throughout, as the reference's torch scalars are: the product decides
        # an integer, so one unit in the last place can change a mask.
        fraction = min(low + (high - low) * np.float32(rng.random()), high)
        rows.append(draw(rng, grid, int(num_patches * fraction)))
    rows += [np.zeros(grid, bool)] * (num_rows - len(rows))
    rng.shuffle(rows)
    masks = np.stack(rows).reshape(num_rows, num_patches)

    found = np.flatnonzero(masks)
    per_row = masks.sum(axis=1)
    length = mask_buffer_length(num_rows, num_patches, probability, ratio)
    indices = np.zeros(length, np.int32)
    weights = np.zeros(length, np.float32)
    indices[: found.size] = found
    weights[: found.size] = 1.0 / per_row[found // num_patches]
    return masks, indices, weights


def mask_buffer_length(
    num_rows: int, num_patches: int, probability: float, ratio: tuple[float, float]
) -> int:
    """M: the most patches `sample_masks` can mask, a static shape (0 if none).

    The sum over masked rows of int(N * upper edge of that row's interval), the
    reference's `upperbound`.

    Raises:
      UserError: probability or ratio outside [0, 1].
    """
    edges = _ratio_edges(num_rows, probability, ratio)
    return sum(int(num_patches * edge) for edge in edges[1:])


def _ratio_edges(
    num_rows: int, probability: float, ratio: tuple[float, float]
) -> np.ndarray:
    if not 0 <= probability <= 1 or not 0 <= ratio[0] <= ratio[1] <= 1:
        raise UserError(
            f"mask probability {probability} and ratio {tuple(ratio)} must lie in "
            "[0, 1], the ratio in ascending order"
        )
    return np.linspace(*ratio, int(num_rows * probability) + 1, dtype=np.float32)
