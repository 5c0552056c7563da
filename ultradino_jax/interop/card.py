"""The README of an export: a model card filled from the run."""

from ultradino_jax.checkpoint import Backbone

_USE = {
    "hf": """```python
from transformers import AutoImageProcessor, {cls}

model = {cls}.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
inputs = processor(images, return_tensors="pt")  # {images}
tokens = model(**inputs).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {first}:]
```""",
    "timm": """```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)
tokens = model.forward_features(images)  # float32 [B,{c},{s},{s}], normalised
cls, patches = tokens[:, 0], tokens[:, {first}:]
```

Older versions of timm: `timm.create_model("{architecture}", checkpoint_path=
"FOLDER/model.safetensors", **model_args)` with `model_args` of config.json.""",
    "meta": """`teacher_checkpoint.pth` is what DINOv2 and UltraDINO training saves:
`torch.load(..)["teacher"]` holds `backbone.*` (and `dino_head.*` when heads were
exported), for `DinoVisionTransformer` with `img_size={s}, patch_size={p},
in_chans={c}, num_register_tokens={r}, block_chunks=0`.""",
    "onnx": """```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
cls, patches = session.run(["cls", "patch"], {{"pixel_values": images}})
# images: float32 [B,{c},{s},{s}], any B, normalised as below
```""",
    "safetensors": """```python
from ultradino_jax.interop.load import load_backbone_file

backbone = load_backbone_file("FOLDER")
```""",
}


def model_card(
    kind: str, backbone: Backbone, facts: dict, report: dict, licence: str
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    facts: of `run.run_facts`. report: of `export.export`. licence: an SPDX id, or ''.
    """
    model, side = backbone.model, backbone.image_size
    registers = model.num_registers
    use = _USE[kind].format(
        cls="Dinov2WithRegistersModel" if registers else "Dinov2Model",
        architecture=f"vit_base_patch16_{side}",
        c=backbone.channels,
        s=side,
        p=model.patch_size,
        r=registers,
        first=1 + registers,
        images="a list of PIL images"
        if backbone.channels == 3
        else "a list of uint8 arrays [H,W,1]",
    )
    library = {"hf": "transformers", "timm": "timm", "onnx": "onnx"}.get(kind)
    front = [
        f"license: {licence or 'other'}",
        *([f"library_name: {library}"] if library else []),
        "pipeline_tag: image-feature-extraction",
        "tags: [ultrasound, fetal, dinov2, self-supervised]",
    ]
    checked = report["target"]
    if checked.get("difference"):
        worst = max(checked["difference"].values())
        check = f"Features agree with {checked['library']} within {worst:.1e}."
    else:
        check = f"Not run in its target library: {checked['reason']}."
    newline = "\n"
    return f"""---
{newline.join(front)}
---

# {backbone.name}

A Vision Transformer that turns an ultrasound image into features: {model.depth} blocks,
{model.embed_dim} wide, patches of {model.patch_size} pixels, {registers} registers.

## Use

{use}

Input: {backbone.channels} channel(s), the whole image resized to {side} x {side} pixels
(bilinear), scaled to [0, 1], then (x - mean) / std with mean {_numbers(backbone.mean)}
and std {_numbers(backbone.std)}. At other sizes libraries interpolate positions in
different ways; the check below is at {side} pixels.

## Training

{_training(facts)}

## Checks

{check}
Loaded back into ultradino_jax: {report["reload"]["verdict"]}.

## Intended use and limits

Research on ultrasound images: features for classifiers, segmenters and retrieval that
are validated on the data they are used on. Not a medical device; not for diagnosis or
for decisions about a patient. Expect it to reflect the machines, the operators and the
population of its training images.

## Licence

{licence or "Not stated. Weights inherit conditions of the data they were trained on."}
"""


def _numbers(values) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _training(facts: dict) -> str:
    if not facts:
        return "No training run was found beside the checkpoint."
    config = facts["config"]
    data, crops = config["data"], config["crops"]
    where = "images" if data["root"] else "rendered phantom images, no patient data"
    rows = [
        ("training images", f"{facts.get('images', 'unknown')} ({where})"),
        ("optimiser steps", facts["step"]),
        ("images per step", config["batch_size"]),
        ("augmentation style", crops["style"]),
        ("global crop", f"{crops['global_size']} px"),
        ("prototypes", config["head"]["num_prototypes"]),
    ]
    rows += [
        (f"{name} at step {facts['metrics']['step']}", f"{value:.4f}")
        for name, value in facts.get("metrics", {}).items()
        if name != "step"
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| | |\n|---|---|\n{table}"
