"""Images per second and core of the pretraining input pipeline on this host.

    python -m experiments.benchmarks.input_pipeline [--images 24] [--steps 6]

Writes phantoms of 1024x768 pixels as grey and RGB JPEG (quality 90) and PNG into a
temporary folder and runs the exact host path on them: full decode, 2 crops of 224 and
8 of 96 pixels with every augmentation, masks. "per core" divides by the CPU time of
the process, so it holds on a busy machine too. The last lines say what decoding a JPEG
at half size (libjpeg's scaled DCT) would gain and what it would cost in grey levels.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ultradino_jax.data.crops import CropConfig, render_crops, sample_crops
from ultradino_jax.data.phantom import render_phantom
from ultradino_jax.data.pipeline import build_pipeline
from ultradino_jax.data.sources import FolderSource

SIZE = (768, 1024)
FORMATS = {
    "grey JPEG": ("L", ".jpg", {"quality": 90}),
    "RGB JPEG": ("RGB", ".jpg", {"quality": 90}),
    "grey PNG": ("L", ".png", {}),
    "RGB PNG": ("RGB", ".png", {}),
}


def write_images(folder: Path, count: int) -> dict[str, Path]:
    """One sub-folder per format, all with the same phantoms."""
    for index in range(count):
        image = Image.fromarray(render_phantom(index, size=SIZE).image)
        for name, (mode, extension, options) in FORMATS.items():
            path = folder / name / f"{index:04d}{extension}"
            path.parent.mkdir(exist_ok=True)
            image.convert(mode).save(path, **options)
    return {name: folder / name for name in FORMATS}


def images_per_core(source, steps: int) -> float:
    """Images per CPU second of build_pipeline in this thread, batches of 8."""
    iterator = build_pipeline(
        source,
        CropConfig.ultrasound(),
        batch_size=8,
        groups=1,
        patch_size=16,
        num_steps=steps + 1,
        num_threads=0,
    )
    next(iterator)  # first calls set things up
    start = time.process_time()
    count = sum(batch["index"].size for batch in iterator)
    seconds = time.process_time() - start
    iterator.close()
    return count / seconds


def parts(source) -> tuple[float, float]:
    """Milliseconds of CPU per image for decoding and for the ten crops."""
    config = CropConfig.ultrasound()
    decode = crop = 0.0
    for index in range(len(source)):
        start = time.process_time()
        image = source[index]
        middle = time.process_time()
        rng = np.random.default_rng(index)
        render_crops(image, sample_crops(rng, *image.shape[:2], config), config)
        decode += middle - start
        crop += time.process_time() - middle
    return 1e3 * decode / len(source), 1e3 * crop / len(source)


def half_size_decode(source) -> tuple[float, np.ndarray, np.ndarray]:
    """CPU ms per half-size decode; mean and largest difference of the crops."""
    config = CropConfig.ultrasound(jitter_prob=0.0, solarize_probs=(0, 0, 0))
    seconds, means, largest = 0.0, [], []
    for index in range(len(source)):
        start = time.process_time()
        with Image.open(source.root / source.record_id(index)) as file:
            file.draft("L", (SIZE[1] // 2, SIZE[0] // 2))
            half = np.asarray(file.convert("L"))[:, :, None]
        seconds += time.process_time() - start
        image = source[index]
        rng = np.random.default_rng(index)
        decisions = sample_crops(rng, *image.shape[:2], config)
        # Even boxes, so that the half-size box is the same region.
        decisions.boxes[:] -= decisions.boxes % 2
        exact = render_crops(image, decisions, config)
        decisions.boxes[:] //= 2
        scaled = render_crops(half, decisions, config)
        errors = [abs(a.astype(int) - b) for a, b in zip(exact, scaled, strict=True)]
        means.append([error.mean() for error in errors])
        largest.append([error.max() for error in errors])
    milliseconds = 1e3 * seconds / len(source)
    return milliseconds, np.mean(means, axis=0), np.max(largest, axis=0)


def main() -> None:
    """Prints one line per format, then the half-size comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="files per format")
    parser.add_argument("--steps", type=int, default=6, help="timed batches of 8")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = write_images(Path(folder), options.images)
        sources = {name: FolderSource(path) for name, path in folders.items()}
        print(f"{'1024x768':10} img/s/core  decode ms  crops ms")
        for name, source in sources.items():
            rate = images_per_core(source, options.steps)
            decode, crop = parts(source)
            print(f"{name:10} {rate:10.0f} {decode:10.2f} {crop:9.2f}")
        milliseconds, mean, largest = half_size_decode(sources["grey JPEG"])
    print(
        f"half-size JPEG decode (not used): {milliseconds:.2f} ms; grey levels off: "
        f"global crops {mean[0]:.2f} in the mean, {largest[0]} at most; "
        f"local crops {mean[1]:.2f} and {largest[1]}"
    )


if __name__ == "__main__":
    main()
