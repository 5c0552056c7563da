"""DICOM files and JPEG streams that tests write."""

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from ultradino_jax.data.formats.dicom import read_dicom
from ultradino_jax.data.formats.unreadable import Unreadable

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(0, 256, (5, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)
GREY = RNG.integers(0, 256, (40, 48), dtype=np.uint8)
EXPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
JPEG, RLE = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.5"
J2K = "1.2.840.10008.1.2.4.90"
SYNTAXES = (EXPLICIT, DEFLATED, RLE, J2K, JPEG, "big", "implicit")


def dataset(shape, colour="MONOCHROME2", bits=8, stored=None, syntax=EXPLICIT, **tags):
    """Tags of pixels [H,W] or [H,W,3]."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1"
    ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    ds.Modality, ds.Rows, ds.Columns = "US", *shape[:2]
    ds.SamplesPerPixel = 3 if len(shape) == 3 else 1
    ds.PhotometricInterpretation = colour
    ds.BitsAllocated, ds.BitsStored = bits, stored or bits
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    if len(shape) == 3:
        ds.PlanarConfiguration = 0
    for name, value in tags.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def saved(ds, data):
    ds.PixelData = data + b"\0" * (len(data) % 2)
    compressed = ds.file_meta.TransferSyntaxUID.is_encapsulated
    ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
    ds["PixelData"].is_undefined_length = compressed
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def frames_of(data):
    return read_dicom(data, 1e6, 100, False).frames


def refusal(data):
    with pytest.raises(Unreadable) as error:
        frames_of(data)
    return error.value.reason, error.value.detail


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=97, **options)
    return buffer.getvalue()


def j2k(pixels, mct=0):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, "JPEG2000", irreversible=False, no_jp2=True, mct=mct)
    return buffer.getvalue()


def marked(stream, *, jfif, adobe):
    """A Pillow stream with other markers: JFIF or not, Adobe's transform or None."""
    segments, position = [], 2
    while stream[position + 1] in (0xE0, 0xEE):
        position += 2 + struct.unpack(">H", stream[position + 2 : position + 4])[0]
    if jfif:
        segments.append(b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0")
    if adobe is not None:
        segments.append(b"\xff\xee\0\x0eAdobe" + struct.pack(">HHHB", 100, 0, 0, adobe))
    return stream[:2] + b"".join(segments) + stream[position:]


def with_ids(stream, ids):
    """The ids of the components in the frame and scan headers changed."""
    stream = bytearray(stream)
    sof, sos = stream.index(b"\xff\xc0"), stream.index(b"\xff\xda")
    for k, name in enumerate(ids):
        stream[sof + 10 + 3 * k] = stream[sos + 5 + 2 * k] = name
    return bytes(stream)


def ycbcr(rgb):
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def group(**tags):
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return item
