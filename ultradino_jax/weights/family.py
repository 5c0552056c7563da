"""What has to be known of a family of weights, stated once per family.

To add a backbone: its module goes into models/, a FAMILY (below) into a module of this
folder, and that module's line into the table of families.py. Loading files, own
checkpoints of the new model and resizing it then work; nothing else names it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ultradino_jax.normalization import FUS, IMAGENET

Statistics = tuple[Sequence[float], Sequence[float]]


class Found(NamedTuple):
    """A file's content as a model.

    title: how the backbone's name starts ('dinov2'). model, params: the Flax module and
    its parameters, NumPy arrays. channels: C. ignored: names of tensors that were left
    out on purpose.
    """

    title: str
    model: Any
    params: dict
    channels: int
    ignored: Sequence[str]


def by_channels(channels: int) -> Statistics:
    """(mean, std) of grey models of fetal ultrasound, and of ImageNet's colour ones."""
    return FUS if channels == 1 else IMAGENET


@dataclass(frozen=True)
class Family:
    """One way in which published files name the tensors of one model class.

    marks: regular expressions; a file with a tensor name that one of them matches is of
    this family. weak_marks: the same, asked once no family's marks are found.
    read: read(file, num_heads=..) -> Found, where file is a `WeightFile` and num_heads
    A or None. It places every tensor or names it in `ignored`, and raises UserError for
    a file that does not fit whole.
    model: the module's class. resize: resize(model, params, (height, width)) -> params
    whose positions belong to a grid of that many patches.
    statistics: C -> (mean, std) where a file does not say its own.
    """

    marks: tuple[str, ...]
    read: Callable[..., Found]
    model: type
    resize: Callable[..., dict]
    weak_marks: tuple[str, ...] = ()
    statistics: Callable[[int], Statistics] = by_channels
