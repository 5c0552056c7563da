"""Images per second and core of the pretraining input pipeline on this host.

    python -m experiments.benchmarks.input_pipeline [--images 24] [--steps 6]

Writes phantoms of 1024x768 pixels as grey and RGB JPEG (quality 90) and PNG into a
temporary folder and runs the exact host path on them: full decode, 2 crops of 224 and
8 of 96 pixels with every augmentation, masks. "per core" divides by the CPU time of
the process, so it holds on a busy machine too. Then the prepared cache (256x341, in
each encoding): the host path, and what is left to the host where the step renders
(data.render='device': read, decide, canvas of 384 pixels, masks). The last lines say
what decoding a JPEG at half size (libjpeg's scaled DCT) would gain and what it would
cost in grey levels.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ultradino_jax.data.cache import ENCODINGS
from ultradino_jax.data.canvas import place_on_canvas
from ultradino_jax.data.crops import CropConfig, render_crops, sample_crops
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.data.pipeline import build_pipeline
from ultradino_jax.data.sources import CacheSource, FolderSource
from ultradino_jax.prepare import prepare

SIZE = (768, 1024)
CANVAS = 384
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


class Repeated:
    """A few records again and again, as a data set of the usual size.

    Grain's shuffle walks through 65,536 places for its next record, so on a handful of
    records it alone would take milliseconds.
    """

    def __init__(self, source, count: int = 1 << 20):
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source[index % len(self.source)]


def images_per_core(source, steps: int, canvas: int | None = None) -> float:
    """Images per CPU second of build_pipeline in this thread, batches of 8.

    canvas: leaves the rendering to the device.
    """
    iterator = build_pipeline(
        Repeated(source),
        CropConfig.ultrasound(),
        batch_size=8,
        groups=1,
        patch_size=16,
        canvas=canvas,
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
        render_crops(
            image, sample_crops(rng, image.shape[0], image.shape[1], config), config
        )
        decode += middle - start
        crop += time.process_time() - middle
    return 1e3 * decode / len(source), 1e3 * crop / len(source)


def device_parts(source) -> tuple[float, float, float]:
    """Milliseconds of CPU per image to read it, to decide, and to fill the canvas."""
    config = CropConfig.ultrasound()
    marks = []
    for index in range(len(source)):
        marks.append([time.process_time()])
        image = source[index]
        marks[-1].append(time.process_time())
        rng = np.random.default_rng(index)
        decisions = sample_crops(rng, image.shape[0], image.shape[1], config)
        marks[-1].append(time.process_time())
        place_on_canvas(image, decisions, CANVAS)
        marks[-1].append(time.process_time())
    return tuple(1e3 * np.diff(marks, axis=1).mean(axis=0))


def print_caches(folder: Path, output: Path, steps: int) -> None:
    """Both renderers' host rates from the prepared cache, one line per encoding."""
    print(
        f"\n{'cache':6} {'host rendering':>15} {'device rendering':>17}  "
        "(img/s/core)  read, decide, canvas ms"
    )
    for encoding in ENCODINGS:
        cache = output / f"cache-{encoding}"
        options = {"region": False, "dedup": "none", "workers": 1, "progress": False}
        prepare(folder, cache, encoding=encoding, **options)
        source = CacheSource(cache)
        host = images_per_core(source, steps)
        device = images_per_core(source, 8 * steps, CANVAS)
        read, decide, place = device_parts(source)
        print(
            f"{encoding:6} {host:15.0f} {device:17.0f}  {'':12} "
            f"{read:5.2f} {decide:5.2f} {place:5.2f}"
        )


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
        decisions = sample_crops(rng, image.shape[0], image.shape[1], config)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24, help="files per format")
    parser.add_argument("--steps", type=int, default=6, help="timed batches of 8")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = write_images(Path(folder), options.images)
        sources = {name: FolderSource(path) for name, path in folders.items()}
        print(f"{'1024x768':10} img/s/core  decode ms  crops ms  device img/s/core")
        for name, source in sources.items():
            rate = images_per_core(source, options.steps)
            decode, crop = parts(source)
            device = images_per_core(source, 2 * options.steps, CANVAS)
            print(f"{name:10} {rate:10.0f} {decode:10.2f} {crop:9.2f} {device:18.0f}")
        print_caches(folders["grey PNG"], Path(folder), options.steps)
        milliseconds, mean, largest = half_size_decode(sources["grey JPEG"])
    print(
        f"\nhalf-size JPEG decode (not used): {milliseconds:.2f} ms; grey levels off: "
        f"global crops {mean[0]:.2f} in the mean, {largest[0]} at most; "
        f"local crops {mean[1]:.2f} and {largest[1]}"
    )


if __name__ == "__main__":
    main()
