"""What the phantom shows: mother, fetal planes, cervix, and everything else.

Each painter draws one kind of view with a brush whose unit is the size of the part
(half the head, half the trunk, ...). Proportions follow textbook views (ISUOG practice
guidelines for the mid-trimester scan, Salomon et al. 2011 and 2022); they are meant to
look and sort like the real planes and are no clinical reference.
"""

import numpy as np

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

BRAIN_PLANES = ("Trans-thalamic", "Trans-cerebellum", "Trans-ventricular", "Other")
SIDES = (-1, 1)


# --- the mother -----------------------------------------------------------------------


def maternal(brush: Brush, rng, wall: float, fluid: bool = True) -> None:
    """Abdominal wall, `wall` mm thick, then uterus, perhaps placenta, deep tissue."""
    depth, half_angle = brush.probe.depth, brush.probe.half_angle
    brush.maps[:] = Tissue(rng.uniform(-4, 2), texture=rng.uniform(2.5, 4.5))
    for _ in range(rng.integers(2, 6)):  # bowel, muscle and fat planes in the depth
        x, y = brush.probe.polar(
            rng.uniform(0.45, 1.1) * depth, rng.uniform(-1, 1) * half_angle
        )
        shape = ellipse(rng, x, y, rng.uniform(8, 30), rng.uniform(4, 14), 0, 0.2)
        brush.fill(shape, Tissue(rng.uniform(-12, 8), 0.13, rng.uniform(0.97, 1.06), 4))
    skin, fat, muscle = wall * np.array([0.07, rng.uniform(0.4, 0.6), 0.85])
    brush.layer(-1, skin, Tissue(6, texture=1), rng)
    brush.layer(skin, fat, Tissue(-9, 0.14, 0.98, 3), rng)
    brush.layer(fat, muscle, Tissue(-5, 0.14, 1.02, 3), rng)
    for _ in range(rng.integers(4, 10)):  # septa
        at = rng.uniform(skin, muscle)
        a, b = np.sort(rng.uniform(-1, 1, 2)) * half_angle
        path = brush.probe.polar(
            at + rng.normal(0, 0.7, 8).cumsum(), np.linspace(a, b, 8)
        )
        brush.stroke(path, rng.uniform(0.3, 0.9), Tissue(rng.uniform(-2, 8), 0.14, 1.0))
    for at in (fat, muscle, wall):  # fasciae and peritoneum
        thick = rng.uniform(0.5, 1.2)
        brush.layer(at, at + thick, Tissue(rng.uniform(4, 11), 0.15, 1.08), rng, 0.9)
    if not fluid:
        return
    centre = brush.probe.polar(
        wall + rng.uniform(0.3, 0.55) * depth, rng.normal(0, 0.15)
    )
    a, b = depth * rng.uniform(0.35, 0.7), depth * rng.uniform(0.22, 0.42)
    pocket = ellipse(rng, centre[0], centre[1], a, b, rng.uniform(-0.5, 0.5), 0.10)
    myometrium = centre + (pocket - centre) * (1 + 9 / b)
    brush.fill(myometrium, Tissue(-3, 0.14, 1.02, 3))
    brush.fill(pocket, FLUID._replace(echo=rng.uniform(-50, -38)))
    if rng.random() < 0.5:  # placenta: the pocket's rim, front or back
        start = rng.choice([0.0, np.pi]) + rng.uniform(-0.6, 0.6)
        k = np.linspace(start, start + rng.uniform(2, 3), 30)
        t = np.arange(len(pocket)) * 2 * np.pi / (len(pocket) - 1)
        rim = np.stack(
            [np.interp(k, t, pocket[:, j], period=2 * np.pi) for j in (0, 1)], 1
        )
        depth_in = rng.uniform(0.25, 0.5) * np.sin(np.linspace(0, np.pi, 30))[:, None]
        inner = rim + (centre - rim) * depth_in
        brush.fill(
            np.concatenate([rim, inner[::-1]]), Tissue(3, 0.13, 1.03, rng.uniform(1, 3))
        )


