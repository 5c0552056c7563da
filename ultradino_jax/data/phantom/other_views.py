"""The rest of the phantom: the broad class 'Other' and the view during labour."""

import numpy as np

from ultradino_jax.data.phantom.anatomy import SIDES, limb
from ultradino_jax.data.phantom.brush import (
    BLOOD,
    BONE,
    FLUID,
    LINE,
    Brush,
    Tissue,
    ellipse,
    spline,
)


def other(brush: Brush, rng) -> None:
    """One of nine views that are none of the five standard planes."""
    views = (
        _sagittal_spine,
        _cord,
        _profile,
        _limbs,
        _kidneys,
        _pelvis,
        _sagittal_trunk,
        _hand,
        _nothing,
    )
    views[rng.integers(len(views))](brush, rng)


def _sagittal_spine(brush, rng):
    brush.fill(ellipse(rng, 0, 0.2, 1.7, 0.6, 0, 0.06), Tissue(-4, 0.13, 1.03, 3))
    curve = rng.uniform(0.02, 0.15)
    for side in SIDES:
        for x in np.linspace(-1.5, 1.5, 22):
            y = curve * x**2 + side * 0.09
            brush.fill(ellipse(rng, x, y, 0.04, 0.03, n=12), BONE)
    brush.measure([-1.5, 0], [1.5, 0])


def _cord(brush, rng):
    x = np.linspace(-1.2, 1.2, 12)
    path = spline(np.stack([x, 0.3 * np.sin(3 * x + rng.uniform(0, 6))], 1), 40)
    brush.stroke(path, 0.32 * brush.unit, Tissue(-8, 0.12, 1.03))
    twist = np.cumsum(np.full(40, rng.uniform(0.4, 0.8)))
    for phase in (0, 2.1, 4.2):
        lane = path + 0.07 * np.stack([0 * twist, np.sin(twist + phase)], 1)
        brush.stroke(lane, 0.06 * brush.unit, BLOOD)
    for _ in range(rng.integers(0, 5)):  # cut loops
        at = rng.normal(0, 0.9, 2)
        brush.fill(ellipse(rng, at[0], at[1], 0.13, 0.13), Tissue(5, 0.13, 1.05))
        brush.fill(ellipse(rng, at[0], at[1], 0.1, 0.1), BLOOD)


def _profile(brush, rng):
    face = np.array(
        [
            [-0.9, -0.7],
            [-0.3, -0.85],
            [0.1, -0.55],
            [0.16, -0.3],
            [0.34, -0.16],
            [0.16, -0.05],
            [0.22, 0.06],
            [0.14, 0.14],
            [0.20, 0.28],
            [-0.1, 0.42],
            [-0.9, 0.5],
        ]
    )
    face *= rng.normal(1, 0.05, face.shape)
    brush.fill(spline(face, 50), Tissue(-3, 0.13, 1.05, 3))
    brush.stroke(spline(face[:4], 20), 1.8, BONE, fade=18)
    brush.stroke(spline([[0.1, -0.28], [0.24, -0.2]], 6), 1.6, BONE)  # nasal bone
    brush.stroke(spline([[-0.2, 0.02], [0.12, 0.02]], 8), 1.6, BONE)  # palate
    brush.stroke(spline([[-0.15, 0.33], [0.14, 0.24]], 8), 1.8, BONE)  # mandible
    brush.fill(ellipse(rng, -0.45, -0.35, 0.35, 0.28), Tissue(-14, 0.08, 1.0))
    brush.measure(face[2], face[9])


def _limbs(brush, rng):
    for _ in range(rng.integers(2, 5)):
        at, size = rng.normal(0, 0.6, 2), rng.uniform(0.35, 0.7)
        limb(brush.within(*at, size, rng.uniform(0, np.pi)), rng)


def _kidneys(brush, rng):
    brush.fill(ellipse(rng, 0, 0.1, 1.0, 0.9, 0, 0.03), Tissue(-3, 0.13, 1.04, 3))
    for side in SIDES:
        turn = side * rng.uniform(-0.1, 0.3)
        kidney = ellipse(rng, side * 0.42, 0.1, 0.3, 0.22, turn, 0.05)
        brush.fill(kidney, Tissue(-11, 0.12, 0.98))
        pelvis = ellipse(rng, side * 0.36, 0.1, 0.1, 0.05, turn, 0.05)
        brush.fill(pelvis, FLUID)
    for angle in (0, 2.1, 4.2):
        at = 0.09 * np.cos(angle), 0.45 + 0.09 * np.sin(angle)
        brush.fill(ellipse(rng, *at, 0.05, 0.04), BONE)
    brush.measure([-0.7, 0.1], [0.7, 0.1])


