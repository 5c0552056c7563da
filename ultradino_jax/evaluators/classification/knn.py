"""Weighted nearest-neighbour classification of DINO on cosine similarity."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.errors import UserError


@functools.partial(jax.jit, static_argnames=("ks", "num_classes", "max_k"))
def _votes(train, one_hot_labels, test, temperature, *, ks, num_classes, max_k):
    similarity = jnp.einsum("md,nd->mn", test, train, precision="highest")
    top, index = jax.lax.top_k(similarity, max_k)
    weights = jax.nn.softmax(top / temperature, axis=-1)
    votes = weights[:, :, None] * one_hot_labels[index]
    return tuple(votes[:, :k].sum(axis=1) for k in ks)


def knn_votes(
    train_features,
    train_labels,
    test_features,
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk: int = 256,
) -> dict[int, np.ndarray]:
    """Votes per class, {k: float32 [m, Y]}, of m test rows [m, D] among n [n, D].

    Features are L2-normalised here. The weights are softmax(cosine / temperature) over
    the max(ks) nearest rows, then cut to the first k and not normalised again, so they
    sum to less than one for smaller k. A k above n means all n rows.
    Raises UserError when the training set is empty or the labels do not fit.
    Source: DINOv2 `eval/knn.py` KnnModule.
    """
    train, test = (_unit_rows(x) for x in (train_features, test_features))
    labels = np.asarray(train_labels)
    if len(train) == 0 or len(labels) != len(train):
        raise UserError(
            f"kNN needs a label per training row: {len(train)} rows, "
            f"{len(labels)} labels"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"training labels span {labels.min()}..{labels.max()}, "
            f"outside of {num_classes} classes"
        )
    one_hot = jax.nn.one_hot(labels, num_classes)
    settings = dict(
        ks=tuple(min(k, len(train)) for k in ks),
        num_classes=num_classes,
        max_k=min(max(ks), len(train)),
    )
    train = jnp.asarray(train)
    parts = []
    for start in range(0, len(test), chunk):
        rows = test[start : start + chunk]
        padded = np.pad(rows, ((0, chunk - len(rows)), (0, 0)))
        votes = _votes(train, one_hot, padded, temperature, **settings)
        parts.append([np.asarray(v)[: len(rows)] for v in votes])
    empty = [np.zeros((0, num_classes), np.float32)] * len(ks)
    columns = zip(*(parts or [empty]), strict=True)
    return {k: np.concatenate(c) for k, c in zip(ks, columns, strict=True)}


def knn_accuracy(
    train_features,
    train_labels,
    test_features,
    test_labels,
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy {k: [0,1]} of `knn_votes`; shapes as there."""
    votes = knn_votes(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        ks=ks,
        temperature=temperature,
    )
    truth = np.asarray(test_labels)
    return {k: float((v.argmax(axis=1) == truth).mean()) for k, v in votes.items()}


def _unit_rows(x) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
