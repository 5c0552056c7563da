"""Backbones leave: the files of every format, and features in the library they are for.

`write(format, ..)` fills a folder; `target_model(format, ..)` loads the result in the
library it is for. What names and shapes cannot say (statistics, position flags) travels
in the safetensors header, or under a key of its own, and a file loads back unchanged.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ultradino_jax.backbone import Backbone, backbone_record
from ultradino_jax.errors import UserError
from ultradino_jax.exports.onnx_backbone import import_onnx, vit_onnx
from ultradino_jax.models.vit import VARIANTS, ViT
from ultradino_jax.tree import flat_names
from ultradino_jax.weights import naming
from ultradino_jax.weights.files import RECORD_KEY, import_torch
from ultradino_jax.weights.meta import dino_head_state, vit_state
from ultradino_jax.weights.safetensors import write_safetensors

FORMATS = ("hf", "timm", "meta", "onnx", "safetensors")
# The library in which an export is checked. Meta's code is no package.
TARGETS = {"hf": "transformers", "timm": "timm", "onnx": "onnxruntime"}


def write(kind: str, backbone: Backbone, folder: Path, heads: dict | None) -> None:
    """Write a backbone's files into an existing folder.

    kind: one of FORMATS. heads: {'dino_head': params, ..} to keep beside it, possible
    for 'meta' only. Raises UserError for an unknown format, for heads elsewhere and
    for a model that the format cannot hold; ImportError naming the missing extra.
    """
    if kind not in FORMATS:
        raise UserError(f"unknown format {kind!r}; choose one of {', '.join(FORMATS)}")
    if heads and kind != "meta":
        raise UserError(f"format {kind!r} has no place for projection heads; use meta")
    if kind != "safetensors" and not isinstance(backbone.model, ViT):
        raise UserError(
            f"{backbone.name}: format {kind!r} holds DINOv2-style ViTs only; "
            "'safetensors' holds any backbone"
        )
    record = {**backbone_record(backbone), "naming": kind}
    if kind == "onnx":
        import_onnx().save(vit_onnx(backbone), folder / "model.onnx")
        return
    if kind == "safetensors":
        write_own(folder, backbone.params, record)
        return
    state = vit_state(backbone.params, patch_size=backbone.model.patch_size)
    if kind == "meta":
        _write_meta(folder, state, heads or {}, record)
    elif kind == "hf":
        write_tensors(folder, naming.to_hf(state), record)
        write_json(folder / "config.json", hf_config(backbone))
        write_json(folder / "preprocessor_config.json", hf_processor(backbone))
    else:
        class_position = not backbone.model.num_registers
        state = naming.to_timm(state, class_position=class_position)
        write_tensors(folder, state, record)
        write_json(folder / "config.json", timm_config(backbone))


def write_own(folder: Path, tree, record: dict) -> None:
    """One flat file of a parameter tree, the record in its header and beside it."""
    record = {**record, "naming": "own"}
    flat = {k: np.asarray(x) for k, x in flat_names(tree).items()}
    write_tensors(folder, flat, record)
    write_json(folder / "record.json", record)


def write_json(path: Path, content: dict) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tensors(folder: Path, tensors: dict, record: dict) -> None:
    """model.safetensors with a record in its header."""
    # transformers refuses a file that does not say which framework it is for.
    metadata = {"format": "pt", RECORD_KEY: json.dumps(record)}
    write_safetensors(folder / "model.safetensors", tensors, metadata)


def _write_meta(folder: Path, state: dict, heads: dict, record: dict) -> None:
    """UltraDINO's and DINOv2's teacher_checkpoint.pth."""
    torch = import_torch()
    teacher = {f"backbone.{name}": x for name, x in state.items()}
    for head, params in heads.items():
        teacher |= {f"{head}.{k}": x for k, x in dino_head_state(params).items()}
    # np.array: torch must own the memory, and a jax array's is read-only.
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in teacher.items()}
    content = {"teacher": tensors, RECORD_KEY: json.dumps(record)}
    torch.save(content, folder / "teacher_checkpoint.pth")


def hf_config(backbone: Backbone) -> dict:
    """config.json of Dinov2Model, or Dinov2WithRegistersModel when there are any."""
    model = backbone.model
    registers = model.num_registers
    kind = "dinov2_with_registers" if registers else "dinov2"
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    config = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0 if model.layerscale is None else model.layerscale,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "drop_path_rate": 0.0,
        "image_size": backbone.image_size,
        "patch_size": model.patch_size,
        "num_channels": backbone.channels,
        "torch_dtype": "float32",
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def hf_processor(backbone: Backbone) -> dict:
    """preprocessor_config.json: whole image resized, no crop, this run's statistics.

    do_convert_rgb is off for a one-channel model: transformers would otherwise hand it
    three channels. Bilinear, as the features were evaluated.
    """
    side = {"height": backbone.image_size, "width": backbone.image_size}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "do_convert_rgb": backbone.channels == 3,
    }


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


def onnx_target(folder: Path, outputs: tuple[str, ...]):
    """(library and version, function) of model.onnx in onnxruntime.

    The function maps normalised images, float32 [B,C,S,S], to {output: array}.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def run(images: np.ndarray) -> dict[str, Any]:
        arrays = session.run(list(outputs), {"pixel_values": images})
        return dict(zip(outputs, arrays, strict=True))

    return f"onnxruntime {onnxruntime.__version__}", run


def hf_model(folder: Path):
    """(library and versions, model) of a Hugging Face folder."""
    import torch
    import transformers

    # The class that the export names, not AutoModel: it has to work with that one.
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    return f"transformers {transformers.__version__}, torch {torch.__version__}", model


def target_model(kind: str, folder: Path):
    """(library and version, function) of an export, loaded in its target library.

    The function maps normalised images, float32 [B,C,S,S], to {'cls': [B,D], 'patch':
    [B,N,D]}. Raises ImportError when the library is missing, which leaves the export
    unchecked there.
    """
    if kind == "onnx":
        return onnx_target(folder, ("cls", "patch"))
    import torch

    if kind == "hf":
        library, model = hf_model(folder)
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    else:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        prefix = model.num_prefix_tokens
        library = f"timm {timm.__version__}, torch {torch.__version__}"

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            x = torch.from_numpy(images)
            if kind == "hf":
                tokens = model(pixel_values=x).last_hidden_state.numpy()
            else:
                tokens = model.forward_features(x).numpy()
        return {"cls": tokens[:, 0], "patch": tokens[:, prefix:]}

    return library, run
