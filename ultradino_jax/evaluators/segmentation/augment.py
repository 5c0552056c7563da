"""Training augmentation of the segmentation evaluations, image and mask together.

Operations, order and ranges are the reference's (albumentations 1.3.1), on uint8
images [H,W,C] and index masks [H,W] of the network's size. What comes from outside the
picture is black and background.
"""

import cv2
import numpy as np

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.classification.augment import (
    GRID_CELLS,
    add_noise,
    brightness_contrast,
    gamma,
    grid_axis,
)

TRANSLATE = 0.2
TRANSLATIONS = ("reference", "symmetric")


def affine_matrix(
    shape: tuple[int, int],
    *,
    scale: float,
    rotate: float,
    shear_x: float,
    shear_y: float,
    translate_x: float,
    translate_y: float,
) -> np.ndarray:
    """3x3 matrix from source to destination pixel centres, about the image centre.

    shape: (H, W); angles in degrees, translations as shares of W and H. M = T(c) A Sy
    T(-c) with every angle negated, as albumentations' Affine hands them to
    scikit-image (0.21 and later).
    """
    height, width = shape
    theta, kx, ky = (-np.deg2rad(v) for v in (rotate, shear_x, shear_y))
    centre = np.array([width / 2 - 0.5, height / 2 - 0.5])
    sin, cos = np.sin(theta), np.cos(theta)
    a = np.array(
        [
            [
                scale * cos,
                -scale * (np.tan(kx) * cos + sin),
                translate_x * width,
            ],
            [
                scale * sin,
                -scale * (np.tan(kx) * sin - cos),
                translate_y * height,
            ],
            [0, 0, 1],
        ]
    )
    shear = np.array([[1, 0, 0], [np.tan(ky), 1, 0], [0, 0, 1]])
    to_centre, back = np.eye(3), np.eye(3)
    to_centre[:2, 2], back[:2, 2] = -centre, centre
    return back @ a @ shear @ to_centre


def affine(image: np.ndarray, mask: np.ndarray, matrix: np.ndarray):
    """(image bilinear, mask nearest) moved by the matrix."""
    size = mask.shape[::-1]
    moved = cv2.warpAffine(image, matrix[:2], size, flags=cv2.INTER_LINEAR)
    return _same_axes(moved, image), cv2.warpAffine(
        mask, matrix[:2], size, flags=cv2.INTER_NEAREST
    )


def grid_distortion(image: np.ndarray, mask: np.ndarray, steps_x, steps_y):
    """(image bilinear, mask nearest) sampled at the distorted grid."""
    height, width = mask.shape
    x, y = np.meshgrid(grid_axis(width, steps_x), grid_axis(height, steps_y))
    constant = cv2.BORDER_CONSTANT
    moved = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=constant)
    return _same_axes(moved, image), cv2.remap(
        mask, x, y, cv2.INTER_NEAREST, borderMode=constant
    )


def _same_axes(moved: np.ndarray, image: np.ndarray) -> np.ndarray:
    """OpenCV drops a channel axis of length one."""
    return moved.reshape(*moved.shape[:2], *image.shape[2:])


def augment_pair(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    translation: str = "reference",
) -> tuple[np.ndarray, np.ndarray]:
    """One random training view of uint8 [H,W,C] and its mask [H,W].

    Each with probability one half: affine (scale 0.8..1.2, rotation +-30 degrees, shear
    +-15 degrees per axis, translation), horizontal flip, brightness and contrast +-0.3,
    gamma 0.8..1.2, Gaussian noise of variance 10..50, grid distortion +-0.3.
    translation: 'reference' moves by exactly +20 % of both sides, which is what the
    published config does; 'symmetric' draws +-20 % per axis.
    """
    if translation not in TRANSLATIONS:
        raise UserError(
            f"translation {translation!r}: choose one of {', '.join(TRANSLATIONS)}"
        )
    if rng.random() < 0.5:
        scale, rotate = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
        shear_x, shear_y = rng.uniform(-15, 15, 2)
        move = np.full(2, TRANSLATE)
        if translation == "symmetric":
            move = rng.uniform(-TRANSLATE, TRANSLATE, 2)
        matrix = affine_matrix(
            mask.shape,
            scale=scale,
            rotate=rotate,
            shear_x=shear_x,
            shear_y=shear_y,
            translate_x=move[0],
            translate_y=move[1],
        )
        image, mask = affine(image, mask, matrix)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    image = np.ascontiguousarray(image)
    if rng.random() < 0.5:
        alpha, beta = rng.uniform(-0.3, 0.3, 2)
        image = brightness_contrast(image, 1 + alpha, beta).reshape(image.shape)
    if rng.random() < 0.5:
        image = gamma(image, rng.uniform(80, 120) / 100).reshape(image.shape)
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, np.float32)
        image = add_noise(image, noise * np.float32(rng.uniform(10, 50) ** 0.5))
    mask = np.ascontiguousarray(mask)
    if rng.random() < 0.5 and min(mask.shape) >= GRID_CELLS:
        steps = 1 + rng.uniform(-0.3, 0.3, (2, GRID_CELLS + 1))
        image, mask = grid_distortion(image, mask, *steps)
    return image, mask
