"""Writes phantom images as the DICOM files that ultrasound scanners export.

Each patient gets one file of every kind in KINDS. All carry a made-up identity in the
header and burned into the frame, so that de-identification has something to remove,
and `truth.csv` says what a reader should find.
"""

import datetime
import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from ultradino_jax.data.phantom.layouts import fitted, progress, write_csv
from ultradino_jax.data.phantom.render import render_phantom

# kind -> (frames, region): "inside" lies within the pixels; "outside" was left behind
# by an export that halved the picture; "none" has no regions at all.
KINDS = {
    "mono": (1, "inside"),
    "rgb": (1, "none"),
    "palette": (1, "outside"),
    "cine": (6, "inside"),
    "ybr_cine": (6, "outside"),
}
_SURNAMES = ("DOE", "ROE", "MUSTER", "ROSSI", "GARCÍA", "NOVAK")
_HOSPITALS = ("ST. NOWHERE HOSPITAL", "CLINICA EJEMPLO", "PHANTOM UNIVERSITY")


def write_dicom(out: Path, patients: int, seed=0, size: int | None = None):
    """One DICOM file per patient and kind, under DICOM/, some without a suffix.

    truth.csv beside it: file, kind, frames, the picture's box x0 y0 x1 y1 (inclusive;
    everything outside it is the scanner's screen), patient, plane.
    """
    root = Path(out) / "DICOM"
    shape = fitted((384, 512), size)
    rows: list[list] = [
        ["file", "kind", "frames", "x0", "y0", "x1", "y1", "patient", "plane"]
    ]
    keys = [(p, kind) for p in range(patients) for kind in KINDS]
    for patient, kind in progress(keys, len(keys), "dicom"):
        frames, _ = KINDS[kind]
        order = list(KINDS).index(kind)
        first = patient * 8 + (0 if frames > 1 else order)
        phantoms = [
            render_phantom(
                first + k,
                seed=seed,
                size=shape,
                images_per_patient=8,
                overlays=frames == 1,
                task="jnu" if frames > 1 else "planes",
            )
            for k in range(frames)
        ]
        identity = _identity(seed, patient)
        screens, box = _screens([p.image for p in phantoms], identity)
        suffix = ".dcm" if order % 2 else ""
        name = f"PAT{patient + 1:04d}/ST0001/IM_{order + 1:04d}{suffix}"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset = _dataset(identity, kind, frames, (seed, patient, order))
        _put_pixels(dataset, kind, screens, planar=patient % 2)
        _put_regions(dataset, kind, box, phantoms[0].mm_per_px)
        dataset.save_as(path, enforce_file_format=True)
        rows.append([name, kind, frames, *box, patient + 1, phantoms[0].plane])
    write_csv(Path(out) / "truth.csv", rows)


def _identity(seed: int, patient: int) -> dict:
    rng = np.random.default_rng([seed, 6, patient])
    born = datetime.date(1980, 1, 1) + datetime.timedelta(int(rng.integers(0, 9000)))
    seen = datetime.date(2018, 1, 1) + datetime.timedelta(int(rng.integers(0, 900)))
    return {
        "name": f"{_SURNAMES[rng.integers(len(_SURNAMES))]}^PHANTOM{patient + 1:04d}",
        "id": f"MRN{rng.integers(10**7, 10**8)}",
        "born": born.strftime("%Y%m%d"),
        "seen": seen.strftime("%Y%m%d"),
        "hospital": _HOSPITALS[rng.integers(len(_HOSPITALS))],
    }


