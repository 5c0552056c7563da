"""Supervised segmentation networks, trained from scratch beside UperNet."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ultradino_jax.errors import UserError
from ultradino_jax.evaluators.baselines import IMAGE_SIZE
from ultradino_jax.models.multiresunet import MultiResUNet
from ultradino_jax.models.unet import UNet
from ultradino_jax.models.unetr import UNETR
from ultradino_jax.normalization import FUS
from ultradino_jax.weights.backbone import Backbone

NETWORKS = {"unet": UNet, "multiresunet": MultiResUNet, "unetr": UNETR}


@dataclass(frozen=True)
class Network:
    """A network without parameters yet, and how its input is made.

    name: a key of NETWORKS; options: fields of its module. image_size: S in pixels;
    channels: C; mean, std: per channel, on the [0,1] scale.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def build(self, num_classes: int):
        """The Flax module with Y outputs."""
        options = dict(self.options)
        if self.name == "unetr":
            options["image_size"] = self.image_size
        return NETWORKS[self.name](num_classes, **options)

    def record(self) -> dict:
        """JSON values from which `from_record` makes it again."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_record(cls, record: dict) -> "Network":
        """The inverse. Raises UserError for an unknown network."""
        if record["name"] not in NETWORKS:
            raise UserError(f"unknown segmentation network {record['name']!r}")
        fields = {**record, "options": tuple(map(tuple, record["options"]))}
        for key in ("mean", "std"):
            fields[key] = tuple(record[key])
        return cls(**fields)

    @property
    def digest(self) -> str:
        """sha256 of the record: what was trained, as a backbone's digest says."""
        text = json.dumps(self.record(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_network(
    name: str,
    options: tuple[tuple[str, Any], ...],
    like: Backbone | None,
    *,
    image_size: int = 0,
    channels: int = 0,
) -> Network:
    """A network by name; its input is that of `like`, when there is one.

    options: fields of its module. Without `like` the input is of `image_size` and
    `channels` (0 for 224 and 1), normalised as from-scratch ViTs.
    """
    if like is not None:
        size = (like.image_size, like.channels)
        return Network(name, options, *size, like.mean, like.std)
    channels = channels or 1
    mean, std = (values * channels for values in FUS)
    return Network(name, options, image_size or IMAGE_SIZE, channels, mean, std)
