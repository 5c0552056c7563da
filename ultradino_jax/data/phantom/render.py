"""A fetal-ultrasound phantom: labelled images of any number, made, not collected.

It stands in for data that cannot be shipped. The same loaders, training and evaluation
run on it as on the real sets, and its six classes are those of FETAL_PLANES_DB
(Burgos-Artizzu et al. 2020, doi:10.1038/s41598-020-67076-5). It looks and sorts like
ultrasound; no clinical claim can rest on it.

An image is a pure function of (seed, index, task, size): the same bytes in whichever
process, order or number it is asked for. Images of one patient share body, machine
and operator, so a split that leaks patients shows.

    >>> phantom = render_phantom(7, seed=0, size=(96, 96))
    >>> phantom.plane, phantom.image.shape, phantom.image.dtype
"""

from dataclasses import dataclass

import numpy as np

from ultradino_jax.data.phantom import anatomy
from ultradino_jax.data.phantom import other_views as phantom_other
from ultradino_jax.data.phantom import scanner as imaging
from ultradino_jax.data.phantom.brush import Brush
from ultradino_jax.data.phantom.scanner import Machine, Probe
from ultradino_jax.errors import UserError

# Label ids as in the CSV splits of the paper's repository.
PLANES = (
    "Other",
    "Maternal cervix",
    "Fetal abdomen",
    "Fetal brain",
    "Fetal femur",
    "Fetal thorax",
)
FASS_STRUCTURES = ("artery", "liver", "stomach", "vein")
JNU_STRUCTURES = ("symphysis", "head")
# The structures each task has masks of; () is all that the picture shows.
WANTED = {"planes": (), "fass": FASS_STRUCTURES, "jnu": JNU_STRUCTURES}
TASKS = tuple(WANTED)
OPERATORS = ("Op. 1", "Op. 2", "Op. 3", "Other")
# Scanners of FETAL_PLANES_DB, their shares there, and a look for each.
MACHINES = {
    "Aloka": (0.41, Machine(34, 46, 1.25, 0.35, 1.15)),
    "Voluson E6": (0.47, Machine(38, 56, 0.90, 0.65, 1.05)),
    "Voluson S10": (0.09, Machine(36, 60, 1.00, 0.75, 0.95)),
    "Other": (0.03, Machine(31, 50, 1.40, 0.15, 1.25)),
}
# The share of views through a small, wide array (endocavity or micro-convex). It is
# the same for every plane, so the shape of the fan says nothing about the class.
WIDE_SHARE = 0.2


@dataclass(frozen=True)
class PhantomImage:
    """One image with everything that is known about it.

    image: uint8 [H, W]; label: index into PLANES; brain_plane: sub-plane, or "Not A
    Brain"; patient: number from 0; masks: name -> uint8 [H, W] of 0 and 1, inside the
    fan; mm_per_px: pixel pitch.
    """

    image: np.ndarray
    label: int
    plane: str
    brain_plane: str
    patient: int
    machine: str
    operator: str
    masks: dict[str, np.ndarray]
    mm_per_px: float


@dataclass(frozen=True)
class Patient:
    """What all images of one patient share."""

    weeks: float  # gestational age
    machine: str
    operator: str
    wall: float  # mm from skin to uterus
    habitus: float  # factor on attenuation
    head: float  # factor on head size


def make_patient(patient: int, seed: int = 0) -> Patient:
    """Draw the shared factors of a patient from (seed, patient)."""
    rng = np.random.default_rng([seed, 0, patient])
    names = tuple(MACHINES)
    return Patient(
        weeks=float(rng.uniform(18, 36)),
        machine=names[rng.choice(len(names), p=[MACHINES[n][0] for n in names])],
        operator=OPERATORS[rng.integers(len(OPERATORS))],
        wall=float(rng.uniform(10, 26)),
        habitus=float(rng.uniform(0.8, 1.35)),
        head=float(rng.normal(1, 0.04)),
    )


