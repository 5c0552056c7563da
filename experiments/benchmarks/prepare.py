"""Images per second and core: into a prepared cache, and out of it through Grain.

    python -m experiments.benchmarks.prepare [--images 24]

Writes phantoms of 1024x768 pixels in a temporary folder as PNG, JPEG (quality 90) and
DICOM, grey and RGB, and a JPEG cine loop, and runs prepare on each kind in one process.
Then reads caches of several sizes and encodings through Grain's shuffled dataset,
decoding and nothing else. "per core" divides by the CPU time of the process, so it
holds on a busy machine too.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import cv2
import grain
import numpy as np

from tests.data.prepare.inputs import dicom
from ultradino_jax.data.cache import FORMAT, INDEX, VERSION, encode, write_shard
from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.data.sources import CacheSource
from ultradino_jax.prepare import prepare

SIZE = (768, 1024)
RECORDS = 2000  # Grain costs more per record in an epoch of a few dozen


def write_inputs(folder: Path, count: int) -> None:
    """One sub-folder per kind, all with the same phantoms."""
    pictures = [render_phantom(i, size=SIZE).image for i in range(count)]
    rgb = [np.repeat(p[..., None], 3, axis=2) for p in pictures]
    kinds = {
        "grey PNG": [cv2.imencode(".png", p)[1].tobytes() for p in pictures],
        "RGB PNG": [cv2.imencode(".png", p)[1].tobytes() for p in rgb],
        "grey JPEG": [_jpeg(p) for p in pictures],
        "RGB JPEG": [_jpeg(p) for p in rgb],
        "grey DICOM": [dicom(p) for p in pictures],
        "RGB DICOM": [dicom(p, "RGB") for p in rgb],
        "JPEG DICOM": [dicom(p, "YBR_FULL_422", jpeg=True) for p in rgb],
        "JPEG cine": [
            dicom(np.stack(rgb), "YBR_FULL_422", jpeg=True, FrameTime="1000")
        ],
    }
    for kind, files in kinds.items():
        (folder / kind).mkdir(parents=True)
        for number, data in enumerate(files):
            (folder / kind / f"{number:05d}").write_bytes(data)


def _jpeg(picture: np.ndarray) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, 90]
    return cv2.imencode(".jpg", picture, options)[1].tobytes()


def write_cache(cache: Path, pictures: list[np.ndarray], encoding: str) -> float:
    """A cache of RECORDS records that repeat the pictures; returns bytes per record."""
    cache.mkdir()
    payloads = [encode(picture, encoding) for picture in pictures]
    payloads = [payloads[i % len(payloads)] for i in range(RECORDS)]
    index = np.zeros(RECORDS, INDEX)
    shards = [write_shard(cache / "shard-00000", payloads, index)]
    manifest = {"format": FORMAT, "version": VERSION, "shards": shards}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    return shards[0]["bytes"] / RECORDS


def read_rate(cache: Path, seconds: float = 2.0) -> float:
    """Records per CPU second of this process through Grain, decoded, shuffled."""
    dataset = grain.MapDataset.source(CacheSource(cache)).seed(0).shuffle().repeat()
    # Little is read ahead: what is not counted below must not cost time.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    records = iter(dataset.to_iter_dataset(options))
    next(records)
    start, count, until = time.process_time(), 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        next(records)
        count += 1
    return count / (time.process_time() - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    count = parser.parse_args().images
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder / "in", count)
        options = {"workers": 0, "progress": False, "key": folder / "key"}
        print(f"prepare, {count} pictures of {SIZE[1]}x{SIZE[0]}, images/s per core")
        for kind in sorted(path.name for path in (folder / "in").iterdir()):
            start = time.process_time()
            manifest = prepare(folder / "in" / kind, folder / kind, **options)
            rate = count / (time.process_time() - start)
            print(f"  {kind:12s} {rate:7.1f}   ({manifest['records']} kept)")
        print("read and decode through Grain, images/s per core")
        for side in (256, 384, 512):
            size = (side * SIZE[1] // SIZE[0], side)
            pictures = [
                cv2.resize(
                    render_phantom(i, size=SIZE).image,
                    size,
                    interpolation=cv2.INTER_AREA,
                )
                for i in range(count)
            ]
            for encoding in ("jpeg", "png", "raw"):
                cache = folder / f"{side} {encoding}"
                kib = write_cache(cache, pictures, encoding) / 1024
                rate = read_rate(cache)
                print(f"  {side:3d} {encoding:4s} {rate:9.0f}   {kib:6.0f} KiB each")


if __name__ == "__main__":
    main()
