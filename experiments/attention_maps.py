"""What a backbone attends to, as in the paper's Figure 4: any images, any backbone.

    python experiments/attention_maps.py --checkpoint=runs/x --images=FOLDER \\
        --out=figures/attention

Per image: the picture, the attention of the last block's class token to the patches
(mean over the heads, then each head), and the first three principal components of the
patch tokens as colours, fitted to all images together. A model with register tokens
gets a second line without them (they are cut out, nothing is retrained): artefacts
that the registers had absorbed return to the patches. Without --images phantoms are
drawn. --image-size above the native one gives finer maps.

Writes OUT.png, OUT.pdf and OUT.csv (image, registers, row, column, attention of each
head, three colours). --checkpoint takes what eval.py takes.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.figures import new_figure, save_figure, write_rows  # noqa: E402

DEFAULT = Path("runs/figures/attention")


def load_images(folder: Path | None, count: int) -> tuple[list[str], list]:
    """(names, grey images uint8 [H,W,C]): of a folder, evenly spread, or phantoms."""
    if folder is None:
        from ultradino_jax.data.phantom.render import render_phantom

        # One of each plane: the first `count` of the six of patient 0.
        drawn = [render_phantom(i, size=(384, 512), settings=3) for i in range(count)]
        return [d.plane for d in drawn], [d.image[:, :, None] for d in drawn]
    from ultradino_jax.data.sources import FolderSource

    source = FolderSource(folder)
    chosen = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int))
    names = [source.record_id(int(i)) for i in chosen]
    return names, [source[int(i)] for i in chosen]


def variants(backbone) -> dict[str, Any]:
    """{label: backbone}: as it is and, where it has registers, without them."""
    from ultradino_jax.evaluators.segmentation.segmenter import usable_backbone

    r = getattr(backbone.model, "num_registers", 0)
    as_is = {f"{r} registers": usable_backbone(backbone, "keep")}
    if not r:
        return as_is
    return {**as_is, "registers cut out": usable_backbone(backbone, "drop")}


def compute(backbone, images: list) -> dict[str, tuple]:
    """{variant: (attention [n,A,h,w], colours uint8 [n,h,w,3])} and the inputs.

    Raises ValueError when the backbone keeps no attention maps.
    """
    from ultradino_jax.evaluators.features import Preprocess
    from ultradino_jax.health.panels import attention_maps, pca_colours

    preprocess = Preprocess.of(backbone, antialias=True)
    pixels = np.stack([preprocess.resize(image) for image in images])
    found: dict[str, tuple] = {"images": (pixels,)}
    for label, variant in variants(backbone).items():
        try:
            maps, tokens = attention_maps(variant, pixels)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{backbone.name} keeps no attention maps") from error
        found[label] = (maps, pca_colours(tokens))
    return found


def draw(names: list[str], found: dict[str, tuple], title: str, stem: Path) -> None:
    """A line per image and variant; columns: image, mean, heads, PCA."""
    (pixels,) = found["images"]
    kinds = [label for label in found if label != "images"]
    heads = found[kinds[0]][0].shape[1]
    columns, lines = heads + 3, len(names) * len(kinds)
    figure, axes = new_figure(
        1.15 * columns, 1.25 * lines + 0.5, nrows=lines, ncols=columns, squeeze=False
    )
    for n, name in enumerate(names):
        for k, kind in enumerate(kinds):
            maps, colours = found[kind]
            line = axes[n * len(kinds) + k]
            grey = pixels[n] if pixels.shape[-1] == 3 else pixels[n, ..., 0]
            line[0].imshow(grey, cmap="gray", vmin=0, vmax=255)
            line[0].set_ylabel(f"{name[-24:]}\n{kind}", fontsize=6)
            line[1].imshow(maps[n].mean(axis=0), cmap="viridis")
            for head in range(heads):
                line[2 + head].imshow(maps[n, head], cmap="viridis")
            line[-1].imshow(colours[n])
    for panel in axes.ravel():
        panel.set_xticks([])
        panel.set_yticks([])
    for column, text in enumerate(
        ["image", "mean", *(f"head {h + 1}" for h in range(heads)), "PCA"]
    ):
        axes[0, column].set_title(text, fontsize=7)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, stem)


def table(names: list[str], found: dict[str, tuple]):
    """(header, rows): one row per image, variant and patch."""
    kinds = [label for label in found if label != "images"]
    heads = found[kinds[0]][0].shape[1]
    header = ["image", "registers", "row", "column"]
    header += [f"head{h + 1}" for h in range(heads)] + ["red", "green", "blue"]
    rows = []
    for kind in kinds:
        maps, colours = found[kind]
        for n, name in enumerate(names):
            for i, j in np.ndindex(maps.shape[2:]):
                values = [float(x) for x in maps[n, :, i, j]]
                rows.append([name, kind, i, j, *values, *map(int, colours[n, i, j])])
    return header, rows


def main(argv: list[str] | None = None) -> int:
    """Compute, draw, write; bad input ends with one line and status 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="folder; default: phantoms")
    parser.add_argument("--count", type=int, default=4, help="images shown")
    parser.add_argument("--image-size", type=int, default=0, help="pixels; 0: native")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="without a suffix")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error("--count must be at least 1")
    logging.set_verbosity(logging.WARNING)
    from ultradino_jax.weights.load import load_backbone

    try:
        backbone = load_backbone(args.checkpoint, image_size=args.image_size)
        names, images = load_images(args.images, args.count)
        found = compute(backbone, images)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    draw(names, found, f"{backbone.name}, {backbone.image_size} px", args.out)
    write_rows(args.out.with_suffix(".csv"), *table(names, found))
    print(f"written: {args.out}.png, .pdf and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
