"""ONNX files: backbones, classifiers and UperNet segmenters, any batch size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ultradino_jax.exports.format import Format
from ultradino_jax.exports.onnx_backbone import import_onnx, vit_onnx
from ultradino_jax.exports.onnx_tasks import classifier_onnx, segmenter_onnx

_USE = """```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
cls, patches = session.run(["cls", "patch"], {{"pixel_values": images}})
# images: float32 [B,{c},{s},{s}], any B, normalised as below
```"""
_USE_CLASSIFIER = """```python
import json
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(probabilities,) = session.run(["probabilities"], {{"pixel_values": images}})
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
# images: float32 [B,{c},{s},{s}], any B, normalised as below; there are "logits" too
```"""
_USE_SEGMENTER = """```python
import json
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(mask,) = session.run(["mask"], {{"pixel_values": images}})  # uint8 [B,{s},{s}]
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
# images: float32 [B,{c},{s},{s}], any B, normalised as below; there are "logits" too
```"""


def _writer(graph_of: Callable) -> Callable:
    """write(subject, folder); raises MissingPackage without onnx."""

    def write(subject, folder: Path) -> None:
        import_onnx().save(graph_of(subject), folder / "model.onnx")

    return write


def target(folder: Path, kind: str):
    """`Format.target`, in onnxruntime."""
    import onnxruntime

    outputs = ["cls", "patch"] if kind == "backbone" else ["logits"]
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    def run(images: np.ndarray) -> dict[str, Any]:
        arrays = session.run(outputs, {"pixel_values": images})
        return dict(zip(outputs, arrays, strict=True))

    return f"onnxruntime {onnxruntime.__version__}", run


FORMAT = Format(
    write={
        "backbone": _writer(vit_onnx),
        "classifier": _writer(classifier_onnx),
        "segmenter": _writer(segmenter_onnx),
    },
    usage={
        "backbone": _USE,
        "classifier": _USE_CLASSIFIER,
        "segmenter": _USE_SEGMENTER,
    },
    library="onnxruntime",
    hub_library="onnx",
    target=target,
    loads_back=False,
)
