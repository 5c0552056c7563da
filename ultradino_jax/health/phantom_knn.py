"""The kNN accuracy of a teacher: one number for the probe, the guard and the end.

On phantom patients it is compared with the same network untrained and with raw pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultradino_jax.data.crops import resized_crop
from ultradino_jax.data.phantom.render import PLANES, render_phantom
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.evaluators.baselines import untrained
from ultradino_jax.evaluators.classification.knn import knn_accuracy
from ultradino_jax.evaluators.features import extract_features
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.whole import write_json

K = 20  # neighbours
IMAGES_PER_PATIENT = 12
# Far past any training set, so that no patient is both trained and tested on.
FIRST_PATIENT = 1_000_000


@dataclass(frozen=True)
class KnnSettings:
    """The kNN of a run on phantom patients, half of them known.

    enabled: whether it is scored at the end. guard: how far it may fall below that of
    the weights a run continues from, 0 for any depth. phantom: what they look like.
    """

    enabled: bool
    patients: int
    guard: float
    phantom: PhantomSource


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [n,S,S,C] with labels [n]; `known` marks the neighbours' half."""

    images: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    classes: int

    def accuracy(self, features: np.ndarray) -> float:
        """kNN accuracy, 0 to 1, of the images that are not known; features [n,F]."""
        known, y = self.known, self.labels
        split = (features[known], y[known], features[~known], y[~known])
        return knn_accuracy(*split, num_classes=self.classes, ks=(K,))[K]


def labelled_phantoms(patients: int, source: PhantomSource, side: int) -> Labelled:
    """Unseen patients, the first half of them known, images [n,side,side,1].

    They are drawn as `source` draws its images and, like the training crops, reduced
    with antialiasing.
    """
    first = FIRST_PATIENT * IMAGES_PER_PATIENT
    phantoms = [
        render_phantom(i, seed=source.seed, size=source.size, settings=source.settings)
        for i in range(first, first + patients * IMAGES_PER_PATIENT)
    ]
    whole = [np.array([0, 0, *p.image.shape]) for p in phantoms]
    images = [
        resized_crop(p.image[:, :, None], box, side)
        for p, box in zip(phantoms, whole, strict=True)
    ]
    return Labelled(
        np.stack(images),
        np.array([p.label for p in phantoms]),
        np.array([p.patient for p in phantoms]) < FIRST_PATIENT + patients // 2,
        len(PLANES),
    )


def frozen_features(backbone: Backbone, images) -> np.ndarray:
    """CLS and mean patch token of the last block, each of unit length: [n, 2D]."""
    features = extract_features(backbone, images, name="kNN")
    parts = (features.cls[:, -1], features.mean_patch)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in parts]
    return np.concatenate(unit, axis=1)


def knn_score(backbone: Backbone, labelled: Labelled) -> float:
    """THE kNN accuracy of a backbone, 0 to 1."""
    return labelled.accuracy(frozen_features(backbone, labelled.images))


def make_guard(
    settings: KnnSettings, start: Backbone, report=print
) -> Callable[[Backbone, int], str | None]:
    """Check of a run that continues from `start`: guard(teacher, step) -> message.

    The message says that the teacher's kNN accuracy fell more than `settings.guard`
    below that of the starting weights; None if it did not.
    """
    labelled = labelled_phantoms(settings.patients, settings.phantom, start.image_size)
    before = knn_score(start, labelled)

    def guard(teacher: Backbone, step: int) -> str | None:
        now = knn_score(teacher, labelled)
        report(f"guard at step {step}: kNN {now:.3f}, starting weights {before:.3f}")
        if now >= before - settings.guard:
            return None
        return (
            f"the teacher's phantom kNN fell to {now:.3f} at step {step}, "
            f"{before - now:.3f} below the starting weights (knn.guard "
            f"{settings.guard}); try a lower optim.base_lr or a longer "
            "optim.freeze_backbone_epochs"
        )

    return guard


def phantom_knn(
    workdir: str | Path, patients: int, source: PhantomSource, *, report=print
) -> dict[str, float]:
    """Accuracy of k-nearest-neighbour plane classification, by kind of feature.

    `source` says what the phantoms look like. The first half of the patients gives the
    labelled neighbours, the rest is classified. Reads workdir/backbone, writes
    workdir/knn.json and prints one table.
    """
    backbone = load_backbone(workdir)
    labelled = labelled_phantoms(patients, source, backbone.image_size)
    pixels = labelled.images.reshape(len(labelled.images), -1)
    scores = {
        "teacher": knn_score(backbone, labelled),
        "random init": knn_score(untrained(backbone), labelled),
        "raw pixels": labelled.accuracy(pixels.astype(np.float32) / 255),
    }
    report(
        f"kNN (k={K}) on {patients - patients // 2} phantom patients, neighbours from "
        f"{patients // 2} others, {len(PLANES)} planes:"
    )
    for name, score in scores.items():
        report(f"  {name:12s} {100 * score:5.1f} %")
    write_json(Path(workdir) / "knn.json", scores)
    return scores
