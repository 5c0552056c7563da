"""Frozen features of a backbone: the same preprocessing for train, val and test."""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ultradino_jax.errors import UserError
from ultradino_jax.progress import Progress
from ultradino_jax.sharding import row_sharding
from ultradino_jax.weights.backbone import Backbone


class _Input(Protocol):
    """What a backbone or a network says of its images."""

    @property
    def image_size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


@runtime_checkable
class Numbered(Protocol):
    """Images by number, as a data set gives them: uint8 [H,W] or [H,W,C]."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Preprocess:
    """What turns an image into one backbone's input; there is one per backbone.

    image_size: side S in pixels; channels: C; mean, std: per channel, [0,1] scale.
    antialias: average when shrinking. The reference does not, though its pretraining
    crops are averaged: at a factor of 3 and more the two look quite different.
    letterbox: keep the aspect, black around the image, instead of stretching it.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    antialias: bool = False
    letterbox: bool = False

    @classmethod
    def of(
        cls, backbone: _Input, *, antialias: bool = False, letterbox: bool = False
    ) -> "Preprocess":
        """The preprocessing that the backbone carries."""
        b = backbone
        return cls(b.image_size, b.channels, b.mean, b.std, antialias, letterbox)

    def box(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(top, left, height, width) in the square of an image of `shape` [H,W,..].

        Stretched it fills the square. In a letterbox its longer side does, the shorter
        one is rounded to whole pixels and centred.
        """
        side, (height, width) = self.image_size, shape[:2]
        if not self.letterbox:
            return 0, 0, side, side
        longest = max(height, width)
        h, w = (max(round(side * n / longest), 1) for n in (height, width))
        return (side - h) // 2, (side - w) // 2, h, w

    def resize(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W] or [H,W,c] of any size -> uint8 [S,S,C].

        Bilinear, as the reference's albumentations `Resize` (OpenCV), which stretches;
        with `antialias`, the mean over each pixel's area instead where both sides
        shrink. A colour image becomes grey for a one-channel backbone (ITU-R 601, alpha
        ignored); grey is replicated. Raises UserError for another type or channel
        count.
        """
        image = to_channels(image, self.channels)
        y, x, h, w = self.box(image.shape)
        area = self.antialias and image.shape[0] >= h and image.shape[1] >= w
        how = cv2.INTER_AREA if area else cv2.INTER_LINEAR
        resized = cv2.resize(image, (w, h), interpolation=how)
        resized = resized.reshape(h, w, self.channels)
        side = self.image_size
        if (h, w) == (side, side):
            return resized
        square = np.zeros((side, side, self.channels), np.uint8)
        square[y : y + h, x : x + w] = resized
        return square

    def normalise(self, images):
        """uint8 [..,C] -> float32 (x/255 - mean) / std; NumPy or under jit."""
        xp = jnp if isinstance(images, jax.Array) else np
        mean, std = (xp.asarray(v, xp.float32) for v in (self.mean, self.std))
        return (images.astype(xp.float32) / 255 - mean) / std


def to_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [H,W] or [H,W,1|3|4] -> uint8 [H,W,channels], channels 1 or 3."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise UserError(
            f"an image must be uint8 [H,W] or [H,W,C], got {image.dtype} "
            f"{list(image.shape)}"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    have = image.shape[2]
    if have not in (1, 3, 4):
        raise UserError(f"an image must have 1, 3 or 4 channels, got {have}")
    if have == 4:
        image, have = image[:, :, :3], 3
    if have == 3 and channels == 1:
        grey = Image.fromarray(np.ascontiguousarray(image)).convert("L")
        return np.asarray(grey)[:, :, None]
    return np.repeat(image, channels, axis=2) if have < channels else image


@dataclass(frozen=True)
class Features:
    """Features of n images, final-normed.

    cls: float32 [n, num_layers, D], CLS tokens of the last blocks, oldest first;
    mean_patch: float32 [n, D], mean of the last block's patch tokens (no registers).
    """

    cls: np.ndarray
    mean_patch: np.ndarray

    def __len__(self) -> int:
        return len(self.cls)

    def __getitem__(self, rows) -> "Features":
        return Features(self.cls[rows], self.mean_patch[rows])

    def assemble(self, num_layers: int, avgpool: bool) -> np.ndarray:
        """The linear probe's input [n, num_layers*D (+ D)].

        CLS of the last `num_layers` blocks, oldest first, then the mean patch token.
        Source: DINOv2 `eval/linear.py` create_linear_input.
        """
        if num_layers > self.cls.shape[1]:
            raise UserError(
                f"features hold {self.cls.shape[1]} blocks, {num_layers} were asked for"
            )
        x = self.cls[:, -num_layers:].reshape(len(self), -1)
        return np.concatenate([x, self.mean_patch], axis=1) if avgpool else x


def probe_tokens(model, params, images, num_layers: int):
    """Normalised images [B,S,S,C] -> (CLS [B,num_layers,D], mean patch token [B,D]).

    THE features of a probe, for scoring, keeping and exporting. The last of the class
    tokens is the model's own `cls_token`, however many are asked for: that of USFM is
    not the token at that place.
    """
    layers = range(-num_layers, -1) if num_layers > 1 else None
    out = model.apply({"params": params}, images, layers=layers)
    cls = out.cls_token[:, None]
    if num_layers > 1:
        cls = jnp.concatenate([jnp.swapaxes(out.layers[:, :, 0], 0, 1), cls], axis=1)
    return cls.astype(jnp.float32), out.patch_tokens.astype(jnp.float32).mean(axis=1)


@functools.partial(jax.jit, static_argnames=("model", "preprocess", "num_layers"))
def _forward(model, params, images, preprocess, num_layers):
    return probe_tokens(model, params, preprocess.normalise(images), num_layers)


def extract_features(
    backbone: Backbone,
    images: Iterable[np.ndarray] | Numbered,
    *,
    num_layers: int = 1,
    batch_size: int = 64,
    preprocess: Preprocess | None = None,
    name: str = "features",
) -> Features:
    """Features of the last `num_layers` blocks, in float32 whatever the model's dtype.

    images: uint8 [H,W] or [H,W,C], any size; a sequence is read by several threads.
    preprocess: by default what the backbone carries.
    Batches have one shape (the last is padded) and are split over the local devices
    when they divide it. Progress is reported under `name` when it takes longer.
    Raises UserError when there is no image, or naming the first image whose features
    are not finite.
    """
    preprocess = preprocess or Preprocess.of(backbone)
    model = backbone.model.clone(dtype=jnp.float32)
    by_row, everywhere = row_sharding(batch_size)
    params = jax.device_put(backbone.params, everywhere)
    total = len(images) if isinstance(images, Sized) else None
    progress = Progress(name, total, unit="img")
    outputs, count, pending = [], 0, None
    for batch, valid in image_batches(preprocess, images, batch_size):
        batch = jax.device_put(batch, by_row)
        result = _forward(model, params, batch, preprocess, num_layers)
        if pending is not None:  # fetch the last batch while this one is computed
            outputs.append(jax.device_get(pending))
        pending = result
        count += valid
        progress.update(count)
    if pending is None:
        raise UserError(f"{name}: there is no image to extract features from")
    outputs.append(jax.device_get(pending))
    progress.close()
    cls, mean_patch = (
        np.concatenate(part)[:count] for part in zip(*outputs, strict=True)
    )
    finite = np.isfinite(cls).all(axis=(1, 2)) & np.isfinite(mean_patch).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{name}: features of {int((~finite).sum())} of {count} images are not "
            f"finite, first at image {int(np.argmin(finite))}; the parameters of "
            f"{backbone.name!r} are damaged or overflow"
        )
    return Features(cls, mean_patch)


def image_batches(
    preprocess: Preprocess, images: Iterable[np.ndarray] | Numbered, batch_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """(uint8 [B,S,S,C], number of real rows); the last is padded with its last row."""
    numbered = images if isinstance(images, Numbered) else None
    items: Iterator[Any] = iter(images if numbered is None else range(len(numbered)))

    def prepare(item):
        image = item if numbered is None else numbered[item]
        return preprocess.resize(np.asarray(image))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(items, batch_size)):
            rows = list(pool.map(prepare, chunk))
            rows += rows[-1:] * (batch_size - len(rows))
            yield np.stack(rows), len(chunk)
