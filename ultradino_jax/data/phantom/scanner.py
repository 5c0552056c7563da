"""The scanner half of the phantom: probe geometry, beams, scan conversion, overlays.

Coordinates are millimetres with the origin at the centre of the probe face, x to the
right and y with depth. "Beam space" is the polar grid a curved array acquires:
rows are samples along a beam, columns are beams across the fan.

The image formation is the usual first-order model (Szabo, Diagnostic Ultrasound
Imaging, ch. 8): complex Gaussian scatterers weighted by local echo strength and by the
attenuation gathered on the way, plus specular echoes of interfaces that face the beam,
blurred by the point spread function, detected, log-compressed and scan-converted.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

# Two-way loss of average tissue, dB per mm, that the time-gain compensation undoes.
TISSUE_LOSS = 0.13
_DB = np.float32(np.log(10) / 20)


@dataclass(frozen=True)
class Machine:
    """How one scanner model draws: fan, compression and speckle."""

    half_angle: float  # degrees, of its abdominal probe
    dynamic_range: float  # dB shown between black and white
    speckle: float  # size of the point spread function, relative
    smoothing: float  # 0..1, compounding and speckle reduction
    gamma: float  # grey curve


@dataclass(frozen=True)
class Probe:
    """A curved array: face radius (mm), half angle of the fan (rad), depth (mm)."""

    radius: float
    half_angle: float
    depth: float

    def beam_coordinates(self, xy: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Positions [n, 2] in mm as (beam, sample) on a `grid` of (samples, beams)."""
        x, y = xy[:, 0], xy[:, 1] + self.radius
        # Points behind the array would wrap around to the far side: hold them in front.
        y = np.maximum(y, 0.1)
        beam = (np.arctan2(x, y) / self.half_angle + 1) / 2 * (grid[1] - 1)
        sample = (np.hypot(x, y) - self.radius) / self.depth * (grid[0] - 1)
        return np.stack([beam, sample], 1)

    def polar(self, depth, angle) -> np.ndarray:
        """Positions [n, 2] in mm at `depth` (mm) below the face and `angle` (rad)."""
        r = self.radius + np.asarray(depth, float)
        return np.stack([r * np.sin(angle), r * np.cos(angle) - self.radius], -1)


