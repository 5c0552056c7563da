"""The frames of a DICOM file as they are stored, in grey, palette indices or RGB.

What is where in the data is asked of the data, not of the tags:

- Frames. Uncompressed: as many as the bytes hold. Compressed: a frame begins where a
  fragment begins with the mark of its codec; offset tables are not asked.
- Colour, of three samples:

  codec            stream says                         tag says               taken for
  JPEG             Adobe marker 0, ids "RGB"           anything               RGB
                   Adobe marker 1, JFIF                anything               YCbCr
                   nothing, samples of two sizes       anything               YCbCr
                   nothing                             RGB or YBR             the tag's
                   Adobe marker 0 and JFIF             anything               refused
  JPEG 2000        transformed                         RGB, YBR_RCT, YBR_ICT  RGB
                   transformed                         YBR_FULL or nothing    refused
                   not transformed                     RGB or YBR_FULL        the tag's
                   not transformed                     YBR_RCT, YBR_ICT       refused
  JPEG-LS, RLE     -                                   RGB or YBR_FULL        the tag's
  uncompressed     bytes for two samples a pixel       YBR_FULL_422           4:2:2
                   bytes for three                     YBR_FULL_422, YBR_FULL YCbCr
                   bytes for three                     RGB                    RGB

  Whatever else the tag says of three samples is refused. YCbCr becomes RGB once.
- Compressed data is interleaved as its codec gives it; PlanarConfiguration is asked of
  uncompressed data alone, 0 where it is missing.
"""

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space

