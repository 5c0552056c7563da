"""kNN on phantom patients: teacher, the same network untrained, and raw pixels."""

import json
from pathlib import Path

import numpy as np

from ultradino_jax.backbone import Backbone
from ultradino_jax.data.crops import resized_crop
from ultradino_jax.data.phantom.render import PLANES, render_phantom
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.evaluators.baselines import untrained
from ultradino_jax.evaluators.classification.knn import knn_accuracy
from ultradino_jax.evaluators.features import extract_features
from ultradino_jax.weights.load import load_backbone

IMAGES_PER_PATIENT = 12
# Far past any training set, so that no patient is both trained and tested on.
FIRST_PATIENT = 1_000_000


def labelled_phantoms(patients: int, source: PhantomSource, side: int):
    """(images uint8 [n,side,side], labels [n], patients [n]) of unseen patients.

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
    return (
        np.stack(images),
        np.array([p.label for p in phantoms]),
        np.array([p.patient for p in phantoms]),
    )


def frozen_features(backbone: Backbone, images) -> np.ndarray:
    """CLS and mean patch token of the last block, each of unit length: [n, 2D]."""
    features = extract_features(backbone, images)
    parts = (features.cls[:, -1], features.mean_patch)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in parts]
    return np.concatenate(unit, axis=1)


def knn_score(backbone: Backbone, images, labels, known, k: int = 20) -> float:
    """kNN accuracy of the images that are not `known`."""
    return _accuracy(frozen_features(backbone, images), labels, known, k)


def _accuracy(x, labels, known, k):
    split = (x[known], labels[known], x[~known], labels[~known])
    return knn_accuracy(*split, num_classes=len(PLANES), ks=(k,))[k]


def make_guard(patients: int, source: PhantomSource, max_drop: float, report=print):
    """Check of a continued run: guard(teacher, start, step) -> message or None.

    The message says that the teacher's phantom kNN accuracy fell more than `max_drop`
    below that of the weights it started from.
    """
    reference = {}

    def guard(teacher: Backbone, start: Backbone, step: int) -> str | None:
        side = teacher.image_size
        images, labels, groups = labelled_phantoms(patients, source, side)
        data = (images, labels, groups < FIRST_PATIENT + patients // 2)
        if not reference:
            reference["start"] = knn_score(start, *data)
        before, now = reference["start"], knn_score(teacher, *data)
        report(f"guard at step {step}: kNN {now:.3f}, starting weights {before:.3f}")
        if now >= before - max_drop:
            return None
        return (
            f"the teacher's phantom kNN fell to {now:.3f} at step {step}, "
            f"{before - now:.3f} below the starting weights (knn.guard {max_drop}); "
            "try a lower optim.base_lr or a longer optim.freeze_backbone_epochs"
        )

    return guard


def phantom_knn(
    workdir: str | Path,
    patients: int,
    source: PhantomSource,
    *,
    k: int = 20,
    report=print,
) -> dict[str, float]:
    """Accuracy of k-nearest-neighbour plane classification, by kind of feature.

    `source` says what the phantoms look like. The first half of the patients gives the
    labelled neighbours, the rest is classified. Reads workdir/backbone, writes
    workdir/knn.json and prints one table.
    """
    backbone = load_backbone(workdir)
    images, labels, groups = labelled_phantoms(patients, source, backbone.image_size)
    known = groups < FIRST_PATIENT + patients // 2
    pixels = images.reshape(len(images), -1)
    features = {
        "teacher": frozen_features(backbone, images),
        "random init": frozen_features(untrained(backbone), images),
        "raw pixels": pixels.astype(np.float32) / 255,
    }
    scores = {name: _accuracy(x, labels, known, k) for name, x in features.items()}
    report(
        f"kNN (k={k}) on {patients - patients // 2} phantom patients, neighbours from "
        f"{patients // 2} others, {len(PLANES)} planes:"
    )
    for name, score in scores.items():
        report(f"  {name:12s} {100 * score:5.1f} %")
    (Path(workdir) / "knn.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores
