"""Feature extraction against timm's forward, and the time of the 52-head probe.

    python experiments/benchmarks/features.py [--images 64] [--batch 16]

ViT-S/16 at 224 pixels, float32. Images are 512 x 384 grey in memory: resize and
normalisation are part of `extract_features`, decoding is not. timm's row is its bare
forward on a ready batch (needs `pip install timm`, which brings torch). The machines
alternate between the two within one run, so the ratio stands even on a busy one.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.checkpoint import Backbone
from ultradino_jax.evaluators.features import Features, extract_features
from ultradino_jax.evaluators.linear import fit_cached, head_grid
from ultradino_jax.models.vit import build_vit


def vit_small() -> Backbone:
    """ViT-S/16 with random parameters, three channels as timm's."""
    model = build_vit("small", num_registers=0)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Backbone(model, params["params"], 224, 3, mean, std, name="vit_small")


def timm_forward(batch_size: int):
    """A function that runs timm's ViT-S/16 on one batch, or None without timm."""
    try:
        import timm
        import torch
    except ImportError:
        return None
    model = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    x = torch.randn(batch_size, 3, 224, 224)

    def forward():
        with torch.inference_mode():
            model(x)

    return forward


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, 384, 512), dtype=np.uint8)
    backbone = vit_small()
    forward = timm_forward(args.batch)

    def ours():
        extract_features(backbone, images, batch_size=args.batch)

    def theirs():
        for _ in range(args.images // args.batch):
            forward()

    runs = {"extract_features": ours} | ({"timm forward": theirs} if forward else {})
    times = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first compiles
                times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        rate = args.images / statistics.median(seconds)
        best = args.images / min(seconds)
        print(f"{name:18} {rate:6.1f} img/s median, {best:.1f} best")
    if forward:
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        print(f"time ratio to timm {statistics.median(ratios):.2f} (aim: 1.2 or less)")

    n, d, classes = 5804, 384, 6  # the training split of FETAL_PLANES_DB
    labels = rng.integers(classes, size=n)
    features = Features(
        rng.normal(size=(n, 4, d)).astype(np.float32),
        rng.normal(size=(n, d)).astype(np.float32),
    )
    heads = head_grid(12)
    for name in ("with compilation", "again"):
        start = time.perf_counter()
        fit_cached(
            features,
            labels,
            features[:1325],
            labels[:1325],
            num_classes=classes,
            heads=heads,
            seed=0,
        )
        seconds = time.perf_counter() - start
        print(f"{len(heads)} probes, 450 steps of 128: {seconds:.1f} s {name}")


if __name__ == "__main__":
    main()
