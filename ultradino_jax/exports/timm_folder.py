"""Folders for timm: backbones."""

from pathlib import Path

import numpy as np

from ultradino_jax.exports.format import Format, split_tokens, write_json, write_tensors
from ultradino_jax.models.vit import VARIANTS
from ultradino_jax.weights.backbone import Backbone, backbone_record
from ultradino_jax.weights.meta import vit_state
from ultradino_jax.weights.timm import to_timm

_USE = """```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
tokens = model.forward_features(images)  # float32 [B,{c},{s},{s}], normalised
cls, patches = tokens[:, 0], tokens[:, {first}:]
```

Older versions of timm: `timm.create_model("{architecture}", checkpoint_path=
"FOLDER/model.safetensors", **model_args)` with `model_args` of config.json."""


def timm_config(backbone: Backbone) -> dict:
    """config.json for `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
    model = backbone.model
    sizes = (model.embed_dim, model.depth)
    variant = next((k for k, v in VARIANTS.items() if v[:2] == sizes), "base")
    variant = "base" if variant == "tiny" else variant  # timm's tiny is a deeper one
    return {
        "architecture": f"vit_{variant}_patch16_224",
        "num_classes": 0,
        "num_features": model.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": backbone.image_size,
            "patch_size": model.patch_size,
            "in_chans": backbone.channels,
            "embed_dim": model.embed_dim,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": model.mlp_ratio,
            "init_values": model.layerscale,
            "reg_tokens": model.num_registers,
            "no_embed_class": model.num_registers > 0,
            "dynamic_img_size": True,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "input_size": [backbone.channels, *2 * (backbone.image_size,)],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """A folder for `timm.create_model`."""
    model = backbone.model
    state = vit_state(backbone.params, patch_size=model.patch_size)
    state = to_timm(state, class_position=not model.num_registers)
    write_tensors(folder, state, {**backbone_record(backbone), "naming": "timm"})
    write_json(folder / "config.json", timm_config(backbone))


def target(folder: Path, kind: str):
    """`Format.target`."""
    # Optional: whoever checks an export installs it.
    import timm  # pyright: ignore[reportMissingImports]
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(images))
        return split_tokens(tokens.numpy(), model.num_prefix_tokens)

    return f"timm {timm.__version__}, torch {torch.__version__}", run


FORMAT = Format(
    write={"backbone": write_backbone},
    usage={"backbone": _USE},
    library="timm",
    hub_library="timm",
    target=target,
)
