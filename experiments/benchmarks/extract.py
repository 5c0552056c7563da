"""Feature extraction against timm's forward, and the time of the 52-head probe.

    python -m experiments.benchmarks.extract --timm_python=VENV/bin/python \
        [--images 64] [--batch 16]

ViT-S/16 at 224 pixels, float32. Images are 512 x 384 grey in memory: resize and
normalisation are part of `extract_features`, decoding is not. timm's row is its bare
forward on a ready batch, in an environment of its own (`pip install timm`, which brings
torch), on the same cores. The two take turns, so the ratio stands even on a busy
machine. Then 52 linear probes are trained from cached features of random numbers.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.turns import Worker, share_cores
from ultradino_jax.evaluators.classification.linear import fit_cached, head_grid
from ultradino_jax.evaluators.features import Features, extract_features
from ultradino_jax.models.vit import build_vit
from ultradino_jax.weights.backbone import Backbone


def random_backbone(variant: str = "small", dtype=jnp.float32) -> Backbone:
    """A ViT/16 with random parameters, three channels as timm's."""
    model = build_vit(variant, num_registers=0, dtype=dtype)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Backbone(model, params["params"], 224, 3, mean, std, name=f"vit_{variant}")


def extraction(args) -> dict:
    """Images per second of both, and the median of each round's ratio of times."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, 384, 512), dtype=np.uint8)
    backbone, rounds = random_backbone(), args.images // args.batch
    script = str(Path(__file__).with_name("timm_forward.py"))
    peer = None
    if args.timm_python:
        peer = Worker([args.timm_python, script, str(args.batch), str(args.threads)])
    times = {"extract_features": [], "timm forward": []}
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        extract_features(backbone, images, batch_size=args.batch)
        seconds = {"extract_features": time.perf_counter() - start}
        if peer:
            seconds["timm forward"] = sum(peer.step() for _ in range(rounds))
        for name, value in seconds.items():
            if repeat:  # the first compiles
                times[name].append(value)
    result = {}
    for name, seconds in times.items():
        if not seconds:
            continue
        result[name] = {
            "images_per_second": args.images / statistics.median(seconds),
            "best": args.images / min(seconds),
        }
        row = result[name]
        print(
            f"{name:18} {row['images_per_second']:6.1f} img/s, best {row['best']:.1f}"
        )
    if peer:
        peer.close()
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        result["time_over_timm"] = statistics.median(ratios)
        result["peer"] = peer.about
        print(f"time ratio to timm {result['time_over_timm']:.2f} (aim: 1.2 or less)")
    return result


def probes() -> dict:
    """Seconds of the probes of FETAL_PLANES_DB's split, with compilation and again."""
    rng = np.random.default_rng(0)
    n, d, classes = 5804, 384, 6  # the training split of FETAL_PLANES_DB
    labels = rng.integers(classes, size=n)
    features = Features(
        rng.normal(size=(n, 4, d)).astype(np.float32),
        rng.normal(size=(n, d)).astype(np.float32),
    )
    heads, result = head_grid(12), {}
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
        result[name] = time.perf_counter() - start
        print(f"{len(heads)} probes, 450 steps of 128: {result[name]:.1f} s {name}")
    return result


def main() -> None:
    """Print one line per measurement and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores for either")
    parser.add_argument("--timm_python", help="a Python that has timm")
    parser.add_argument("--json", default="experiments/results/extract.json")
    args = parser.parse_args()
    share_cores(args.threads)
    result = {"batch": args.batch, "cores": args.threads}
    result["load_start"] = round(os.getloadavg()[0], 2)
    result |= {"extraction": extraction(args), "probe_seconds": probes()}
    result["load_end"] = round(os.getloadavg()[0], 2)
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
