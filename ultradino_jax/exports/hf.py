"""Hugging Face folders, for transformers: backbones and classifiers."""

from pathlib import Path

import numpy as np

from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.classification.classifier import Classifier
from ultradino_jax.exports.format import Format, split_tokens, write_json, write_tensors
from ultradino_jax.weights import hf as naming
from ultradino_jax.weights.backbone import Backbone, backbone_record
from ultradino_jax.weights.files import read_safetensors
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.weights.meta import vit_state
from ultradino_jax.whole import read_json

_USE = """```python
from transformers import AutoImageProcessor, {cls}

model = {cls}.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
inputs = processor(images, return_tensors="pt")  # {images}
tokens = model(**inputs).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {first}:]
```"""
_USE_CLASSIFIER = """```python
from transformers import AutoImageProcessor, {cls}

model = {cls}.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
inputs = processor(images, return_tensors="pt")  # {images}
probabilities = model(**inputs).logits.softmax(-1)
names = model.config.id2label
```"""


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


def _tensors(backbone: Backbone) -> dict[str, np.ndarray]:
    state = vit_state(backbone.params, patch_size=backbone.model.patch_size)
    return naming.to_hf(state)


def _write(backbone: Backbone, folder: Path, tensors: dict, config: dict) -> None:
    write_tensors(folder, tensors, {**backbone_record(backbone), "naming": "hf"})
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", hf_processor(backbone))


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """A folder for Dinov2Model or Dinov2WithRegistersModel."""
    _write(backbone, folder, _tensors(backbone), hf_config(backbone))


def write_classifier(task: Classifier, folder: Path) -> None:
    """A folder for *ForImageClassification, whose layer sees [CLS, mean patch].

    Raises UserError for a probe of more than the last block.
    """
    backbone, (kernel, bias) = task.backbone, task.linear
    if task.layers > 1:
        raise UserError(
            f"{backbone.name}: transformers' classifier sees the last block only, this "
            f"probe the last {task.layers}; onnx and safetensors hold it"
        )
    if not task.patch:
        kernel = np.concatenate([kernel, np.zeros_like(kernel)])
    config = hf_config(backbone)
    prefix, model = config["model_type"], config["architectures"][0]
    config["architectures"] = [model.replace("Model", "ForImageClassification")]
    config["id2label"] = {str(i): name for i, name in enumerate(task.classes)}
    config["label2id"] = {name: i for i, name in enumerate(task.classes)}
    tensors = {f"{prefix}.{name}": x for name, x in _tensors(backbone).items()}
    tensors |= {"classifier.weight": kernel.T, "classifier.bias": bias}
    _write(backbone, folder, tensors, config)


def load_task(folder: Path) -> Classifier | None:
    """Read back a classifier's folder; None for anything else."""
    if not (folder / "config.json").is_file():
        return None
    tensors, record = read_safetensors(folder / "model.safetensors")
    if "classifier.weight" not in tensors or (record or {}).get("naming") != "hf":
        return None
    with damaged(folder):
        names = tuple(read_json(folder / "config.json")["id2label"].values())
    head = {"kernel": tensors["classifier.weight"].T}
    head["bias"] = tensors["classifier.bias"]
    return Classifier(load_backbone(folder), head, 1, True, names)


def target(folder: Path, kind: str):
    """`Format.target`, in the class that the export names."""
    import torch
    import transformers

    # Not AutoModel: it has to work with the class of config.json.
    name = read_json(folder / "config.json")["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder).eval()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            out = model(pixel_values=torch.from_numpy(images))
        if kind == "classifier":
            return {"logits": out.logits.numpy()}
        registers = getattr(model.config, "num_register_tokens", 0)
        return split_tokens(out.last_hidden_state.numpy(), 1 + registers)

    library = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return library, run


FORMAT = Format(
    write={"backbone": write_backbone, "classifier": write_classifier},
    usage={"backbone": _USE, "classifier": _USE_CLASSIFIER},
    library="transformers",
    hub_library="transformers",
    target=target,
    load_task=load_task,
)
