"""Training augmentation of the classification evaluations, on uint8 [H,W] or [H,W,C].

The operations and their order are those of the reference (albumentations 1.3.1): each
acts at the image's own resolution, before the resize, with probability one half.
"""

import cv2
import numpy as np

GRID_CELLS = 5


def brightness_contrast(image: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """trunc(clip(alpha v + 255 beta, 0, 255)) in float32."""
    table = np.arange(256, dtype=np.float32) * np.float32(alpha)
    table += np.float32(beta * 255)
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
    """trunc(255 (v/255)^exponent); v/255 is v * (1/255), as there."""
    table = (np.arange(256) * (1 / 255)) ** exponent * 255
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def add_noise(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """trunc(clip(v + noise, 0, 255)) in float32; noise has the image's shape."""
    noisy = image.astype(np.float32) + noise.astype(np.float32)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def grid_axis(length: int, steps) -> np.ndarray:
    """Sampling coordinates [length] of one axis of the grid distortion.

    The axis is cut into cells of floor(length/5) pixels; cell k is stretched by
    steps[k] (6 of them) and a last partial cell reaches the end of the axis. Cells
    join where the one before ended, so the coordinates may pass the border.
    """
    cell = length // GRID_CELLS
    coordinates = np.zeros(length, np.float32)
    before = 0.0
    for k, step in enumerate(steps):
        start, end = k * cell, (k + 1) * cell
        if end > length:
            end, after = length, float(length)
        else:
            after = before + cell * step
        coordinates[start:end] = np.linspace(before, after, end - start)
        before = after
    return coordinates


def grid_distortion(image: np.ndarray, steps_x, steps_y) -> np.ndarray:
    """Bilinear resampling at the distorted grid, reflected at the border."""
    height, width = image.shape[:2]
    x, y = np.meshgrid(grid_axis(width, steps_x), grid_axis(height, steps_y))
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random training view of uint8 [H,W] or [H,W,C], same shape.

    Brightness and contrast +-0.3, gamma 0.8..1.2, Gaussian noise of variance 10..50,
    grid distortion +-0.3, horizontal flip.
    """
    if rng.random() < 0.5:
        alpha, beta = rng.uniform(-0.3, 0.3, 2)
        image = brightness_contrast(image, 1 + alpha, beta)
    if rng.random() < 0.5:
        image = gamma(image, rng.uniform(80, 120) / 100)
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, np.float32)
        image = add_noise(image, noise * np.float32(rng.uniform(10, 50) ** 0.5))
    if rng.random() < 0.5 and min(image.shape[:2]) >= GRID_CELLS:
        steps = 1 + rng.uniform(-0.3, 0.3, (2, GRID_CELLS + 1))
        image = grid_distortion(image, *steps)
    if rng.random() < 0.5:
        image = np.ascontiguousarray(image[:, ::-1])
    return image
