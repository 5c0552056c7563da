"""DICOM files to 8-bit frames: photometric interpretation, palette and window, once."""

import functools
import io
import logging
import math
import os
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pydicom
from pydicom import config
from pydicom.dataset import Dataset

from ultradino_jax.data.formats.depth import to_uint8
from ultradino_jax.data.formats.dicom_levels import coloured, grey_levels
from ultradino_jax.data.formats.dicom_pixels import (
    Layout,
    check_decoder,
    decode_frame,
    encoded_frames,
    stored_frames,
)
from ultradino_jax.data.formats.dicom_tags import number, numbers, text, whole
from ultradino_jax.data.formats.frames import (
    MAX_INFLATED,
    MAX_PIXELS,
    Clip,
    choose_frames,
)
from ultradino_jax.data.formats.unreadable import Unreadable

# Ultrasound, intravascular ultrasound and what digitised or untagged ultrasound says.
ULTRASOUND = ("US", "IVUS", "OT", "")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
# pydicom would warn of values that it finds odd, and quote them.
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
config.settings.reading_validation_mode = config.IGNORE
logging.getLogger("pydicom").addHandler(logging.NullHandler())


def read_dicom(data: bytes, fps: float, max_frames: int, any_modality: bool) -> Clip:
    """One DICOM file -> its chosen frames as RGB or grey uint8, tags for the region.

    Raises Unreadable; pydicom and its plugins raise what they like for damaged files.
    """
    dataset = pydicom.dcmread(io.BytesIO(_inflated(data)), force=True)
    if not any(k in dataset for k in _PIXELS):
        raise Unreadable("no_pixels")
    if not any_modality and text(dataset, "Modality") not in ULTRASOUND:
        raise Unreadable("not_ultrasound")
    count, frame = _frames(dataset)
    chosen = choose_frames(count, _frame_ms(dataset), fps, max_frames)
    stored = [frame(i) for i in chosen]
    study, patient = text(dataset, "StudyInstanceUID"), text(dataset, "PatientID")
    if patient:
        # The same number at two hospitals is two people, when the tags tell them apart.
        patient = f"{text(dataset, 'IssuerOfPatientID')}\0{patient}"
    return Clip(
        frames=_shown(stored, chosen, dataset),
        chosen=chosen,
        count=count,
        regions=dataset.get("SequenceOfUltrasoundRegions"),
        patient=patient or study or None,
        study=study or None,
    )


def declared_frames(path: str | os.PathLike) -> int:
    """How many frames a file's tags say it has."""
    tags = ["NumberOfFrames"]
    dataset = pydicom.dcmread(
        path, stop_before_pixels=True, force=True, specific_tags=tags
    )
    return max(whole(dataset, "NumberOfFrames") or 1, 1)


_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def _inflated(data: bytes) -> bytes:
    """The file without the deflation of its transfer syntax, which could be a bomb."""
    if data[128:132] != b"DICM" or _DEFLATED not in data[:1024]:
        return data
    length = int.from_bytes(data[140:144], "little")
    head, body = data[: 144 + length], data[144 + length :]
    if _DEFLATED not in head:
        return data
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    body = unpacker.decompress(body, MAX_INFLATED)
    if unpacker.unconsumed_tail:
        raise Unreadable("too_large")
    plain = b"1.2.840.10008.1.2.1".ljust(len(_DEFLATED), b"\0")
    return head.replace(_DEFLATED, plain) + body