class View(NamedTuple):
    """The frame: pixel pitch (mm) and where pixel (0, 0) lies (mm)."""

    mm_per_px: float
    x0: float
    y0: float

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Positions [n, 2] in mm as (column, row), float."""
        return (np.asarray(xy) - (self.x0, self.y0)) / self.mm_per_px


def fit_view(
    probe: Probe, size: tuple[int, int], rng: np.random.Generator, zoom=(0.86, 1.12)
) -> View:
    """Place the fan in a frame of `size` (H, W), sometimes zoomed until it is cut."""
    half_width = (probe.radius + probe.depth) * np.sin(probe.half_angle)
    top = probe.radius * (1 - np.cos(probe.half_angle))  # the edges rise above y = 0
    pitch = max((probe.depth + top) / size[0], 2 * half_width / size[1])
    pitch *= rng.uniform(*zoom)
    # A frame of n pixels spans n pitches; pixel 0 has its centre half a pitch inside.
    spare_x = max(size[1] * pitch - 2 * half_width, 0.0)
    spare_y = max(size[0] * pitch - probe.depth - top, 0.0)
    left = -size[1] * pitch / 2 + rng.uniform(-0.3, 0.3) * spare_x
    upper = -top - rng.uniform(0, 0.8) * spare_y
    return View(pitch, left + pitch / 2, upper + pitch / 2)


def form_beams(
    maps: np.ndarray,
    probe: Probe,
    machine: Machine,
    *,
    habitus: float,
    wall: float,
    pitch: float,
    anatomy_rng: np.random.Generator,
    noise_rng: np.random.Generator,
) -> np.ndarray:
    """Insonify tissue maps and return the log-compressed beams.

    maps: float32 [samples, beams, 4]: echo (dB), loss (dB/mm, two-way), impedance,
        texture (dB, how much the echo varies slowly from place to place).
    habitus: factor on all losses; wall: mm of abdominal wall, the distance at which
        reverberations repeat; pitch: mm per output pixel, for antialiasing.
    Returns float32 [samples, beams] in [0, 1].
    """
    n, beams = maps.shape[:2]
    echo, loss, impedance, texture = (
        np.ascontiguousarray(maps[..., k]) for k in range(4)
    )
    echo += texture * _slow_field(anatomy_rng, (n, beams))
    step = probe.depth / n
    depth = np.linspace(0, probe.depth, n, dtype=np.float32)[:, None]
    tgc = depth * np.float32(TISSUE_LOSS * anatomy_rng.normal(1.0, 0.12))
    balance = tgc - np.cumsum(loss, 0) * np.float32(step * habitus)

    amplitude = np.exp((echo + balance) * _DB)
    specular = np.abs(np.diff(impedance, axis=0, prepend=impedance[:1]))
    specular *= 12 * np.exp(balance * _DB)
    # A rough interface does not shine evenly: exponential-like glints along it.
    specular *= 0.4 + 0.6 * noise_rng.standard_exponential(specular.shape, np.float32)

    field = noise_rng.standard_normal((n, beams, 2), np.float32)
    field *= amplitude[..., None]
    field[..., 0] += specular
    # Sound that bounces between the probe and the wall arrives late: a ghost of the
    # wall below itself, and fainter ghosts of whatever else shines.
    for bounce, strength in ((1, 0.11), (2, 0.04)):
        late = int(bounce * wall / step)
        if 0 < late < n:
            ghost = np.float32(strength * anatomy_rng.uniform(0.3, 1.3))
            field[late:] += ghost * field[: n - late]

    envelope = _detect(field, machine, anatomy_rng, n)
    envelope += _haze(probe, n, beams, wall, anatomy_rng, noise_rng)
    envelope += (
        10 ** (anatomy_rng.uniform(-58, -46) / 20)
        * noise_rng.random((n, beams), np.float32)
        * np.exp(tgc * _DB)
    )
    envelope *= _contact(probe, n, beams, anatomy_rng)

    level = np.log(envelope + 1e-6) / _DB
    # Antialias: the scan converter only interpolates.
    across = max(0.0, pitch / (2 * probe.half_angle * probe.depth / beams) - 0.5)
    along = max(0.0, pitch / step - 0.7)
    smooth = cv2.GaussianBlur(
        level,
        (0, 0),
        sigmaX=0.5 * across + 1.1 * beams / 176,
        sigmaY=0.5 * along + 1.1 * n / 448,
    )
    level += (smooth - level) * np.float32(machine.smoothing)
    top = np.percentile(level[n // 16 :], 99.5) + anatomy_rng.normal(5, 3)
    shown = np.clip((level - top) / machine.dynamic_range + 1, 0, 1)
    return shown ** np.float32(machine.gamma * anatomy_rng.uniform(0.95, 1.35))


def _slow_field(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Unit-size slow variation, the same picture on every beam grid.

    Blotches of two sizes, and the fine layering of soft tissue across the beam.
    """
    field = np.zeros(shape, np.float32)
    for cells, weight in (((14, 9), 0.7), ((48, 26), 0.5), ((110, 16), 0.6)):
        coarse = rng.standard_normal(cells, np.float32)
        field += weight * cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return field


def _detect(field, machine, rng, n):
    """Blur with a PSF that widens away from the focus, then take the envelope."""
    scale = n / 448
    axial = max(0.45, 0.9 * machine.speckle * scale)
    at_focus, away = (
        cv2.GaussianBlur(
            field, (0, 0), sigmaX=s * machine.speckle * scale, sigmaY=axial
        )
        for s in (1.0, 2.3)
    )
    focus = rng.uniform(0.3, 0.75)
    blend = np.abs(np.linspace(0, 1, n, dtype=np.float32) - np.float32(focus)) * 1.4
    blend = np.clip(blend, 0, 1)[:, None, None]
    # 1.5: a wider average of independent scatterers is weaker; give the level back.
    field = at_focus * (1 - blend) + away * (blend * 1.5)
    return np.sqrt(np.square(field).sum(-1))


def _haze(probe, n, beams, wall, rng, noise_rng):
    """Near-field clutter: multiple echoes of the wall that veil fluid below it."""
    depth = np.linspace(0, probe.depth, n, dtype=np.float32)[:, None]
    reach = wall * rng.uniform(0.6, 1.6)
    level = 10 ** (rng.uniform(-40, -24) / 20)
    side = cv2.resize(
        rng.random((1, 5), np.float32), (beams, 1), interpolation=cv2.INTER_LINEAR
    )
    grain = 0.5 + noise_rng.random((n, beams), np.float32)
    return level * np.exp(-depth / np.float32(reach)) * (0.4 + side) * grain