from ultradino_jax.data.formats.codestreams import ends, is_transformed, jpeg_header
from ultradino_jax.data.formats.unreadable import Unreadable

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
_JPEG_8_BIT = ("1.2.840.10008.1.2.4.50", _12_BIT)
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203))
_RLE = "1.2.840.10008.1.2.5"
_STARTS = (b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")  # JPEG(-LS), JPEG 2000
_PICTURES = re.compile(rb"(?<=\xff\xd9)\0?(?=\xff\xd8\xff)")  # between JPEGs


@dataclass(frozen=True)
class Layout:
    """What the tags say of the pixels. colour: PhotometricInterpretation, or ""."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    high_bit: int
    signed: bool
    planar: bool
    colour: str


def stored_frames(
    data: bytes, layout: Layout, declared: int | None, order: str, swapped: bool
) -> tuple[int, Callable[[int], np.ndarray]]:
    """(how many frames there are, index -> that frame), of uncompressed integers.

    Frames are [H,W] or RGB [H,W,3] of the stored numbers. declared: how many the
    tags say there are. order: '<' or '>'; swapped: bytes stand in words of the other
    order. Raises Unreadable.
    """
    _check_colour(layout)
    if swapped:
        whole = data + b"\0" * (len(data) % 2)
        data = np.frombuffer(whole, "u2").byteswap().tobytes()
    pixels = layout.rows * layout.columns
    half = layout.colour == "YBR_FULL_422" and _is_half(len(data), pixels, declared)
    if half and layout.columns % 2:
        raise Unreadable("unsupported", "4:2:2 of an odd width")
    bits = pixels * (2 if half else layout.samples) * layout.allocated
    # Files are of even length: a last byte that fills up is no frame of one pixel.
    asked = -(-(declared or 1) * bits // 8)
    count = len(data) * 8 // bits
    rest = data[-(-count * bits // 8) :]
    if declared and len(data) == asked + asked % 2:
        count = declared
    elif count and len(data) > asked and len(rest) > 1 and any(rest):
        # Cut to a wrong size a picture is a scramble, and its text would survive.
        raise Unreadable("unsupported", "length does not fit rows and columns")
    if layout.samples == 3 and layout.allocated != 8 and layout.colour != "RGB":
        raise Unreadable("unsupported", "YCbCr of more than 8 bits")

    def frame(index: int) -> np.ndarray:
        if layout.allocated == 1:
            first, last = index * bits // 8, -(-(index + 1) * bits // 8)
            unpacked = np.unpackbits(
                np.frombuffer(data[first:last], np.uint8), bitorder="little"
            )
            flat = unpacked[index * bits % 8 :][:pixels]
            return flat.reshape(layout.rows, layout.columns).astype(bool)
        size = bits // 8
        kind = np.dtype(f"{order}u{layout.allocated // 8}")
        flat = np.frombuffer(data, kind, size // kind.itemsize, index * size)
        if half:
            return _rgb(_spread(flat.reshape(layout.rows, -1, 4)))
        if layout.samples == 1:
            return _numbers(flat.reshape(layout.rows, layout.columns), layout)
        if layout.planar:
            array = flat.reshape(3, layout.rows, layout.columns).transpose(1, 2, 0)
        else:
            array = flat.reshape(layout.rows, layout.columns, 3)
        return _numbers(array, layout) if layout.colour == "RGB" else _rgb(array)

    return count, frame


def _check_colour(layout: Layout) -> None:
    known = {
        1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", ""),
        3: ("RGB", "YBR_FULL", "YBR_FULL_422"),
    }
    if layout.colour not in known.get(layout.samples, ()):
        raise Unreadable("unsupported", "colours that the tags do not fit")


def _is_half(length: int, pixels: int, declared: int | None) -> bool:
    """Whether bytes are 4:2:2, two a pixel, or three a pixel whatever the tag says."""

    def fits(samples: int) -> bool:
        return length >= samples * pixels and length % (samples * pixels) in (0, 1)

    certain = [n for n in (2, 3) if length - (declared or 0) * n * pixels in (0, 1)]
    found = certain or [n for n in (2, 3) if fits(n)]
    if len(found) != 1:
        raise Unreadable("unsupported", "length fits neither 4:2:2 nor all samples")
    return found[0] == 2


def _spread(half: np.ndarray) -> np.ndarray:
    """[H,W/2,4] of Y1 Y2 Cb Cr -> [H,W,3] of Y Cb Cr (PS3.3 C.7.6.3.1.2)."""
    out = np.empty((half.shape[0], half.shape[1], 2, 3), np.uint8)
    out[..., 0] = half[..., :2]
    out[..., 1], out[..., 2] = half[..., 2:3], half[..., 3:4]
    return out.reshape(half.shape[0], -1, 3)


def _rgb(ycbcr: np.ndarray) -> np.ndarray:
    if ycbcr.dtype != np.uint8:
        raise Unreadable("unsupported", "YCbCr of more than 8 bits")
    return convert_color_space(np.ascontiguousarray(ycbcr), "YBR_FULL", "RGB")


def _numbers(array: np.ndarray, layout: Layout) -> np.ndarray:
    """Stored bits alone: overlays and leftovers may lie in the others."""
    bits = layout.stored
    if bits == layout.allocated:
        native = array.dtype.newbyteorder("=")
        array = array.astype(native, copy=False)
        return array.view(native.str.replace("u", "i")) if layout.signed else array
    wide = array.astype(np.int64) >> max(layout.high_bit + 1 - bits, 0)
    wide &= 2**bits - 1
    if layout.signed:
        return np.where(wide >= 2 ** (bits - 1), wide - 2**bits, wide)
    return wide.astype(np.uint32 if bits > 16 else np.uint16 if bits > 8 else np.uint8)


def encoded_frames(data: bytes, syntax: str) -> list[bytes]:
    """The compressed frames that there are, each a whole stream."""
    fragments = list(generate_fragments(data))[1:]  # the first is the offset table
    fragments = [f for f in fragments if f]
    if syntax == _RLE:  # a fragment is a frame, PS3.5 A.4.2
        return fragments
    frames: list[list[bytes]] = []
    for fragment in fragments:
        if fragment.startswith(_STARTS):
            frames.append([])
        if frames:
            frames[-1].append(fragment)
    streams = [b"".join(parts) for parts in frames]
    # Some writers put several pictures into one fragment.
    return [part for stream in streams for part in _PICTURES.split(stream)]


def check_decoder(syntax: str) -> None:
    """Raises Unreadable when no decoder of a compressed transfer syntax is here."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Unreadable("unsupported", "transfer syntax") from None
    if not decoder.is_available:
        raise Unreadable("missing_decoder", _DECODERS.get(syntax, ""))


def decode_frame(stream: bytes, layout: Layout, syntax: str) -> np.ndarray:
    """One compressed frame -> [H,W] or RGB [H,W,3] of the stored numbers.

    Raises Unreadable, and what decoders raise for a damaged stream.
    """
    if syntax == _RLE:
        _check_colour(layout)
        return _decoded(stream, layout, syntax, layout.stored, layout.colour)
    if syntax in _JPEG_2000:
        return _jpeg_2000(stream, layout, syntax)
    about = jpeg_header(stream)
    if not ends(stream):
        raise Unreadable("unreadable", "truncated")
    if (about.height, about.width) != (layout.rows, layout.columns):
        raise Unreadable("unsupported", "the stream's size is not that of the tags")
    if about.samples != layout.samples:
        raise Unreadable(
            "unsupported", "the stream's colours are not those of the tags"
        )
    if syntax in _JPEG_8_BIT and about.precision > 8:
        raise Unreadable("missing_decoder", _DECODERS[_12_BIT])
    if layout.samples == 1:
        _check_colour(layout)
        if syntax in _JPEG_8_BIT:
            return _pillow(stream, raw=False)
        return _decoded(stream, layout, syntax, about.precision, layout.colour)
    colour = about.colour(layout.colour)
    if syntax in _JPEG_8_BIT:
        # Pillow turns YCbCr into RGB where it takes the stream for that, as we do.
        told = about.adobe == 0 or about.ids == b"RGB"
        return _pillow(stream, raw=colour == "RGB" and not told)
    pixels = _decoded(stream, layout, syntax, about.precision, "RGB")
    return pixels if colour == "RGB" else _rgb(pixels)


def _pillow(stream: bytes, raw: bool) -> np.ndarray:
    """Pixels of a JPEG; raw: its components as they are."""
    with Image.open(io.BytesIO(stream), formats=("JPEG",)) as image:
        if raw and image.mode == "RGB":
            image.draft("YCbCr", image.size)
        return np.asarray(image)


def _jpeg_2000(stream: bytes, layout: Layout, syntax: str) -> np.ndarray:
    start = stream.find(b"\xff\x4f\xff\x51")
    if start < 0:
        raise Unreadable("unreadable", "JPEG 2000")
    size = struct.unpack(">8I", stream[start + 8 : start + 40])
    (samples,) = struct.unpack(">H", stream[start + 40 : start + 42])
    depth = stream[start + 42]
    if (size[1] - size[3], size[0] - size[2]) != (layout.rows, layout.columns):
        raise Unreadable("unsupported", "the stream's size is not that of the tags")
    if samples != layout.samples:
        raise Unreadable(
            "unsupported", "the stream's colours are not those of the tags"
        )
    precision = (depth & 0x7F) + 1
    if bool(depth & 0x80) != layout.signed:
        raise Unreadable("unsupported", "the stream's sign is not that of the tags")
    if samples == 1:
        _check_colour(layout)
        return _decoded(stream, layout, syntax, precision, layout.colour)
    transformed = is_transformed(stream, start)
    good = {True: ("RGB", "YBR_RCT", "YBR_ICT"), False: ("RGB", "YBR_FULL")}
    if layout.colour not in good[transformed]:
        raise Unreadable(
            "unsupported", "the stream's colours are not those of the tags"
        )
    pixels = _decoded(stream, layout, syntax, precision, "RGB")
    return _rgb(pixels) if layout.colour == "YBR_FULL" else pixels


def _decoded(
    stream: bytes, layout: Layout, syntax: str, precision: int, colour: str
) -> np.ndarray:
    """By whichever of pydicom's plugins is here; no conversion of colour."""
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        "photometric_interpretation": colour or "MONOCHROME2",
        "bits_allocated": layout.allocated,
        "bits_stored": min(precision, layout.allocated),
        "pixel_representation": int(layout.signed),
        "planar_configuration": 0,
        "pixel_keyword": "PixelData",
        "allow_excess_frames": False,
    }
    content = encapsulate([stream + b"\0" * (len(stream) % 2)], has_bot=False)
    decoder = get_decoder(syntax)
    pixels, _ = decoder.as_array(content, index=0, raw=True, **options)
    if syntax == _RLE and (layout.samples == 1 or colour == "RGB"):
        return _numbers(pixels.view(f"u{pixels.itemsize}"), layout)
    return _rgb(pixels) if syntax == _RLE else pixels