def _screens(images: list[np.ndarray], identity: dict):
    """Put the pictures on the scanner's screen: a bar of text above, tools beside.

    Returns uint8 [frames, H, W] and the box (x0, y0, x1, y1) of the picture.
    """
    height, width = images[0].shape
    top, side = max(12, height // 8), max(8, width // 8)
    rows, columns = top + height, side + width
    columns += columns % 2  # two neighbours share their chroma in YBR_FULL_422
    screen = np.zeros((rows, columns), np.uint8)
    screen[: top - 2] = 40
    scale = 0.3 * width / 512 + 0.12
    text = (
        f"{identity['hospital']}  {identity['name'].replace('^', ' ')}",
        f"{identity['id']}  {identity['seen']}  TIS0.2 MI1.1",
    )
    for k, line in enumerate(text):
        at = (4, int(top * (0.45 + 0.4 * k)))
        plain = line.replace("Í", "I")
        cv2.putText(screen, plain, at, cv2.FONT_HERSHEY_SIMPLEX, scale, 235, 1)
    for y in range(top + 4, rows - 8, max(12, rows // 8)):  # buttons
        cv2.rectangle(screen, (1, y), (side - 3, y + 5), 90, -1)
    screens = np.repeat(screen[None], len(images), 0)
    screens[:, top : top + height, side : side + width] = images
    return screens, (side, top, side + width - 1, top + height - 1)


def _dataset(identity: dict, kind: str, frames: int, key: tuple) -> Dataset:
    """Header with the identity; identifiers follow from `key` alone."""

    def uid(*what):
        return generate_uid(entropy_srcs=["ultradino_jax", *map(str, what)])

    meta = FileMetaDataset()
    single = frames == 1
    meta.MediaStorageSOPClassUID = (
        UltrasoundImageStorage if single else UltrasoundMultiFrameImageStorage
    )
    meta.MediaStorageSOPInstanceUID = uid("instance", *key)
    meta.TransferSyntaxUID = (
        JPEGBaseline8Bit if kind == "ybr_cine" else ExplicitVRLittleEndian
    )
    ds = Dataset()
    ds.file_meta, ds.preamble = meta, b"\0" * 128
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.SOPClassUID = meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid("study", *key[:2]), uid(*key[:2])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "OBSTETRICAL"]
    ds.Modality = "US"
    ds.Manufacturer, ds.ManufacturerModelName = "Phantom Imaging", "P1"
    ds.PatientName, ds.PatientID = identity["name"], identity["id"]
    ds.PatientBirthDate, ds.PatientSex = identity["born"], "F"
    ds.StudyDate = ds.ContentDate = identity["seen"]
    ds.StudyTime = ds.ContentTime = "101500"
    ds.AccessionNumber = f"A{identity['id'][3:]}"
    ds.InstitutionName = identity["hospital"]
    ds.ReferringPhysicianName = "HOUSE^GREGORY"
    ds.OperatorsName = "SONO^NURSE"
    ds.DeviceSerialNumber = "SN0042"
    ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", 1, key[2] + 1
    block = ds.private_block(0x0011, "PHANTOM PRIVATE", create=True)
    block.add_new(0x01, "LO", f"comment on {identity['name']}")
    return ds


def _put_pixels(ds: Dataset, kind: str, screens: np.ndarray, planar: int) -> None:
    """Encode [frames, H, W] the way the kind does."""
    ds.Rows, ds.Columns = screens.shape[1:]
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    if len(screens) > 1:
        ds.NumberOfFrames = len(screens)
        ds.FrameTime, ds.CineRate = "40.0", "25"
        ds.FrameIncrementPointer = 0x00181063  # Frame Time
    if kind in ("mono", "cine", "palette"):
        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        pixels = screens
    else:
        ds.SamplesPerPixel = 3
        ds.PlanarConfiguration = planar if kind == "rgb" else 0
        ds.PhotometricInterpretation = "RGB"
        pixels = np.repeat(screens[..., None], 3, -1)
    if kind == "palette":  # stored upside down in value, and the table turns it back
        ds.PhotometricInterpretation = "PALETTE COLOR"
        pixels = 255 - screens
        table = (np.arange(255, -1, -1, dtype=np.uint16) << 8).tobytes()
        for colour in ("Red", "Green", "Blue"):
            setattr(ds, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
            setattr(ds, f"{colour}PaletteColorLookupTableData", table)
    if kind == "rgb":  # the scanner's colour: a yellow mark
        mark = pixels[0, -16:-6, 2:12]
        mark[:] = (230, 220, 30)
        pixels = np.moveaxis(pixels, -1, 1) if planar else pixels
    if kind == "ybr_cine":
        ds.PhotometricInterpretation = "YBR_FULL_422"
        ds.LossyImageCompression = "01"
        ds.PixelData = encapsulate([_jpeg(frame) for frame in pixels])
    else:
        data = np.ascontiguousarray(pixels).tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"


def _jpeg(frame: np.ndarray) -> bytes:
    with io.BytesIO() as buffer:
        Image.fromarray(frame).save(buffer, "JPEG", quality=92, subsampling="4:2:2")
        data = buffer.getvalue()
    return data + b"\0" * (len(data) % 2)


def _put_regions(ds: Dataset, kind: str, box, mm_per_px: float) -> None:
    """Sequence of Ultrasound Regions (DICOM PS3.3 C.8.5.5), corners inclusive."""
    where = KINDS[kind][1]
    if where == "none":
        return
    scale = 2 if where == "outside" else 1
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    x0, y0, x1, y1 = (scale * v for v in box)
    region.RegionLocationMinX0, region.RegionLocationMinY0 = x0, y0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = x1, y1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
    region.PhysicalDeltaX = region.PhysicalDeltaY = mm_per_px / 10 / scale
    ds.SequenceOfUltrasoundRegions = Sequence([region])
