"""Makes timm_export.npz: what timm computes with this project's timm exports.

    python tests/golden/make_timm_export.py write FOLDER   # with this project
    python tests/golden/make_timm_export.py run FOLDER     # with timm

Run once by hand with timm 1.0.31 on a CPU; timm is not installed for the tests, which
write the exports again and compare them with the files that timm was given.
"""

import hashlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np

REGISTERS = (0, 4)
BATCHES = (1, 5)
SIDE = 64


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal weights that depend on the name alone; RandomState's stream is frozen."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def images() -> np.ndarray:
    """Float32 [6,1,64,64], multiples of 1/8."""
    x = np.random.RandomState(7).standard_normal((sum(BATCHES), 1, SIDE, SIDE))
    return (np.round(x * 8) / 8).astype(np.float32)


def tiny_backbone(registers: int):
    """A grey ViT of two blocks whose weights are all made by `fill`."""
    import jax
    import jax.numpy as jnp

    from ultradino_jax.models.vit import ViT
    from ultradino_jax.tree import map_with_name
    from ultradino_jax.weights.backbone import Backbone

    model = ViT(64, 2, 2, image_size=SIDE, layerscale=0.1, num_registers=registers)
    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = map_with_name(lambda name, leaf: fill(name, leaf.shape), shapes)
    return Backbone(model, params, SIDE, 1, (0.25,), (0.125,), "tiny")


def write(folder: Path) -> None:
    """FOLDER/registersN with an export each."""
    from ultradino_jax.exports.formats import write as write_files

    for registers in REGISTERS:
        out = folder / f"registers{registers}"
        out.mkdir(parents=True)
        write_files("timm", tiny_backbone(registers), out)


def tensors_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Over names, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        x = np.ascontiguousarray(tensors[name])
        sha.update(f"{name}{x.shape}{x.dtype}".encode() + x.tobytes())
    return sha.hexdigest()


def run(folder: Path) -> None:
    """Load the exports in timm and store what it computes."""
    import timm
    import torch
    from safetensors.numpy import load_file

    arrays = {"timm_version": np.array(timm.__version__)}
    for registers in REGISTERS:
        key = f"registers{registers}"
        out = (folder / key).absolute()
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        parts = np.split(images(), np.cumsum(BATCHES)[:-1])
        with torch.no_grad():
            tokens = [model.forward_features(torch.from_numpy(x)) for x in parts]
        arrays[f"{key}/tokens"] = np.concatenate([x.numpy() for x in tokens])
        arrays[f"{key}/prefix"] = np.array(model.num_prefix_tokens)
        tensors = load_file(out / "model.safetensors")
        arrays[f"{key}/sha256"] = np.array(tensors_sha256(tensors))
        config = json.loads((out / "config.json").read_text())
        arrays[f"{key}/config"] = np.array(json.dumps(config, sort_keys=True))
    np.savez_compressed(Path(__file__).with_name("timm_export.npz"), **arrays)


if __name__ == "__main__":
    {"write": write, "run": run}[sys.argv[1]](Path(sys.argv[2]))