def limb(brush: Brush, rng) -> None:
    """A limb lying free: soft tissue round a thin bone, unit its half length."""
    brush.fill(ellipse(rng, 0, 0, 1, rng.uniform(0.25, 0.4), 0, 0.08), Tissue(-3, 0.14))
    bones = 1 if rng.random() < 0.6 else 2
    for k in range(bones):
        y = (k - (bones - 1) / 2) * 0.2
        path = spline([[-0.75, y], [0, y + rng.normal(0, 0.05)], [0.75, y]], 12)
        brush.stroke(path, rng.uniform(1.5, 3), BONE._replace(loss=2.2), fade=14)


# --- parts ----------------------------------------------------------------------------


def _vertebra(brush: Brush, rng, x, y, size=0.09) -> None:
    """Three ossification centres: the triangle of a transverse spine."""
    turn = rng.uniform(-0.3, 0.3)
    for angle in (0, 2.1, 4.2):
        c, s = np.cos(angle + 1.57 + turn), np.sin(angle + 1.57 + turn)
        shape = ellipse(rng, x + size * c, y + size * s, size * 0.5, size * 0.4)
        brush.fill(shape, BONE._replace(echo=17))


def _trunk(brush: Brush, rng, flat, inside: Tissue) -> np.ndarray:
    """Skin and subcutaneous layer round a transverse trunk; returns the outline."""
    outline = ellipse(rng, 0, 0, 1, flat, 0, 0.02)
    brush.fill(outline, Tissue(5, 0.16, 1.06))
    brush.fill(outline * rng.uniform(0.94, 0.97), inside)
    brush.measure([-1, 0], [1, 0])
    return outline


def _ribs(brush: Brush, rng, radius, flat, low, high) -> None:
    """A rib on each side, as arcs from the spine forward."""
    for side in SIDES:
        start, end = 1.57 + side * rng.uniform(0.3, 0.5), 1.57 + side * high
        if rng.random() < 0.2:
            end = 1.57 + side * low
        arc = ellipse(rng, 0, 0, radius, radius * flat, 0, 0.01, start, end, 26)
        tissue = BONE._replace(echo=rng.uniform(9, 14), loss=0.5)
        brush.stroke(arc, rng.uniform(1, 1.8), tissue, fade=16)


def _vessel(brush: Brush, rng, x, y, r, name=None) -> None:
    """A round vessel with a bright wall, unit frame."""
    wall = ellipse(rng, x, y, r * 1.22, r * 1.15, 0, 0.03)
    brush.fill(wall, Tissue(3, 0.13, 1.05))
    brush.fill(ellipse(rng, x, y, r, r * 0.95, 0, 0.03), BLOOD, name)


# --- the five standard planes ---------------------------------------------------------


