"""Meta's DINOv2 files, and UltraDINO's, which have the same names.

One input channel tells UltraDINO's apart: their positions are interpolated as DINOv2's
without registers even where there are some.
"""

import numpy as np

from ultradino_jax.models.vit import ViT
from ultradino_jax.weights.family import Family, Found
from ultradino_jax.weights.files import WeightFile
from ultradino_jax.weights.vit import Naming, read_vit, resize_vit

_DINOV2 = Naming("dinov2", {False: (0.1, False), True: (0.0, True)})
_ULTRADINO = Naming("ultradino", {False: (0.1, False), True: (0.1, False)})


def _read(file: WeightFile, **sizes) -> Found:
    kernel = file.tensors.get("patch_embed.proj.weight", np.empty(0))
    naming = _ULTRADINO if kernel.shape[1:2] == (1,) else _DINOV2
    return read_vit(naming, file, **sizes)


FAMILY = Family(
    marks=(r"^(mask_token|register_tokens)$",),
    read=_read,
    model=ViT,
    resize=resize_vit,
)
