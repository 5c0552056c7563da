"""Images per second of UperNet's training step and inference, and of augmentation.

    python experiments/benchmarks/segmentation.py --variant small --batch 64

Random pixels; the augmentation runs on its threads alone, which a step must not wait
for. The first step, which compiles, is left out.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.evaluators.segmentation.segmenter import (
    Segmenter,
    initial_variables,
    with_drop_path,
)
from ultradino_jax.evaluators.segmentation.train import (
    Pairs,
    SegmentationState,
    make_optimizer,
    pair_batches,
    train_step,
)
from ultradino_jax.models.upernet import UperNet, default_taps
from ultradino_jax.models.vit import build_vit
from ultradino_jax.weights.backbone import Backbone


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    flags = parser.parse_args()
    vit = build_vit(
        flags.variant, patch_size=flags.patch, image_size=flags.side, num_registers=0
    )
    shape = (1, flags.side, flags.side, 1)
    params = jax.jit(vit.init)(jax.random.key(0), jnp.zeros(shape))["params"]
    backbone = Backbone(vit, params, flags.side, 1, (0.2,), (0.2,), name="benchmark")
    model = UperNet(vit, num_classes=5, taps=default_taps(vit.depth))
    variables = initial_variables(model, backbone, 0)
    classes = tuple("abcde")
    segmenter = Segmenter(backbone, model, variables, classes)
    rng = np.random.default_rng(0)
    size = (flags.batch, flags.side, flags.side)
    pairs = Pairs(
        rng.integers(0, 256, (*size, 1), np.uint8), rng.integers(0, 5, size, np.uint8)
    )
    start = time.perf_counter()
    batches = list(pair_batches(pairs, batch_size=flags.batch, steps=3, seed=0))
    report("augmentation", 3 * flags.batch, start)
    segmenter.predict(pairs.images, flags.batch)
    start = time.perf_counter()
    for _ in range(flags.steps):
        segmenter.predict(pairs.images, flags.batch)
    report("inference", flags.steps * flags.batch, start)
    optimizer = make_optimizer(1e-4, 10, 100)
    training = model.clone(backbone=with_drop_path(vit, 0.4))
    state = SegmentationState(variables, optimizer.init(variables["params"]))
    batch = jax.device_put(batches[0])
    terms = None
    for step in range(flags.steps + 1):
        key = jax.random.key(step)
        state, terms = train_step(
            training, segmenter.preprocess, optimizer, "reference", state, batch, key
        )
        if step == 0:
            jax.block_until_ready(terms)
            start = time.perf_counter()
    jax.block_until_ready(terms)
    report("training", flags.steps * flags.batch, start)


def report(name, images, start):
    """One line: what, images per second."""
    rate = images / (time.perf_counter() - start)
    print(f"{name}: {rate:.1f} img/s on {jax.devices()[0].device_kind}", flush=True)


if __name__ == "__main__":
    main()
