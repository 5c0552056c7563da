"""What the prepare tests share: speckle fans on scanner screens, DICOM, an export."""

import io
import zipfile
from pathlib import Path

import cv2
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    UltrasoundImageStorage,
    generate_uid,
)

from ultradino_jax.jsonl import read_rows
from ultradino_jax.prepare import lookup, prepare


def fan(height=240, width=320, half_angle=0.6, seed=0):
    """Speckle in a convex-array fan on black, and the fan's mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x = x - width / 2
    inner = 0.25 * height
    radius = np.hypot(x, y + 0.8 * inner)
    angle = np.abs(np.arctan2(x, y + 0.8 * inner))
    mask = (angle < half_angle) & (radius > inner) & (radius < 1.1 * height)
    coarse = rng.uniform(50, 160, (5, 6)).astype(np.float32)
    tissue = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    speckle = rng.rayleigh(1, (height, width)).astype(np.float32)
    speckle = cv2.GaussianBlur(speckle, (0, 0), 1.2)
    pixels = np.clip(tissue * speckle, 6, 255).astype(np.uint8)
    return np.where(mask, pixels, np.uint8(0)), mask


def screen(picture, mask, banner="DOE^JANE 1980-01-31", top=40, left=70):
    """The picture on a scanner's screen. Returns screen, mask on it, interface mask."""
    height, width = picture.shape
    interface = np.zeros((height + 2 * top, width + 2 * left), np.uint8)
    cv2.putText(interface, banner, (8, 20), 0, 0.5, 255, 1, cv2.LINE_AA)
    for line, text in enumerate(("Gen OB", "C5-1", "28Hz", "Gn 60")):
        cv2.putText(interface, text, (4, top + 30 + 22 * line), 0, 0.45, 210, 1)
    interface[top : top + height // 2, -20:-12] = np.linspace(
        255, 0, height // 2, dtype=np.uint8
    )[:, None]
    interface[-14:] = 60
    place = (slice(top, top + height), slice(left, left + width))
    full = np.zeros(interface.shape, bool)
    full[place] = mask
    interface[full] = 0
    pixels = interface.copy()
    pixels[place] = np.maximum(pixels[place], picture)
    return pixels, full, interface


def region_item(x0, y0, x1, y1, spatial=1, data=1):
    """One item of the Sequence of Ultrasound Regions; corners inclusive."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = spatial, data
    item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1, y1
    return item


def dicom(pixels, photometric="MONOCHROME2", jpeg=False, **tags):
    """Bytes of a DICOM file. pixels: [H,W], [H,W,3], [N,H,W] or [N,H,W,3] uint8/16."""
    pixels = np.asarray(pixels)
    colour = pixels.shape[-1] == 3
    frames = pixels if pixels.ndim == (4 if colour else 3) else pixels[None]
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    dataset.Modality = "US"
    dataset.Rows, dataset.Columns = frames.shape[1:3]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    meta = dataset.file_meta = FileMetaDataset()
    if jpeg:
        meta.TransferSyntaxUID = JPEGBaseline8Bit
        coded = [cv2.imencode(".jpg", f[..., ::-1] if colour else f) for f in frames]
        dataset.PixelData = encapsulate([c[1].tobytes() for c in coded])
    else:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = frames.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def encoded(pixels, extension=".png"):
    """A picture as the bytes of a file."""
    return cv2.imencode(extension, pixels)[1].tobytes()


def run(inputs, output, **options):
    return prepare(inputs, output, **{"workers": 0, "progress": False} | options)


def contents(cache):
    return {p.name: p.read_bytes() for p in sorted(Path(cache).rglob("*"))}


def still(seed):
    """The picture that `export` writes as series/SEED.png."""
    return fan(120, 160, seed=seed)[0]


def export(root, stills=10):
    """A small export: stills, a cine loop, an archive, junk."""
    (root / "series").mkdir(parents=True)
    for seed in range(stills):
        (root / "series" / f"{seed}.png").write_bytes(encoded(still(seed)))
    frames = np.stack([screen(*fan(120, 160, seed=100 + k))[0] for k in range(6)])
    (root / "loop").write_bytes(dicom(frames, FrameTime=400))
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        for seed in range(200, 240):
            picture = fan(80, 110, seed=seed)[0]
            archive.writestr(f"{seed}.png", encoded(picture))
    (root / "notes.txt").write_text("hello")
    return root


def skipped(cache, key=None, inputs=None):
    """reason -> names of the files (or their number where no key is given)."""
    lines = read_rows(cache / "skipped.jsonl")
    names = {}
    if inputs is not None:
        for file_id, path in lookup(inputs, [inputs], key):
            names[file_id] = path.removeprefix(f"{inputs}/")
    reasons = {}
    for line in lines:
        reasons.setdefault(line["reason"], []).append(names.get(line["id"], line))
    return reasons