def render_phantom(
    index: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (384, 512),
    images_per_patient: int = 12,
    overlays: bool = True,
    task: str = "planes",
    settings: int | None = None,
) -> PhantomImage:
    """Render image `index`; its patient is `index // images_per_patient`.

    size: (H, W). overlays: burn in text, ticks, grey bar and calipers.
    task: "planes" draws the six planes, each once in every six images of a patient, in
        a random order; "fass" only abdomens, with masks of FASS_STRUCTURES; "jnu" the
        frames of a patient's clip in labour, with masks of JNU_STRUCTURES.
    settings: None draws the probe, the frame and the mother anew for every image;
        a number lets all images share that many of them, so that what is left to see
        is the fetus. An easier world, for runs of minutes.
    Raises UserError for an unknown task, a negative index or a frame under 16 px.
    """
    _check(index, seed, size, images_per_patient, task)
    number, order = divmod(index, images_per_patient)
    patient = make_patient(number, seed)
    machine = MACHINES[patient.machine][1]
    # Separate streams: speckle depends on the grid, anatomy and view must not. The
    # second word keeps purposes apart (numpy takes [1, 2] and [1, 2, 0] for the same).
    stream = TASKS.index(task) + 1
    noise = np.random.default_rng([seed, stream, number, order, 1])
    # The frames of a clip share their scene; what moves is given by `order` alone.
    still = [seed, 8, number] if task == "jnu" else [seed, stream, number, order]
    scene = np.random.default_rng(still)

    def setting(purpose: int) -> np.random.Generator:
        # A stream for each purpose: what one plane draws must not move another's.
        if settings is None:
            return scene
        return np.random.default_rng([seed, 9, index % settings, purpose])

    plane = _plane(task, seed, number, order)
    probe = _probe(setting(1), machine, patient, plane, task)
    view = imaging.fit_view(probe, size, setting(2))
    brush = Brush(probe, (224, 88) if max(size) <= 256 else (448, 176))
    brain_plane = "Not A Brain"
    if task == "jnu":
        _paint_labour(brush, scene, patient, order / images_per_patient)
    elif plane == "Maternal cervix":
        _paint_cervix(brush, scene, setting(3), patient)
    else:
        if plane == "Fetal brain":
            share = [0.53, 0.23, 0.19, 0.05]  # as in FETAL_PLANES_DB
            brain_plane = anatomy.BRAIN_PLANES[scene.choice(4, p=share)]
        _paint_fetus(brush, scene, setting(3), patient, plane, brain_plane)

    beams = imaging.form_beams(
        brush.maps,
        probe,
        machine,
        habitus=patient.habitus,
        wall=patient.wall,
        pitch=view.mm_per_px,
        anatomy_rng=setting(4),
        noise_rng=noise,
    )
    image, sector = imaging.scan_convert(beams, probe, view, size)
    if overlays:
        imaging.draw_overlays(image, view, brush.calipers, patient.weeks, setting(5))
    names = WANTED[task] or tuple(brush.structures)
    masks = _visible_masks(brush.structures, view, sector)
    return PhantomImage(
        image=image,
        label=PLANES.index(plane),
        plane=plane,
        brain_plane=brain_plane,
        patient=number,
        machine=patient.machine,
        operator=patient.operator,
        masks={name: masks.get(name, np.zeros_like(image)) for name in names},
        mm_per_px=view.mm_per_px,
    )


def _check(index, seed, size, images_per_patient, task):
    if task not in TASKS:
        raise UserError(f"phantom: task {task!r} is none of {', '.join(TASKS)}")
    if index < 0 or seed < 0 or images_per_patient < 1:
        raise UserError(
            f"phantom: index {index}, seed {seed} must be >= 0 and "
            f"images_per_patient {images_per_patient} >= 1"
        )
    if min(size) < 16:
        raise UserError(f"phantom: size {size} is under 16 pixels")


def _visible_masks(structures, view, sector):
    """Masks in the order of painting: what was painted later covers what lay there."""
    masks = {}
    for name, polygons in structures.items():
        mask = imaging.draw_mask(polygons, view, sector)
        masks = {other: under & (1 - mask) for other, under in masks.items()}
        masks[name] = mask
    return masks


def _plane(task, seed, number, order):
    if task == "fass":
        return "Fetal abdomen"
    if task == "jnu":
        return "Other"
    block, place = divmod(order, len(PLANES))
    rng = np.random.default_rng([seed, 7, number, block])
    return PLANES[rng.permutation(len(PLANES))[place]]


