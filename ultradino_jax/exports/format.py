"""What has to be known of an export format, stated once per format.

To add one: write exports/NAME.py with a FORMAT (below) and its line into the table of
formats.py. The command, its checks and the model card then know it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ultradino_jax.weights.files import RECORD_KEY, write_safetensors


@dataclass(frozen=True)
class Format:
    """Files for one library, of backbones and perhaps of classifiers and segmenters.

    write: {'backbone', 'classifier' or 'segmenter': write(subject, folder)}; a kind
    that is not there has no place in this format. holds_any_model: not only
    DINOv2-style ViTs. holds_heads: its backbone writer takes the option heads, {name:
    parameters of a projection head}.

    library: the package the files are for. target: target(folder, kind) -> (its name
    and version, function) once loaded there; the function maps normalised images,
    float32 [B,C,S,S], to {'cls': [B,D], 'patch': [B,N,D]} of a backbone and {'logits':
    [B,Y] or [B,Y,S,S]} of the others, and ImportError says that the library is not
    there. no_target: why there is no such check.
    loads_back: whether this project reads the files; load_task(folder) -> a Classifier
    or Segmenter, or None when the folder holds neither in this format.

    usage: {kind: Markdown for the model card}, with the places {cls}, {architecture},
    {images}, {first} (index of the first patch token), {c}, {s}, {p} and {r}.
    hub_library: library_name in the card's front matter.
    """

    write: Mapping[str, Callable]
    usage: Mapping[str, str]
    library: str = ""
    target: Callable | None = None
    no_target: str = ""
    hub_library: str = ""
    holds_any_model: bool = False
    holds_heads: bool = False
    loads_back: bool = True
    load_task: Callable = field(default=lambda folder: None)


def write_tensors(folder: Path, tensors: dict, record: dict) -> None:
    """model.safetensors with a record in its header."""
    # transformers refuses a file that does not say which framework it is for.
    metadata = {"format": "pt", RECORD_KEY: json.dumps(record)}
    write_safetensors(folder / "model.safetensors", tensors, metadata)


def write_json(path: Path, content: dict) -> None:
    """JSON with an indent of 2, as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def split_tokens(tokens: np.ndarray, prefix: int) -> dict[str, np.ndarray]:
    """[B,T,D] of which `prefix` are no patches -> {'cls': [B,D], 'patch': [B,N,D]}."""
    return {"cls": tokens[:, 0], "patch": tokens[:, prefix:]}