def _layout(dataset: Dataset) -> Layout:
    """What the tags say of the pixels. Raises Unreadable when they say too little."""
    rows, columns = whole(dataset, "Rows"), whole(dataset, "Columns")
    if not rows or not columns or min(rows, columns) < 1:
        raise Unreadable("unreadable", "no rows or columns")
    if rows * columns > MAX_PIXELS:
        raise Unreadable("too_large")
    allocated = whole(dataset, "BitsAllocated") or 8
    stored = whole(dataset, "BitsStored") or allocated
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise Unreadable("unsupported", "bits")
    high = whole(dataset, "HighBit")
    if high is None or not stored - 1 <= high < allocated:
        high = stored - 1
    return Layout(
        rows=rows,
        columns=columns,
        samples=whole(dataset, "SamplesPerPixel") or 1,
        allocated=allocated,
        stored=stored,
        high_bit=high,
        signed=whole(dataset, "PixelRepresentation") == 1,
        planar=whole(dataset, "PlanarConfiguration") == 1,
        colour=text(dataset, "PhotometricInterpretation"),
    )


def _syntax(dataset: Dataset) -> str:
    """Transfer syntax; without file meta only uncompressed data was ever written."""
    meta = getattr(dataset, "file_meta", None)
    syntax = str(getattr(meta, "TransferSyntaxUID", None) or "")
    if syntax:
        return syntax
    little = dataset.original_encoding[1]
    return "1.2.840.10008.1.2.1" if little or little is None else _BIG_ENDIAN


def _frames(dataset: Dataset) -> tuple[int, Callable[[int], np.ndarray]]:
    """(frames that there are, index -> frame), see `dicom_pixels`."""
    layout, syntax = _layout(dataset), _syntax(dataset)
    declared = whole(dataset, "NumberOfFrames")
    native = syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", _BIG_ENDIAN)
    order = ">" if syntax == _BIG_ENDIAN else "<"
    if "PixelData" not in dataset:
        count, frame = _floats(dataset, layout, order)
    elif native or syntax.encode() == _DEFLATED:
        element = dataset["PixelData"]
        swapped = order == ">" and element.VR == "OW" and layout.allocated == 8
        count, frame = stored_frames(element.value, layout, declared, order, swapped)
    else:
        check_decoder(syntax)
        streams = encoded_frames(dataset.PixelData, syntax)
        count = len(streams)

        frame = functools.partial(_decoded, streams, layout, syntax)

    if count < 1:
        raise Unreadable("unreadable", "no whole frame")
    return count, frame


def _decoded(streams, layout: Layout, syntax: str, index: int) -> np.ndarray:
    return decode_frame(streams[index], layout, syntax)


def _floats(dataset: Dataset, layout: Layout, order: str):
    """As `stored_frames`, of FloatPixelData or DoubleFloatPixelData."""
    short = "FloatPixelData" in dataset
    data = dataset["FloatPixelData" if short else "DoubleFloatPixelData"].value
    if layout.samples != 1:
        raise Unreadable("unsupported", "floats in colour")
    values = np.frombuffer(data, np.dtype(f"{order}f{4 if short else 8}"))
    size = layout.rows * layout.columns

    def frame(index: int) -> np.ndarray:
        part = values[index * size : (index + 1) * size]
        return part.reshape(layout.rows, layout.columns)

    return values.size // size, frame


def _shown(
    frames: list[np.ndarray], positions: list[int], dataset: Dataset
) -> list[np.ndarray]:
    colour = text(dataset, "PhotometricInterpretation")
    if colour == "PALETTE COLOR":
        return coloured(frames, dataset)
    if frames[0].ndim == 3 or frames[0].dtype == bool:
        return to_uint8(frames)
    return grey_levels(frames, positions, dataset, colour)


def _frame_ms(dataset: Dataset) -> float | None:
    """Milliseconds between frames, or None when no tag says so credibly."""
    vector = numbers(dataset, "FrameTimeVector")[1:]
    candidates = [
        (number(dataset, "FrameTime"), 1),
        (float(np.mean(vector)) if vector else None, 1),
        (number(dataset, "CineRate"), -1),
        (number(dataset, "RecommendedDisplayFrameRate"), -1),
    ]
    for value, power in candidates:
        if value is not None and math.isfinite(value) and value > 0:
            return value if power == 1 else 1000 / value
    return None