def _pelvis(brush, rng):
    brush.fill(ellipse(rng, 0, 0, 0.9, 0.75, 0, 0.04), Tissue(-2, 0.14, 1.04, 3))
    brush.fill(ellipse(rng, 0, -0.05, 0.26, rng.uniform(0.15, 0.24)), FLUID)
    for side in SIDES:  # umbilical arteries pass the bladder, iliac wings behind
        artery = spline([[side * 0.1, -0.6], [side * 0.33, -0.1], [side * 0.3, 0.3]])
        brush.stroke(artery, 0.08 * brush.unit, BLOOD)
        wing = spline([[side * 0.3, 0.5], [side * 0.6, 0.25], [side * 0.7, 0]], 12)
        brush.stroke(wing, 2, BONE, fade=14)
    brush.measure([-0.26, -0.05], [0.26, -0.05])


def _sagittal_trunk(brush, rng):
    brush.fill(ellipse(rng, 0, 0, 1.6, 0.7, 0, 0.05), Tissue(-3, 0.13, 1.05, 3))
    lung = ellipse(rng, -0.75, 0, 0.6, 0.55, 0, 0.05)
    brush.fill(lung, Tissue(rng.uniform(0, 4), 0.12, 1.0, 2))
    brush.fill(ellipse(rng, 0.25, 0, 0.6, 0.55, 0, 0.05), Tissue(-9, 0.12, 1.0, 2))
    dome = spline([[-0.15, -0.58], [-0.3, 0], [-0.12, 0.58]], 14)
    brush.stroke(dome, 0.8, Tissue(-18))  # diaphragm
    brush.fill(ellipse(rng, -0.7, -0.15, 0.25, 0.2, 0.4, 0.1), BLOOD)
    if rng.random() < 0.6:
        brush.fill(ellipse(rng, 0.2, 0.12, 0.2, 0.12, 0.3, 0.1), FLUID)
    for x in np.linspace(-1.2, -0.2, 7):  # ribs in cross-section, each with its shadow
        brush.fill(ellipse(rng, x, -0.58, 0.05, 0.03, n=12), BONE._replace(loss=2.0))
    brush.measure([-1.2, 0], [0.8, 0])


def _hand(brush, rng):
    brush.fill(ellipse(rng, 0, 0.2, 0.4, 0.4, 0, 0.1), Tissue(-2, 0.14, 1.05))
    for k in range(5):
        turn = -0.9 + 0.4 * k + rng.normal(0, 0.08)
        finger = brush.within(0, 0.2, 1, turn)
        curl = rng.uniform(-0.2, 0.2)
        path = spline([[0, -0.2], [0, -0.6], [curl, -1.0 - rng.uniform(0, 0.15)]], 12)
        finger.stroke(path, 0.17 * brush.unit, Tissue(0, 0.14, 1.05))
        for j in (0, 4, 8):
            bone = BONE._replace(loss=1.2)
            finger.stroke(path[j : j + 4], 0.07 * brush.unit, bone, fade=10)


def _nothing(brush, rng):
    """Fluid and wall only, perhaps a membrane: the amniotic fluid index views."""
    if rng.random() < 0.5:
        x = np.linspace(-2, 2, 10)
        membrane = np.stack([x, 0.2 * np.sin(2 * x) + rng.normal(0, 0.05, 10)], 1)
        brush.stroke(spline(membrane, 30), 0.6, LINE)
    for _ in range(rng.integers(0, 3)):
        at = rng.normal(0, 0.8, 2)
        limb(brush.within(*at, 0.4, rng.uniform(0, np.pi)), rng)
    brush.measure([0, -1], [0, 0.6])


def intrapartum(
    brush: Brush, rng, progress: float, symphysis: bool, head: bool
) -> None:
    """Transperineal view in labour: pubic symphysis above, head below.

    The brush's frame is in mm around a point between the two, y down. progress: 0..1,
    how far the head has come down past the symphysis; symphysis, head: which of the two
    the probe shows (JNU-IFM has frames with either, both and none).
    """
    x, y = rng.uniform(-34, -22), rng.uniform(-40, -30)
    a, b = rng.uniform(14, 19), rng.uniform(5.5, 8)
    oval = ellipse(rng, x, y, a, b, rng.uniform(0.2, 0.9), 0.05)
    r = rng.uniform(36, 46)
    turn, shape = rng.uniform(-0.5, 0.8), rng.uniform(1.08, 1.2)
    at = np.array([rng.uniform(-4, 6) + 16 * progress, 28 - 20 * progress])
    skull = ellipse(rng, at[0], at[1], r * shape, r / shape, turn, 0.02)
    if head:
        brush.fill(at + (skull - at) * 1.07, Tissue(1, 0.15, 1.03))
        brush.fill(skull, Tissue(rng.uniform(-18, -10), 0.1, 1.0, 3), "head")
        bone = BONE._replace(loss=rng.uniform(0.8, 1.6))
        brush.stroke(skull, rng.uniform(2, 3.5), bone, fade=rng.uniform(16, 30))
        brush.measure(skull[0], skull[28])
    if symphysis:
        brush.fill(oval, Tissue(rng.uniform(-14, -8), 0.25, 1.08, 2), "symphysis")
        brush.stroke(oval, 1.2, Tissue(rng.uniform(4, 11), 0.3, 1.2), fade=6)
