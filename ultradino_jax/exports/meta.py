"""DINOv2's and UltraDINO's teacher_checkpoint.pth: backbones, with their heads."""

import json
from pathlib import Path

import numpy as np

from ultradino_jax.exports.format import Format
from ultradino_jax.weights.backbone import Backbone, backbone_record
from ultradino_jax.weights.files import RECORD_KEY, import_torch
from ultradino_jax.weights.meta import dino_head_state, vit_state

_USE = """`teacher_checkpoint.pth` is what DINOv2 and UltraDINO training saves:
`torch.load(..)["teacher"]` holds `backbone.*` (and `dino_head.*` when heads were
exported), for `DinoVisionTransformer` with `img_size={s}, patch_size={p},
in_chans={c}, num_register_tokens={r}, block_chunks=0`."""


def write_backbone(backbone: Backbone, folder: Path, heads: dict | None = None) -> None:
    """The file. Raises MissingPackage without torch."""
    torch = import_torch()
    state = vit_state(backbone.params, patch_size=backbone.model.patch_size)
    teacher = {f"backbone.{name}": x for name, x in state.items()}
    for head, params in (heads or {}).items():
        teacher |= {f"{head}.{k}": x for k, x in dino_head_state(params).items()}
    # np.array: torch must own the memory, and a jax array's is read-only.
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in teacher.items()}
    record = {**backbone_record(backbone), "naming": "meta"}
    content = {"teacher": tensors, RECORD_KEY: json.dumps(record)}
    torch.save(content, folder / "teacher_checkpoint.pth")


FORMAT = Format(
    write={"backbone": write_backbone},
    usage={"backbone": _USE},
    no_target="its code is not a Python package",
    holds_heads=True,
)
