"""Multi-crop augmentation: decisions first, pixels second (host renderer).

`sample_crops` turns a numpy Generator into plain numbers, `render_crops` turns those
into pixels with the reference's semantics: Pillow bicubic with antialiasing, blends
that truncate to 8 bits, a blur that rounds. A renderer on the device can consume the
same decisions. Crops are ordered global first: index 0 and 1 are the two global crops
(G = 2), the rest the L local ones.
"""

from dataclasses import dataclass, fields

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from ultradino_jax.errors import UserError

NUM_GLOBAL = 2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the values of CropDecisions.order
_ATTEMPTS = 10
_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True)
class CropConfig:
    """The multi-crop recipe; the defaults are the reference's ultrasound pipeline.

    Scales are area fractions, `ratio` bounds width / height. `brightness`, `contrast`
    and `saturation` draw factors from 1 +- value, `hue` a shift of the hue circle from
    +- value. The triples hold effective probabilities for the first global, the second
    global and every local crop: the reference's GaussianBlur(p) blurs with probability
    1 - p, so its 1.0, 0.1, 0.5 act as the 0.0, 0.9, 0.5 given here.

    Raises:
      UserError: a probability outside [0, 1], a range that is not ascending, an even
        blur kernel, or a crop too small for the kernel's reflected border.
    """

    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    vertical_flip_prob: float = 0.5
    horizontal_flip_prob: float = 0.0
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.0
    grayscale_prob: float = 0.0
    blur_probs: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize_probs: tuple[float, float, float] = (0.0, 0.2, 0.0)
    solarize_threshold: int = 128

    def __post_init__(self):
        for item in fields(self):
            value = getattr(self, item.name)
            if "prob" in item.name and not all(0 <= p <= 1 for p in np.ravel(value)):
                raise UserError(f"crops: {item.name} = {value} is outside [0, 1]")
        for name in ("global_scale", "local_scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"crops: {name} = {(low, high)} is not ascending")
        if self.blur_kernel % 2 == 0 or self.num_local < 0:
            raise UserError(
                f"crops: blur_kernel = {self.blur_kernel} must be odd and num_local = "
                f"{self.num_local} not negative"
            )
        if min(self.global_size, self.local_size) <= self.blur_kernel // 2:
            raise UserError(
                f"crops: sizes {self.global_size} and {self.local_size} must exceed "
                f"half the blur kernel ({self.blur_kernel})"
            )

    @classmethod
    def ultrasound(cls, **changes) -> "CropConfig":
        """The reference's FUS pipeline (one channel: saturation has no effect)."""
        return cls(**changes)

    @classmethod
    def imagenet(cls, **changes) -> "CropConfig":
        """The pipeline of DINOv2 (arXiv:2304.07193) for natural images."""
        recipe = {
            "vertical_flip_prob": 0.0,
            "horizontal_flip_prob": 0.5,
            "hue": 0.1,
            "grayscale_prob": 0.2,
        }
        return cls(**{**recipe, **changes})


@dataclass(frozen=True)
class CropDecisions:
    """All that is random about the crops of one image; arrays over G + L crops.

    A neutral value means "leave it": factor 1, hue 0, sigma 0, False.
    """

    boxes: np.ndarray  # int32 [G+L, 4]: top, left, height, width in pixels
    vertical_flip: np.ndarray  # bool [G+L]
    horizontal_flip: np.ndarray  # bool [G+L]
    order: np.ndarray  # int32 [G+L, 4]: BRIGHTNESS .. HUE as applied
    brightness: np.ndarray  # float32 [G+L]
    contrast: np.ndarray  # float32 [G+L]
    saturation: np.ndarray  # float32 [G+L]
    hue: np.ndarray  # float32 [G+L], in turns
    grayscale: np.ndarray  # bool [G+L]
    blur_sigma: np.ndarray  # float32 [G+L], in output pixels
    solarize: np.ndarray  # bool [G+L]


def sample_crops(
    rng: np.random.Generator, height: int, width: int, config: CropConfig
) -> CropDecisions:
    """Draws the decisions for one image of `height` x `width` pixels.

    Every crop draws independently. The number of draws depends only on G + L, so a
    changed probability changes no other decision.
    """
    count = NUM_GLOBAL + config.num_local
    kind = np.minimum(np.arange(count), NUM_GLOBAL)  # 0, 1, then 2 for every local
    scale = np.where(kind[:, None] < 2, config.global_scale, config.local_scale)
    boxes = _sample_boxes(rng, height, width, scale, config.ratio)
    order = rng.permuted(np.tile(np.arange(4, dtype=np.int32), (count, 1)), axis=1)
    coin = rng.random((6, count))
    jitter = coin[2] < config.jitter_prob
    spread = np.array(
        [config.brightness, config.contrast, config.saturation, config.hue]
    )
    low = np.maximum(1 - spread, 0)
    low[HUE] = 1 - config.hue
    draw = low[:, None] + (1 + spread - low)[:, None] * rng.random((4, count))
    factor = np.where(jitter, draw, 1.0).astype(np.float32)
    sigma = rng.uniform(*config.blur_sigma, count)
    blur = coin[4] < np.array(config.blur_probs)[kind]
    return CropDecisions(
        boxes=boxes,
        vertical_flip=coin[0] < config.vertical_flip_prob,
        horizontal_flip=coin[1] < config.horizontal_flip_prob,
        order=order,
        brightness=factor[BRIGHTNESS],
        contrast=factor[CONTRAST],
        saturation=factor[SATURATION],
        hue=np.where(jitter, draw[HUE] - 1, 0.0).astype(np.float32),
        grayscale=coin[3] < config.grayscale_prob,
        blur_sigma=np.where(blur, sigma, 0.0).astype(np.float32),
        solarize=coin[5] < np.array(config.solarize_probs)[kind],
    )


def render_crops(
    image: np.ndarray, decisions: CropDecisions, config: CropConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Renders the decided crops of one image on the host.

    Per crop: cut the box, resize, flip, jitter in the drawn order, grayscale, blur,
    solarize; every step ends in 8 bits. Saturation, hue and grayscale leave one-channel
    images alone.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      decisions: of `sample_crops` for this height and width.
      config: the same configuration.

    Returns:
      global_crops uint8 [G, S, S, C] and local_crops uint8 [L, s, s, C].
    """
    large, small = config.global_size, config.local_size
    channels = image.shape[2]
    global_crops = np.empty((NUM_GLOBAL, large, large, channels), np.uint8)
    local_crops = np.empty((config.num_local, small, small, channels), np.uint8)
    for k, out in enumerate([*global_crops, *local_crops]):
        crop = resized_crop(image, decisions.boxes[k], out.shape[0])
        if decisions.vertical_flip[k]:
            crop = crop[::-1]
        if decisions.horizontal_flip[k]:
            crop = crop[:, ::-1]
        crop = np.ascontiguousarray(crop)
        if channels == 1:
            crop = _jitter_grey(crop, decisions, k)
        else:
            crop = _jitter_colour(crop, decisions, k)
        if decisions.blur_sigma[k] > 0:
            crop = _blur(crop, decisions.blur_sigma[k], config.blur_kernel)
        if decisions.solarize[k]:
            crop = np.where(crop < config.solarize_threshold, crop, 255 - crop)
        out[...] = crop.reshape(out.shape)
    return global_crops, local_crops


def resized_crop(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Cuts a box and resizes it to a square with Pillow's antialiased bicubic.

    Cutting comes first, so the filter does not see pixels outside the box. The resize
    runs as two calls, horizontal then vertical: Pillow up to 12 uses that order itself,
    Pillow 13 swaps it for some boxes, which moves pixels by up to 11 grey levels.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      box: top, left, height, width in pixels.
      size: output side in pixels.

    Returns:
      uint8 [size, size, C].
    """
    top, left, height, width = (int(value) for value in box)
    pixels = image[top : top + height, left : left + width]
    crop = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    crop = crop.resize((size, height), Image.Resampling.BICUBIC)
    crop = crop.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(crop).reshape(size, size, image.shape[2])


def _sample_boxes(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: np.ndarray,
    ratio: tuple[float, float],
) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params for every row of `scale` [n, 2].

    The first of ten drawn boxes that fits is taken; if none does, the largest centred
    box whose aspect is allowed. Returns int32 [n, 4]: top, left, height, width.
    """
    count = len(scale)
    area = rng.uniform(scale[:, :1], scale[:, 1:], (count, _ATTEMPTS)) * height * width
    low, high = np.log(ratio)
    aspect = np.exp(rng.uniform(low, high, (count, _ATTEMPTS)))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int32)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int32)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)
    rows = np.arange(count)
    h, w = h[rows, first], w[rows, first]
    corner = rng.random((2, count))
    top = (corner[0] * (height - h + 1)).astype(np.int32)
    left = (corner[1] * (width - w + 1)).astype(np.int32)
    boxes = np.stack([top, left, h, w], axis=1)

    if not fits.any(axis=1).all():
        h_in, w_in = height, width
        if width / height < ratio[0]:
            h_in = round(width / ratio[0])
        elif width / height > ratio[1]:
            w_in = round(height * ratio[1])
        centred = [(height - h_in) // 2, (width - w_in) // 2, h_in, w_in]
        boxes[~fits.any(axis=1)] = centred
    return boxes


def _jitter_grey(crop: np.ndarray, decisions: CropDecisions, k: int) -> np.ndarray:
    """Brightness and contrast as grey-level tables; uint8 [S, S, 1]."""
    for operation in decisions.order[k]:
        if operation == BRIGHTNESS and decisions.brightness[k] != 1:
            crop = cv2.LUT(crop, _blend_table(0, decisions.brightness[k]))
        elif operation == CONTRAST and decisions.contrast[k] != 1:
            mean = int(cv2.sumElems(crop)[0] / crop.size + 0.5)
            crop = cv2.LUT(crop, _blend_table(mean, decisions.contrast[k]))
    return crop


def _blend_table(base: int, factor: np.float32) -> np.ndarray:
    """Pillow's Image.blend of every grey level v with a constant; uint8 [256].

    base + factor * (v - base) in float32, clipped, truncated.
    """
    blended = factor * (_LEVELS - base) + base
    return np.clip(blended, 0, 255).astype(np.uint8)


def _jitter_colour(crop: np.ndarray, decisions: CropDecisions, k: int) -> np.ndarray:
    """torchvision's ColorJitter and grayscale on Pillow images; uint8 [S, S, 3]."""
    image = Image.fromarray(crop)
    for operation in decisions.order[k]:
        if operation == BRIGHTNESS and decisions.brightness[k] != 1:
            image = ImageEnhance.Brightness(image).enhance(decisions.brightness[k])
        elif operation == CONTRAST and decisions.contrast[k] != 1:
            image = ImageEnhance.Contrast(image).enhance(decisions.contrast[k])
        elif operation == SATURATION and decisions.saturation[k] != 1:
            image = ImageEnhance.Color(image).enhance(decisions.saturation[k])
        elif operation == HUE and decisions.hue[k] != 0:
            hue, saturation, value = image.convert("HSV").split()
            # The hue circle has 256 steps; adding in 8 bits wraps around.
            shifted = np.asarray(hue) + np.uint8(int(decisions.hue[k] * 255) % 256)
            bands = (Image.fromarray(shifted), saturation, value)
            image = Image.merge("HSV", bands).convert("RGB")
    if decisions.grayscale[k]:
        image = image.convert("L").convert("RGB")
    return np.asarray(image)


def _blur(crop: np.ndarray, sigma: float, kernel_size: int) -> np.ndarray:
    """Gaussian over `kernel_size` taps, mirrored border, rounded once at the end."""
    reach = kernel_size // 2
    taps = np.arange(-reach, reach + 1, dtype=np.float32)
    kernel = np.exp(-0.5 * (taps / np.float32(sigma)) ** 2)
    kernel /= kernel.sum()
    # A float target: with an 8-bit one OpenCV would quantise the kernel to 1/256.
    smooth = cv2.sepFilter2D(
        crop, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT_101
    )
    return cv2.convertScaleAbs(smooth)
