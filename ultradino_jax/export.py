"""Export a model to another library, checked there before it is kept.

    python -m ultradino_jax.export --checkpoint runs/vitb --format hf --out exports/hf

Formats: hf (a Hugging Face folder), timm, meta (DINOv2's and UltraDINO's
teacher_checkpoint.pth, with --heads also the projection heads), onnx, safetensors (this
project's own single file). `--checkpoint` takes whatever `weights.load.load_backbone`
reads, or the results of eval.py: a fine-tuned or probing classifier (hf, onnx,
safetensors), a segmenter (onnx, safetensors).
"""

import argparse

from ultradino_jax.cli import command
from ultradino_jax.exports.checked import export
from ultradino_jax.exports.formats import FORMATS


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("ultradino_jax.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run, results or file")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--images", help="folder of images for the check")
    parser.add_argument("--image-size", type=int, help="side in pixels; native if left")
    parser.add_argument("--rgb", action="store_true", help="three input channels")
    parser.add_argument("--heads", action="store_true", help="projection heads too")
    parser.add_argument("--license", default="", help="SPDX id for the model card")
    flags = parser.parse_args(argv)
    report = export(
        flags.checkpoint,
        flags.format,
        flags.out,
        images=flags.images,
        image_size=flags.image_size,
        rgb=flags.rgb,
        heads=flags.heads,
        licence=flags.license,
    )
    target = report["target"]
    if "difference" in target:
        worst = max(target["difference"].values())
        what = "features" if report["kind"] == "backbone" else "logits"
        print(f"{target['library']} computes the same {what} within {worst:.1e}")
    else:
        print(f"NOT checked in its target library: {target['reason']}")
    if run := report.get("evaluation"):
        print(f"{run['row']}, seed {run['seed']}: validation {run['validation']:.4f}")
    print(f"{report['name']} written to {flags.out} ({report['reload']['verdict']})")


if __name__ == "__main__":
    command(main)