def brain(brush: Brush, rng, brain_plane: str) -> None:
    """Axial head; unit half the occipito-frontal diameter, the front at x = -1."""
    flat = 0.78 * rng.normal(1, 0.04)
    skull = ellipse(rng, 0, 0, 1, flat, 0, 0.015, n=72)
    brush.fill(skull * 1.05, Tissue(2, 0.15, 1.04))  # scalp
    brush.fill(skull, Tissue(-14, 0.07, 1.02, 3), "head")
    for side in SIDES:  # insulae, sulci
        t = np.linspace(-0.55, 0.45, 10)
        y = side * (0.50 * flat / 0.78 + 0.05 * np.cos(9 * t + rng.uniform(0, 6)))
        brush.stroke(np.stack([t, y], 1), 0.7, Tissue(-3, 0.1, 1.02))
        for _ in range(rng.integers(1, 5)):
            x, y = rng.uniform(-0.7, 0.7), side * rng.uniform(0.3, 0.6)
            path = [[x, y], [x + rng.normal(0, 0.1), y + side * 0.08]]
            brush.stroke(path, 0.6, Tissue(-5, 0.1, 1.02))
    midline = Tissue(rng.uniform(3, 9), 0.1, 1.1)
    posterior = 0.40 if brain_plane == "Trans-cerebellum" else 0.90
    brush.stroke([[-0.92, 0], [-0.58, rng.normal(0, 0.01)]], 0.9, midline)
    brush.stroke([[0.12, 0], [posterior, rng.normal(0, 0.01)]], 0.9, midline)
    if brain_plane in ("Trans-thalamic", "Trans-cerebellum"):
        _septum_and_thalami(brush, rng)
    if brain_plane == "Trans-cerebellum":
        for side in SIDES:
            lobe = ellipse(rng, 0.60, side * 0.21, 0.15, 0.22, 0, 0.05)
            brush.fill(lobe * 1.0, Tissue(-7, 0.1, 1.05, 3))
            brush.stroke(lobe, 0.7, Tissue(2, 0.1, 1.05))
        brush.fill(ellipse(rng, 0.60, 0, 0.10, 0.08), Tissue(2, 0.1, 1.05))
        brush.fill(ellipse(rng, 0.84, 0, 0.06, 0.22), FLUID)  # cisterna magna
    elif brain_plane == "Trans-ventricular":
        brush.stroke([[-0.58, 0], [0.12, 0]], 0.8, midline)
        for side in SIDES:
            tilt, width = side * rng.uniform(0.1, 0.35), rng.uniform(0.08, 0.15)
            horn = ellipse(rng, 0.34, side * 0.32, 0.36, width, tilt, 0.05)
            brush.fill(horn, FLUID)
            brush.stroke(horn, 0.6, Tissue(3, 0.1, 1.05))
            plexus = ellipse(rng, 0.26, side * 0.32, 0.23, width * 0.68, tilt, 0.06)
            brush.fill(plexus, Tissue(4, 0.1, 1.04, 3))
    elif brain_plane == "Other":  # high or oblique cut: falx only, perhaps orbits
        brush.stroke([[-0.6, 0], [0.15, 0]], 0.9, midline)
        if rng.random() < 0.5:
            for side in SIDES:
                orbit = ellipse(rng, -0.66, side * 0.26, 0.15, 0.16)
                brush.fill(orbit, FLUID)
                brush.stroke(orbit, 1.0, BONE, fade=12)
    if rng.random() < 0.5:  # the near half drowns in reverberation of the skull
        near = brush.within(0, 0)
        veil = Tissue(-8, 0.1, 1.0, 4)
        for _ in range(3):
            y = -rng.uniform(0.25, 0.6) * flat
            path = [[rng.uniform(-0.6, 0), y], [rng.uniform(0, 0.6), y]]
            near.stroke(spline(path, 6), rng.uniform(1, 3), veil)
    bone = BONE._replace(echo=rng.uniform(13, 18), loss=rng.uniform(0.5, 0.9))
    brush.stroke(skull, rng.uniform(1.8, 2.8), bone, fade=rng.uniform(22, 46))
    brush.measure([-1, 0], [1, 0])


def _septum_and_thalami(brush: Brush, rng) -> None:
    h = rng.uniform(0.055, 0.09)
    box = [[-0.55, -h], [-0.30, -h], [-0.30, h], [-0.55, h]]
    brush.fill(box, FLUID)
    for side in SIDES:
        brush.stroke([[-0.56, side * h], [-0.29, side * h]], 0.7, LINE)
        tilt = -side * rng.uniform(0.2, 0.5)
        brush.fill(
            ellipse(rng, -0.02, side * 0.16, 0.24, 0.13, tilt, 0.06),
            Tissue(-21, 0.08, 0.99, 2),
        )


def abdomen(brush: Brush, rng) -> None:
    """Transverse upper abdomen; unit half its width, spine at y > 0.

    Names the four FASS structures: artery (aorta), liver, stomach, vein (umbilical).
    """
    _trunk(brush, rng, rng.uniform(0.86, 1.0), Tissue(-5, 0.13, 1.0, 3))
    liver = ellipse(rng, -0.26, -0.14, 0.56, 0.60, rng.uniform(-0.2, 0.3), 0.07)
    brush.fill(liver, Tissue(rng.uniform(-12, -6), 0.12, 0.99, 2), "liver")
    for _ in range(rng.integers(2, 6)):  # bowel and adrenal specks
        x, y = rng.uniform(-0.5, 0.6), rng.uniform(0.1, 0.6)
        brush.fill(
            ellipse(rng, x, y, 0.1, 0.07, rng.uniform(0, 3), 0.15),
            Tissue(rng.uniform(-12, 3)),
        )
    if rng.random() < 0.9:
        a, b = rng.uniform(0.15, 0.28), rng.uniform(0.11, 0.19)
        x, y = rng.normal(0.46, 0.04), rng.normal(0.02, 0.06)
        stomach = ellipse(rng, x, y, a, b, rng.uniform(-0.8, 0.8), 0.07)
        brush.fill(x + (stomach - (x, 0)) * 1.12 - (0, 0.12 * y), Tissue(0, 0.13, 1.03))
        brush.fill(stomach, FLUID, "stomach")
    hook = rng.uniform(0.4, 1.0)  # how far the umbilical vein bends into the liver
    path = spline(
        [[-0.02, -0.62], [-0.04, -0.35], [-0.12 * hook, -0.12], [-0.42 * hook, 0.02]],
        20,
    )
    width = brush.unit * np.linspace(0.10, 0.15, 20) * rng.uniform(0.7, 1.15)
    brush.stroke(path, width * 1.3, Tissue(2, 0.13, 1.04))
    brush.stroke(path, width, BLOOD, name="vein")
    _vessel(
        brush, rng, rng.normal(0.12, 0.03), 0.50, rng.uniform(0.06, 0.085), "artery"
    )
    if rng.random() < 0.6:
        _vessel(brush, rng, -0.10, 0.44, rng.uniform(0.04, 0.06))  # inferior vena cava
    _vertebra(brush, rng, 0, 0.76)
    _ribs(brush, rng, 0.90, 0.92, 0.7, rng.uniform(1.0, 1.6))


def thorax(brush: Brush, rng) -> None:
    """Transverse chest at the heart; unit half its width, spine at y > 0."""
    _trunk(brush, rng, rng.uniform(0.85, 0.98), Tissue(rng.uniform(-4, 1), 0.13, 1, 3))
    _ribs(brush, rng, 0.90, 0.92, 1.2, rng.uniform(1.6, 2.3))
    three_vessels = rng.random() < 0.2
    if three_vessels:
        for k, r in enumerate((0.15, 0.11, 0.08)):
            x, y = 0.16 - 0.26 * k, -0.28 + 0.10 * k
            _vessel(brush, rng, x + rng.normal(0, 0.03), y, r * rng.uniform(0.85, 1.1))
        brush.fill(
            ellipse(rng, 0, -0.55, 0.35, 0.12, 0, 0.1), Tissue(-10, 0.12)
        )  # thymus
    else:
        _four_chambers(brush.within(0.12, -0.10, 1, rng.normal(0.75, 0.15)), rng)
    _vessel(brush, rng, 0.10, 0.52, rng.uniform(0.06, 0.085))  # descending aorta
    _vertebra(brush, rng, 0, 0.76)


