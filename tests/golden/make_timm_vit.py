"""Makes timm_vit.npz: outputs of two of timm's ViTs with random weights.

    python tests/golden/make_timm_vit.py

Run once by hand with timm 1.0.31 and torch 2.13.0 on a CPU; timm is not installed for
the tests. The weights are not stored: `fill` makes them again from a tensor's name.
"""

import json
import zlib
from pathlib import Path

import numpy as np

MODELS = {
    "vit_small_patch16_224": {},
    "vit_base_patch14_reg4_dinov2": {"dynamic_img_size": True},
}
PATCH_STRIDE = 49  # every 49th patch token is stored


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform weights that depend on the name alone; every one matters in the output.

    RandomState's stream is frozen, unlike Generator's.
    """
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    x = rng.random_sample(shape) * 2 - 1
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return (1 + 0.5 * x).astype(np.float32)
    if name.endswith("weight"):
        return (x * (3 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    return (0.5 * x).astype(np.float32)


def images() -> np.ndarray:
    """Float32 [2,3,224,224], multiples of 1/8."""
    x = np.random.RandomState(7).standard_normal((2, 3, 224, 224))
    return (np.round(x * 8) / 8).astype(np.float32)


def main():
    import timm
    import torch

    arrays = {"timm_version": np.array(timm.__version__)}
    for name, options in MODELS.items():
        model = timm.create_model(name, num_classes=0, **options).eval()
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        state = {k: torch.from_numpy(fill(k, s)) for k, s in shapes.items()}
        model.load_state_dict(state)
        with torch.no_grad():
            x = torch.from_numpy(images())
            tokens = model.forward_features(x).numpy()
            layers = model.get_intermediate_layers(
                x, n=4, norm=True, return_prefix_tokens=True
            )
        prefix = model.num_prefix_tokens
        arrays[f"{name}/shapes"] = np.array(json.dumps(shapes))
        arrays[f"{name}/cls"] = tokens[:, 0]
        arrays[f"{name}/patches"] = tokens[:, prefix::PATCH_STRIDE]
        arrays[f"{name}/last4_cls"] = np.stack([c[:, 0].numpy() for _, c in layers])
        arrays[f"{name}/last4_patches"] = np.stack(
            [p[:, ::PATCH_STRIDE].numpy() for p, _ in layers]
        )
    np.savez_compressed(Path(__file__).with_name("timm_vit.npz"), **arrays)


if __name__ == "__main__":
    main()
