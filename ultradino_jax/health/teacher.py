"""The health of a teacher, measured on a fixed small set of images.

Nothing here touches the training state: the numbers are a function of the weights, the
source and the settings, so a resumed run gets the same ones.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.data.datasets.table import load_class_folders, load_csv
from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.sources import BadImage
from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.features import Preprocess, extract_features
from ultradino_jax.health.features import feature_health, prototypes_used
from ultradino_jax.health.phantom_knn import Labelled, knn_score, labelled_phantoms
from ultradino_jax.weights.backbone import Backbone

PANEL_IMAGES = 4
CHUNK = 64


def sample_source(source, count: int, preprocess: Preprocess, seed: int = 0):
    """Up to `count` readable images of a source as uint8 [n,S,S,C].

    Drawn in pairs of consecutive records: neighbours in a folder are often frames of
    one clip, which is where duplicates are.
    """
    total = len(source)
    starts = np.random.default_rng(seed).permutation(total)
    order = np.stack([starts, (starts + 1) % total], axis=1).ravel().tolist()
    images = []
    for index in dict.fromkeys(order):
        if len(images) >= count:
            break
        try:
            images.append(preprocess.resize(source[index]))
        except BadImage:
            continue
    if not images:
        raise UserError("the probe found no readable image in data.root")
    return np.stack(images)


def load_labelled(
    labels: str, patients: int, phantom: PhantomSource, preprocess: Preprocess
) -> Labelled:
    """The labelled set: '' is the phantom, else a csv or a folder per class.

    Of a data set the training split is known and the rest is classified. Raises
    UserError or OSError with one line.
    """
    if not labels:
        return labelled_phantoms(patients, phantom, preprocess.image_size)
    load = load_csv if Path(labels).suffix == ".csv" else load_class_folders
    data = load(labels)
    images = np.stack([preprocess.resize(data[i]) for i in range(len(data))])
    return Labelled(images, data.labels, data.splits == "train", len(data.classes))


class Probe:
    """Health of a teacher: probe(backbone, head, head_params, center) -> values.

    source: training images, of which `images` are looked at. labels, patients,
    phantom: see `load_labelled`.
    """

    def __init__(self, source, *, images: int, labels: str, patients: int, phantom):
        self.source, self.images, self.labels = source, images, labels
        self.patients, self.phantom = patients, phantom

    def prepare(self, backbone: Backbone) -> None:
        """Read the images, once. Raises UserError or OSError with one line."""
        preprocess = Preprocess.of(backbone, antialias=True)
        self.sample = sample_source(self.source, self.images, preprocess)
        self.labelled = load_labelled(
            self.labels, self.patients, self.phantom, preprocess
        )

    def panel_images(self) -> np.ndarray:
        """The same few training images every time, [4,S,S,C], not frames of a pair."""
        return self.sample[: 2 * PANEL_IMAGES : 2]

    def __call__(self, backbone: Backbone, head, head_params, center):
        """Values of health.jsonl; `head` and `center` [K] are the teacher's, DINO's."""
        features = extract_features(backbone, self.sample, name="health")
        cls = features.cls[:, -1]
        winners = winning_prototypes(head, head_params, center, cls)
        return {
            "knn": knn_score(backbone, self.labelled),
            **feature_health(cls, features.mean_patch),
            "prototypes_used": prototypes_used(winners, head.num_prototypes),
        }


@functools.partial(jax.jit, static_argnames="head")
def _winners(head, params, center, x):
    return jnp.argmax(head.apply({"params": params}, x) - center, axis=-1)


def winning_prototypes(head, params, center, tokens) -> np.ndarray:
    """Prototype of the highest centred logit for each token: [n,D] -> int [n]."""
    parts = []
    for start in range(0, len(tokens), CHUNK):
        rows = tokens[start : start + CHUNK]
        padded = np.pad(rows, ((0, CHUNK - len(rows)), (0, 0)))
        parts.append(np.asarray(_winners(head, params, center, padded))[: len(rows)])
    return np.concatenate(parts)