def _four_chambers(heart: Brush, rng) -> None:
    heart.fill(ellipse(rng, 0, 0, 0.56, 0.42, 0, 0.04), Tissue(-14, 0.1, 0.98))
    heart.fill(ellipse(rng, 0, 0, 0.53, 0.40, 0, 0.04), Tissue(-3, 0.12, 1.04, 2))
    squeeze = rng.uniform(0.75, 1.1)  # phase of the beat
    chambers = ((-0.20, -0.17), (-0.20, 0.15), (0.25, -0.15), (0.25, 0.14))
    for k, (x, y) in enumerate(chambers):
        a, b = ((0.24, 0.125), (0.17, 0.115))[k // 2]
        grow = (squeeze, 2 - squeeze)[k // 2] * rng.normal(1, 0.07)
        shape = ellipse(rng, x, y, a * grow, b * grow, rng.normal(0, 0.12), 0.08)
        heart.fill(shape, BLOOD)
    septum = Tissue(4, 0.13, 1.06)
    heart.stroke([[-0.45, -0.01], [0.05, -0.01]], rng.uniform(1.2, 2.2), septum)
    for y in (-0.15, 0.14):  # valves, open or shut
        tip = rng.uniform(-0.14, 0.0)
        for side in SIDES:
            heart.stroke([[0.06, y + side * 0.11], [tip, y + side * 0.02]], 0.6, septum)
    heart.stroke([[0.10, 0], [0.42, rng.normal(0, 0.03)]], 0.7, septum)
    if rng.random() < 0.3:  # papillary muscle focus
        heart.fill(ellipse(rng, -0.22, 0.15, 0.03, 0.03), Tissue(10))


def femur(brush: Brush, rng) -> None:
    """Long axis of the thigh; unit about two thirds of the shaft."""
    thigh = ellipse(
        rng, 0, 0.02, rng.uniform(1.1, 1.4), rng.uniform(0.42, 0.6), 0, 0.07
    )
    brush.fill(thigh, Tissue(2, 0.15, 1.05))
    brush.fill(thigh * (0.97, 0.93), Tissue(-5, 0.14, 1.02, 3))
    for _ in range(rng.integers(4, 9)):  # muscle fibres
        y = rng.uniform(-0.38, 0.38)
        fibre = spline([[-0.95, y], [0, y + rng.normal(0, 0.05)], [0.95, y * 0.8]], 8)
        brush.stroke(fibre, 0.5, Tissue(2, 0.14, 1.01))
    bow, length = rng.uniform(0.02, 0.12), rng.uniform(0.7, 0.85)
    t = np.linspace(-1, 1, 26)
    shaft = np.stack([length * t, bow * (1 - t**2)], 1)
    width = brush.unit * (0.085 + 0.05 * t**4) * rng.uniform(0.8, 1.2)
    bone = BONE._replace(echo=19, loss=rng.uniform(2, 4.5), impedance=2.0)
    brush.stroke(shaft, width, bone, fade=rng.uniform(6, 16), name="femur")
    for side in SIDES:  # cartilage of the ends
        brush.fill(
            ellipse(rng, side * (length + 0.1), 0, 0.12, 0.12), Tissue(-20, 0.1, 0.99)
        )
    brush.measure([-length, 0], [length, 0])


def cervix(brush: Brush, rng, head_scale: float) -> None:
    """Sagittal cervix; unit one mm, the canal near the origin, the head at x < 0.

    Bladder, canal with its hypoechoic mucosa, at times a funnel, and the head above
    the internal os.
    """
    if rng.random() < 0.75:
        a, b = rng.uniform(10, 26), rng.uniform(5, 12)
        bladder = ellipse(rng, rng.uniform(-26, -6), -16 - b, a, b, -0.2, 0.1)
        brush.fill(bladder, FLUID)
    body = ellipse(rng, 6, 0, rng.uniform(26, 34), rng.uniform(11, 15), 0.12, 0.07)
    brush.fill(body, Tissue(rng.uniform(-8, -2), 0.14, 1.02, 3), "cervix")
    x = np.linspace(-18, rng.uniform(18, 24), 24)
    bend, tilt = rng.uniform(0.5, 4), rng.normal(0.1, 0.08)
    canal = np.stack([x, bend * np.sin(x / 14 + rng.uniform(0, 3)) + tilt * x], 1)
    brush.stroke(canal, rng.uniform(3.5, 7), Tissue(-15, 0.1, 0.99, 3))
    brush.stroke(canal, rng.uniform(0.5, 1), Tissue(rng.uniform(-4, 8), 0.12, 1.06))
    for _ in range(rng.integers(0, 4)):  # Nabothian cysts
        x, y = rng.uniform(-5, 22), rng.choice(SIDES) * rng.uniform(4, 8)
        brush.fill(
            ellipse(rng, x, y, rng.uniform(0.8, 2.2), rng.uniform(0.8, 2)), FLUID
        )
    r = head_scale * rng.uniform(0.85, 1.05)
    if rng.random() < 0.85:
        at = -22 - 0.85 * r, 10 + r * rng.uniform(0.1, 0.5)
        head = ellipse(rng, *at, r, r * 0.9, 0, 0.02)
        brush.fill(at + (head - at) * (1 + 4 / r), FLUID)
        brush.fill(head, Tissue(-14, 0.08, 1.02, 3))
        brush.stroke(head, rng.uniform(1.8, 2.6), BONE, fade=22)
    if rng.random() < 0.5:
        gap, reach = rng.uniform(2, 6), rng.uniform(-18, -8)
        tip = canal[np.abs(canal[:, 0] - reach).argmin()]
        brush.fill([[-26, tip[1] - gap], tip, [-26, tip[1] + gap]], FLUID)
    if rng.random() < 0.6:  # vaginal wall and gas at the external os
        brush.fill(ellipse(rng, 34, 4, 6, 3, 0.5, 0.2), Tissue(9, 0.5, 1.1))
    brush.measure(canal[0], canal[-1])