def _contact(probe, n, beams, rng):
    """Factor [samples, beams]: ring-down at the face and, at times, a lost contact."""
    depth = np.linspace(0, probe.depth, n, dtype=np.float32)[:, None]
    factor = 1 + np.float32(0.8) * np.exp(-depth / 3)
    angle = np.linspace(-1, 1, beams, dtype=np.float32)[None]
    for _ in range(rng.integers(0, 3)):
        place, width = rng.uniform(-1, 1), rng.uniform(0.06, 0.3)
        dip = rng.uniform(0.3, 0.85) * np.exp(-(((angle - place) / width) ** 2))
        factor = factor * (1 - dip).astype(np.float32)
    if rng.random() < 0.3:  # one side lifts off the skin
        edge = np.clip((rng.choice([-1, 1]) * angle - 0.6) / 0.4, 0, 1)
        factor = factor * (1 - np.float32(rng.uniform(0.5, 0.95)) * edge)
    return factor


def scan_convert(
    beams: np.ndarray, probe: Probe, view: View, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate beams in [0, 1] into the frame.

    Returns the uint8 image [H, W], black outside the fan, and the fan, bool [H, W].
    """
    x = view.x0 + view.mm_per_px * np.arange(size[1], dtype=np.float32)
    y = view.y0 + view.mm_per_px * np.arange(size[0], dtype=np.float32) + probe.radius
    x, y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    depth, angle = np.hypot(x, y) - probe.radius, np.arctan2(x, y)
    sector = (depth >= 0) & (depth <= probe.depth) & (np.abs(angle) <= probe.half_angle)
    column = (angle / probe.half_angle + 1) * ((beams.shape[1] - 1) / 2)
    row = depth * ((beams.shape[0] - 1) / probe.depth)
    image = cv2.remap(
        np.ascontiguousarray(beams, np.float32),
        column.astype(np.float32),
        row.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.rint(255 * image * sector).astype(np.uint8), sector


def draw_mask(polygons: list[np.ndarray], view: View, sector: np.ndarray) -> np.ndarray:
    """Polygons (mm) as a uint8 mask [H, W] of 0 and 1, clipped to the fan."""
    # fillPoly also paints every pixel the outline touches. Drawn four times finer and
    # read at the pixel centres, that is an eighth of a pixel and not a half.
    mask = np.zeros((4 * sector.shape[0], 4 * sector.shape[1]), np.uint8)
    for points in polygons:
        fixed = np.rint(16 * (4 * view.pixels(points) + 2)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 1, shift=4)
    return mask[2::4, 2::4] * sector


def draw_overlays(
    image: np.ndarray,
    view: View,
    calipers: np.ndarray,
    weeks: float,
    rng: np.random.Generator,
) -> None:
    """Burn in what scanners burn in, in place: text, ticks, grey bar, calipers.

    Nothing here may look at the plane: an overlay that names or favours a class would
    be a shortcut. calipers: [2, 2] mm, the ends of the measurement to be shown.
    """
    height, width = image.shape
    unit = width / 512
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.28 * unit + 0.08

    def write(text, x, y, grey):
        at = (round(x), round(y))
        cv2.putText(image, text, at, font, size, grey, 1, cv2.LINE_AA)

    if rng.random() < 0.8:
        lines = [
            f"GA={int(weeks)}w{rng.integers(0, 7)}d",
            f"{rng.uniform(2, 8):.1f}MHz",
            f"Gn {rng.integers(-8, 20)}",
            f"C{rng.integers(3, 9)} / M{rng.integers(3, 9)}",
            f"FR {rng.integers(18, 60)}Hz",
            f"SRI II {rng.integers(1, 5)}",
        ][: rng.integers(2, 7)]
        x = width - 66 * unit if rng.random() < 0.7 else 4 * unit
        grey = int(rng.integers(120, 255))
        for k, text in enumerate(lines):
            write(text, x, (14 + 12 * k) * height / 384, grey)
    if rng.random() < 0.7:
        for y in np.arange(0.0, height, max(4.0, 10 / view.mm_per_px)):
            cv2.line(image, (width - 6, int(y)), (width - 2, int(y)), 170, 1)
    if rng.random() < 0.6:
        top, bottom, bar = int(0.25 * height), int(0.7 * height), max(2, int(6 * unit))
        ramp = np.linspace(255, 0, bottom - top)[:, None]
        image[top:bottom, bar : 2 * bar] = ramp.astype(np.uint8)
    if rng.random() < 0.35:
        a, b = view.pixels(calipers)
        for end in (a, b):
            at = (round(end[0]), round(end[1]))
            cv2.drawMarker(image, at, 255, cv2.MARKER_CROSS, max(3, int(9 * unit)), 1)
        dots = max(2, int(np.hypot(*(b - a)) / (6 * unit)))
        for t in np.linspace(0, 1, dots):
            x, y = np.rint(a + t * (b - a)).astype(int)
            if 0 <= x < width and 0 <= y < height:
                image[y, x] = 230
        length = np.hypot(*(calipers[1] - calipers[0]))
        write(f"D {length:.1f}mm", 8 * unit, height - 8 * unit, 230)
