"""The drawing tools of the phantom: tissues, shapes, and a brush that paints beam maps.

Shapes are drawn as polygons straight into beam space, where they are insonified: the
cost then follows the small beam grid and not the size of the picture.
"""

from typing import NamedTuple

import cv2
import numpy as np

from ultradino_jax.data.phantom.scanner import Probe


class Tissue(NamedTuple):
    """What a beam meets: echo (dB), two-way loss (dB/mm), impedance, texture (dB)."""

    echo: float
    loss: float = 0.13
    impedance: float = 1.0
    texture: float = 1.5


FLUID = Tissue(-46, 0.045, 0.95, 0.0)
BLOOD = Tissue(-36, 0.09, 0.96, 0.0)
BONE = Tissue(15, 0.9, 1.5, 2.0)
LINE = Tissue(7, 0.14, 1.1, 2.0)


def ellipse(rng, x, y, a, b, rot=0.0, wobble=0.03, start=0.0, end=2 * np.pi, n=56):
    """Points [n, 2] of an ellipse (or arc) whose outline wobbles like a living thing.

    x, y: centre; a, b: half axes; rot, start, end: rad; wobble: relative amplitude.
    """
    t = np.linspace(start, end, n)
    k = np.arange(2, 6)[:, None]
    phase, size = rng.uniform(0, 2 * np.pi, (4, 1)), rng.standard_normal((4, 1))
    r = 1 + wobble * (size / k * np.cos(k * t + phase)).sum(0)
    u, v = a * r * np.cos(t), b * r * np.sin(t)
    c, s = np.cos(rot), np.sin(rot)
    return np.stack([x + c * u - s * v, y + s * u + c * v], 1)


def spline(points, n=24):
    """A smooth curve [n, 2] through a few points (Catmull-Rom)."""
    p = np.asarray(points, float)
    p = np.concatenate([[2 * p[0] - p[1]], p, [2 * p[-1] - p[-2]]])
    t = np.linspace(0, len(p) - 3 - 1e-9, n)
    i = t.astype(int)
    u = (t - i)[:, None]
    a, b, c, d = p[i], p[i + 1], p[i + 2], p[i + 3]
    cubic = (-a + 3 * b - 3 * c + d) * u**3 + (2 * a - 5 * b + 4 * c - d) * u**2
    return 0.5 * (cubic + (c - a) * u + 2 * b)


class Brush:
    """Paints tissue maps of one scene, in its own frame of reference.

    `maps` is float32 [samples, beams, 4] (the fields of Tissue); `structures` maps a
    name to the polygons (mm) painted under it. Both are shared by every brush that
    `within` derives.
    """

    def __init__(self, probe: Probe, grid: tuple[int, int]):
        self.probe = probe
        self.maps = np.zeros((*grid, 4), np.float32)
        self.structures: dict[str, list[np.ndarray]] = {}
        self.calipers = np.array([[-10.0, 40.0], [10.0, 40.0]])
        self._matrix, self._offset = np.eye(2), np.zeros(2)

    def within(self, x, y, scale=1.0, rot=0.0, flip=1) -> "Brush":
        """A brush whose unit is `scale` here, turned by `rot`, mirrored if flip=-1."""
        inner = object.__new__(Brush)
        inner.__dict__.update(self.__dict__)
        c, s = np.cos(rot), np.sin(rot)
        turn = np.array([[c, -s], [s, c]]) * scale @ np.diag([flip, 1.0])
        inner._matrix = self._matrix @ turn
        inner._offset = self.mm([[x, y]])[0]
        return inner

    @property
    def unit(self) -> float:
        """Millimetres in one unit of this brush's frame."""
        return float(np.hypot(*self._matrix[:, 1]))

    def mm(self, points) -> np.ndarray:
        """Points of this brush's frame, in mm."""
        return np.asarray(points, float) @ self._matrix.T + self._offset

    def fill(self, points, tissue: Tissue, name: str | None = None) -> None:
        """Paint the inside of a polygon and, under `name`, remember it as a mask."""
        points = self.mm(points)
        if name is not None:
            self.structures.setdefault(name, []).append(points)
        cv2.fillPoly(self.maps, [self._fixed(points)], tissue, shift=4)

    def stroke(self, points, width, tissue: Tissue, *, fade=0.0, name=None) -> None:
        """Paint a band along a path.

        width: mm, one number or one per point. fade: dB lost where the band lies along
        the beam; smooth bone answers only the beam that meets it squarely.
        """
        points = self.mm(points)
        along = np.gradient(points, axis=0)
        along /= np.maximum(np.hypot(*along.T), 1e-9)[:, None]
        normal = np.stack([-along[:, 1], along[:, 0]], 1)
        half = normal * np.broadcast_to(width, len(points))[:, None] / 2
        left, right = points + half, points - half
        outline = np.concatenate([left, right[::-1]])
        if name is not None:
            self.structures.setdefault(name, []).append(outline)
        if not fade:
            cv2.fillPoly(self.maps, [self._fixed(outline)], tissue, shift=4)
            return
        beam = points + np.array([0, self.probe.radius])
        beam /= np.maximum(np.hypot(*beam.T), 1e-9)[:, None]
        facing = np.abs((normal * beam).sum(1))
        echoes = tissue.echo - fade * (1 - facing) ** 0.8
        left, right = self._fixed(left), self._fixed(right)
        for k in range(len(points) - 1):
            quad = np.stack([left[k], left[k + 1], right[k + 1], right[k]])
            colour = tissue._replace(echo=(echoes[k] + echoes[k + 1]) / 2)
            cv2.fillConvexPoly(self.maps, quad, colour, shift=4)

    def layer(self, top, bottom, tissue: Tissue, rng, wobble=0.6) -> None:
        """Paint a layer of the abdominal wall: a band parallel to the probe's face.

        top, bottom, wobble: mm.
        """
        angle = np.linspace(-1.1, 1.1, 40) * self.probe.half_angle
        rough = np.cumsum(rng.normal(0, wobble / 4, (2, 40)), 1)
        upper = self.probe.polar(top + rough[0], angle)
        lower = self.probe.polar(bottom + rough[1], angle)
        outline = np.concatenate([upper, lower[::-1]])
        cv2.fillPoly(self.maps, [self._fixed(outline)], tissue, shift=4)

    def measure(self, a, b) -> None:
        """Say which two points of this frame a sonographer would put calipers on."""
        self.calipers[:] = self.mm([a, b])

    def _fixed(self, xy: np.ndarray) -> np.ndarray:
        """Millimetres as the 1/16-pixel integers of OpenCV's drawing functions."""
        position = self.probe.beam_coordinates(xy, self.maps.shape[:2])
        return np.rint(16 * position).astype(np.int32)