def _size(plane: str, patient: Patient) -> float:
    """Half size in mm of what a plane shows, after the usual growth charts."""
    g = patient.weeks / 30
    return {
        "Other": 36 * g,
        "Maternal cervix": 30.0,
        "Fetal abdomen": 41 * g**1.25,
        "Fetal brain": 46 * g**0.8 * patient.head,
        "Fetal femur": 34 * g**1.2,
        "Fetal thorax": 36 * g**1.2,
    }[plane]


def _probe(rng, machine: Machine, patient: Patient, plane: str, task: str) -> Probe:
    """A fan of class-blind shape, with a depth that suits the plane."""
    if task == "jnu":
        depth, wide = rng.uniform(112, 132), False
    else:
        reach = patient.wall + 2.0 * _size(plane, patient) + rng.uniform(2, 10)
        depth, wide = max(70.0, reach), rng.random() < WIDE_SHARE
    if wide:
        angle, slenderness = rng.uniform(50, 66), rng.uniform(4.5, 8.0)
    else:
        angle, slenderness = machine.half_angle * rng.normal(1, 0.04), None
    if slenderness is None:
        slenderness = rng.uniform(1.9, 3.4)
    return Probe(depth / slenderness, np.deg2rad(angle), depth)


def _paint_fetus(
    brush, rng, mother_rng, patient: Patient, plane: str, brain_plane: str
):
    # Little fluid at times, so that a dark pocket does not separate fetus from cervix.
    anatomy.maternal(brush, mother_rng, patient.wall, fluid=mother_rng.random() < 0.8)
    size = _size(plane, patient) * rng.normal(1, 0.06)
    room = brush.probe.depth - patient.wall - 1.6 * size
    depth = patient.wall + 0.9 * size + rng.uniform(0.2, 0.8) * max(room, 0)
    x, y = brush.probe.polar(depth, rng.uniform(-0.2, 0.2) * brush.probe.half_angle)
    # The operator turns the probe until a standard plane lies across the beam, either
    # way round; whatever else is seen lies as it lies.
    rot = rng.normal(0, 0.3) + rng.choice([0, np.pi])
    if plane == "Other":
        rot = rng.uniform(-np.pi, np.pi)
    if rng.random() < 0.4:  # a limb nearby, in whatever plane
        far = rng.uniform(0, 2 * np.pi)
        near = x + 1.5 * size * np.cos(far), y + 1.3 * size * np.sin(far)
        anatomy.limb(brush.within(*near, 0.4 * size, rng.uniform(0, np.pi)), rng)
    fetus = brush.within(x, y, size, rot, rng.choice([-1, 1]))
    if plane == "Fetal brain":
        anatomy.brain(fetus, rng, brain_plane)
    else:
        {
            "Fetal abdomen": anatomy.abdomen,
            "Fetal thorax": anatomy.thorax,
            "Fetal femur": anatomy.femur,
            "Other": phantom_other.other,
        }[plane](fetus, rng)


def _paint_cervix(brush, rng, mother_rng, patient: Patient):
    depth = brush.probe.depth
    through_wall = rng.random() < 0.5  # transabdominal, else endovaginal or perineal
    wall = patient.wall if through_wall else rng.uniform(2, 6)
    anatomy.maternal(brush, mother_rng, wall, fluid=mother_rng.random() < 0.3)
    at = rng.uniform(wall + 22, max(0.65 * depth, wall + 26))
    x, y = brush.probe.polar(at, rng.uniform(-0.3, 0.3) * brush.probe.half_angle)
    size = rng.uniform(0.9, 1.25)
    canal = brush.within(x, y, size, rng.normal(0, 0.5), rng.choice([-1, 1]))
    anatomy.cervix(canal, rng, _size("Fetal brain", patient) / size)


def _paint_labour(brush, rng, patient: Patient, progress: float):
    anatomy.maternal(brush, rng, 8.0, fluid=False)
    start, gain = rng.uniform(0, 0.6), rng.uniform(0.1, 0.5)
    shown = rng.choice(4, p=[0.15, 0.05, 0.2, 0.6])  # shares as in JNU-IFM
    # Tilted, aside, either way round: a mean mask must not pass for a segmentation.
    aside, tilt, flip = rng.normal(0, 6), rng.normal(0, 0.2), rng.choice([-1, 1])
    phantom_other.intrapartum(
        brush.within(aside, 60, 1, tilt, flip),
        rng,
        start + gain * progress,
        symphysis=shown in (1, 3),
        head=shown in (2, 3),
    )
