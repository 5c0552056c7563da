"""DICOM files to 8-bit frames: photometric interpretation, palette and window, once."""

import io
import math

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian
from pydicom.uid import ImplicitVRLittleEndian as ImplicitVR

from ultradino_jax.data.formats.depth import to_uint8
from ultradino_jax.data.formats.frames import MAX_PIXELS, Clip, choose_frames
from ultradino_jax.data.formats.unreadable import Unreadable

# Ultrasound, intravascular ultrasound and what digitised or untagged ultrasound says.
ULTRASOUND = ("US", "IVUS", "OT", "")
# Transfer syntaxes that Pillow and pydicom alone cannot decode, by UID, and who can.
_GDCM = "pip install python-gdcm"
_EXTRA = "pip install -e '.[dicom]'"
_12_BIT = "1.2.840.10008.1.2.4.51"
_DECODERS = {
    _12_BIT: "12-bit JPEG: no permissive decoder",
    "1.2.840.10008.1.2.4.57": f"JPEG lossless: {_GDCM}",
    "1.2.840.10008.1.2.4.70": f"JPEG lossless: {_GDCM}",
    "1.2.840.10008.1.2.4.80": f"JPEG-LS: {_GDCM}",
    "1.2.840.10008.1.2.4.81": f"JPEG-LS: {_GDCM}",
    "1.2.840.10008.1.2.4.90": f"JPEG 2000: {_EXTRA}",
    "1.2.840.10008.1.2.4.91": f"JPEG 2000: {_EXTRA}",
    "1.2.840.10008.1.2.4.201": f"HTJ2K: {_EXTRA}",
    "1.2.840.10008.1.2.4.202": f"HTJ2K: {_EXTRA}",
    "1.2.840.10008.1.2.4.203": f"HTJ2K: {_EXTRA}",
    "1.2.840.10008.1.2.5": f"RLE: {_EXTRA}",
}


def read_dicom(data: bytes, fps: float, max_frames: int, any_modality: bool) -> Clip:
    """One DICOM file -> its chosen frames as RGB or grey uint8, tags for the region.

    Raises Unreadable.
    """
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if not any(k in dataset for k in ("PixelData", "FloatPixelData")):
        raise Unreadable("no_pixels")
    if not any_modality and str(dataset.get("Modality") or "") not in ULTRASOUND:
        raise Unreadable("not_ultrasound")
    count = _frame_count(dataset)
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise Unreadable("too_large")
    chosen = choose_frames(count, _frame_ms(dataset), fps, max_frames)
    study = str(dataset.get("StudyInstanceUID") or "")
    patient = str(dataset.get("PatientID") or "")
    if patient:
        # The same number at two hospitals is two people, when the tags tell them apart.
        patient = f"{dataset.get('IssuerOfPatientID') or ''}\0{patient}"
    return Clip(
        frames=_to_uint8(_decode(dataset, chosen), dataset),
        chosen=chosen,
        count=count,
        regions=dataset.get("SequenceOfUltrasoundRegions"),
        patient=patient or study or None,
        study=study or None,
    )


def _frame_count(dataset) -> int:
    value = dataset.get("NumberOfFrames", 1)
    try:
        count = int(1 if value is None else value)
    except (TypeError, ValueError):
        raise Unreadable("bad_frame_count") from None
    if count < 1:
        raise Unreadable("bad_frame_count")
    return count


def _frame_ms(dataset) -> float | None:
    """Milliseconds between frames, or None when no tag says so credibly."""
    vector = dataset.get("FrameTimeVector") or []
    candidates = [
        (dataset.get("FrameTime"), 1),
        (vector[1:] and np.mean([float(v) for v in vector[1:]]), 1),
        (dataset.get("CineRate"), -1),
        (dataset.get("RecommendedDisplayFrameRate"), -1),
    ]
    for value, power in candidates:
        try:
            value = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value) and value > 0:
            return value if power == 1 else 1000 / value
    return None


def _decode(dataset, chosen: list[int]) -> list[np.ndarray]:
    """Stored frames; YBR comes back as RGB (pydicom converts exactly once)."""
    meta = getattr(dataset, "file_meta", None)
    syntax = getattr(meta, "TransferSyntaxUID", None)
    if syntax is None:  # no file meta: only uncompressed data was ever written so
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVR if implicit else explicit
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Unreadable("unsupported", "transfer syntax") from None
    if not decoder.is_available:
        raise Unreadable("missing_decoder", _DECODERS.get(str(syntax), ""))
    try:
        frames = decoder.iter_array(dataset, indices=chosen, raw=False)
        return [pixels for pixels, _ in frames]
    except Exception:
        # Plugins offer themselves for 8-bit JPEG of this kind, then refuse 12 bits.
        if str(syntax) == _12_BIT and dataset.get("BitsStored", 8) > 8:
            raise Unreadable("missing_decoder", _DECODERS[_12_BIT]) from None
        raise


def _to_uint8(frames: list[np.ndarray], dataset) -> list[np.ndarray]:
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if photometric == "PALETTE COLOR":
        coloured = [apply_color_lut(f, dataset) for f in frames]
        # 16-bit palettes keep the level in the high byte (0xff00 is white).
        return [
            (f >> 8).astype(np.uint8) if f.dtype == np.uint16 else f for f in coloured
        ]
    if not photometric.startswith("MONOCHROME"):
        return to_uint8(frames)
    if dataset.get("VOILUTSequence"):
        # The table is indexed with whole numbers.
        whole = [np.rint(_rescale(f, dataset)).astype(np.int32) for f in frames]
        grey = to_uint8([apply_voi_lut(f, dataset).astype(np.float32) for f in whole])
    elif window := _window(dataset):
        center, width = window
        grey = []
        for frame in frames:
            # PS3.3 C.11.2.1.2.1, to 0..255.
            level = (_rescale(frame, dataset) - (center - 0.5)) / max(width - 1, 1e-6)
            grey.append(np.clip(np.rint((level + 0.5) * 255), 0, 255).astype(np.uint8))
    else:
        grey = to_uint8(frames)
    return [255 - f for f in grey] if photometric == "MONOCHROME1" else grey


def _rescale(frame: np.ndarray, dataset) -> np.ndarray:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None and intercept is None:
        return frame
    values = [float(1 if slope is None else slope), float(intercept or 0)]
    if not all(map(math.isfinite, values)):
        return frame
    return frame.astype(np.float32) * values[0] + values[1]


def _window(dataset) -> tuple[float, float] | None:
    """First window centre and width, or None when absent or not usable."""
    values: list[float] = []
    for keyword in ("WindowCenter", "WindowWidth"):
        value = dataset.get(keyword)
        if isinstance(value, MultiValue):
            value = value[0] if len(value) else ""
        try:
            values.append(float(value))
        except (TypeError, ValueError):
            return None
    if not all(map(math.isfinite, values)) or values[1] < 1:
        return None
    return values[0], values[1]
