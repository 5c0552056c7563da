"""Reading checkpoint files and folders into named NumPy arrays."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - gives NumPy the bfloat16 that files may hold
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ultradino_jax.errors import MissingPackage, UserError, first_line
from ultradino_jax.whole import read_json

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
# What a folder's weights are called: Hugging Face and ours, older Hugging Face, Meta.
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "teacher_checkpoint.pth")
RECORD_KEY = "ultradino_jax"
# Where training code keeps the tensors, outermost first; with a teacher and a student
# in one file the teacher is the model.
_WRAPPERS = ("state_dict", "teacher", "model", "module", "student")


@dataclass(frozen=True)
class WeightFile:
    """What a file or folder holds.

    tensors: name -> array, floating point as float32. heads: 'dino_head.*' and
    'ibot_head.*' of a training checkpoint, without interpretation. config, processor:
    a Hugging Face folder's config.json and preprocessor_config.json. record: this
    project's own description, where a file carries it. ignored: names
    left out because they belong to training, not to the backbone.
    """

    tensors: dict[str, np.ndarray]
    heads: dict[str, np.ndarray] = field(default_factory=dict)
    config: dict | None = None
    processor: dict | None = None
    record: dict | None = None
    ignored: tuple[str, ...] = ()


def read_weights(path: str | Path) -> WeightFile:
    """Read a .pth, .pt, .bin, .ckpt or .safetensors file, or a folder with one.

    Nothing in a file is ever executed. Raises FileNotFoundError when there is nothing,
    MissingPackage naming the extra when a pickle needs torch, and UserError with one
    line when the file is a git-lfs pointer, cut short, not a checkpoint, or a pickle
    that wants to call something.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-lfs pointer, not the weights: fetch them with "
            "'git lfs pull'"
        )
    if path.suffix == ".safetensors":
        return _split(*read_safetensors(path))
    if path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((*TORCH_SUFFIXES, ".safetensors"))
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; known: {known}")
    torch = import_torch()
    try:
        return _split(*_unwrap(_torch_load(torch, path)))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict | None]:
    """(tensors by name, this project's record of an export or None) of a file.

    Raises FileNotFoundError, and UserError naming the file when it is cut short, not of
    this format, or holds a dtype that NumPy lacks.
    """
    name, tensors = "header", {}
    try:
        with safe_open(path, framework="np") as file:
            record = (file.metadata() or {}).get(RECORD_KEY)
            for name in sorted(file.keys()):
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged, cut short or not a safetensors file "
            f"({first_line(error)})"
        ) from error
    except (AttributeError, TypeError) as error:  # as the package asks NumPy for it
        raise UserError(f"{path}: {name}: dtype not supported ({error})") from error
    try:
        return tensors, json.loads(record) if record else None
    except ValueError as error:
        raise UserError(f"{path}: its record is no JSON: {error}") from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays and string metadata.

    The package orders tensors by itself, always alike, and metadata as it comes.
    """
    # It takes an array's memory as it lies, so a transposed one has to be copied.
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    save_file(arrays, path, dict(metadata) or None)


def _read_folder(folder: Path) -> WeightFile:
    """A Hugging Face folder, or one of this project's exports."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} has no weight_map of file names") from error
    else:
        shards = [name for name in _FOLDER_FILES if (folder / name).is_file()][:1]
    if not shards:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"no {', '.join(_FOLDER_FILES)} or backbone.json in {str(folder)!r}, "
            f"which holds {found}"
        )
    parts = [read_weights(folder / name) for name in shards]
    jsons = [folder / name for name in ("config.json", "preprocessor_config.json")]
    config, processor = (read_json(p) if p.is_file() else None for p in jsons)
    tensors = {k: x for part in parts for k, x in part.tensors.items()}
    return WeightFile(
        tensors=tensors,
        heads=parts[0].heads,
        config=config,
        processor=processor,
        record=parts[0].record,
        ignored=tuple(name for part in parts for name in part.ignored),
    )


def import_torch():
    """The torch module. Raises MissingPackage naming the extra that brings it."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackage(
            "reading or writing torch files needs torch: pip install "
            "-e '.[interop]' in the repository (.safetensors needs nothing)"
        ) from error
    return torch


def _torch_load(torch, path: Path) -> Any:
    serialization = torch.serialization
    try:
        # iBOT keeps its command line beside the weights: a plain record of values.
        with serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise anything
        try:
            calls = serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # not a zip file either
            calls = []
        calls = [name for name in calls if name != "argparse.Namespace"]
        if calls or "GLOBAL" in str(error):
            raise UserError(
                f"refused: the pickle would call {', '.join(calls) or 'code'}; only "
                "tensors and plain values are read"
            ) from error
        raise UserError(
            f"damaged, cut short or not a torch checkpoint ({type(error).__name__}: "
            f"{first_line(error)[:120]})"
        ) from error


def _is_tensor(value) -> bool:
    return hasattr(value, "detach") or isinstance(value, np.ndarray)


def _unwrap(content: Any) -> tuple[dict, dict | None]:
    """(flat {name: tensor}, own record) of what torch.load returned."""
    record: str | None = None
    while isinstance(content, Mapping):
        record = content.get(RECORD_KEY, record)
        if any(_is_tensor(value) for value in content.values()):
            break
        inner = next(
            (k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None
        )
        if inner is None:
            found = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
            raise UserError(f"no tensors inside; its entries are {found}")
        content = content[inner]
    else:
        raise UserError(f"holds a {type(content).__name__}, not named tensors")
    flat = {}
    for name, value in content.items():
        if not _is_tensor(value):
            continue
        if hasattr(value, "detach"):
            value = value.detach()
            # NumPy has no bfloat16, and half precision is widened anyway.
            value = (value.float() if value.is_floating_point() else value).numpy()
        flat[name] = value
    return flat, json.loads(record) if record else None


def _split(tensors: Mapping[str, np.ndarray], record: dict | None) -> WeightFile:
    """Cut wrappers' prefixes and set aside what is not the backbone."""
    state = {}
    for name, x in tensors.items():
        for prefix in ("_orig_mod.", "module."):  # torch.compile, DataParallel
            name = name.replace(prefix, "")
        floating = np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16"
        state[name] = x.astype(np.float32, copy=False) if floating else x
    ignored = []
    if any(name.startswith("teacher.") for name in state):
        ignored = [name for name in state if not name.startswith("teacher.")]
        state = {
            name.removeprefix("teacher."): x
            for name, x in state.items()
            if name.startswith("teacher.")
        }
    heads = {}
    if any(name.startswith("backbone.") for name in state):
        for name in list(state):
            if name.startswith(("dino_head.", "ibot_head.", "head.")):
                heads[name] = state.pop(name)
        state = {name.removeprefix("backbone."): x for name, x in state.items()}
    return WeightFile(
        tensors=state, heads=heads, record=record, ignored=(*ignored, *heads)
    )
