"""What the markers of JPEG, JPEG-LS and JPEG 2000 streams say of their colours."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ultradino_jax.data.formats.unreadable import Unreadable

_SCAN = 0xDA


@dataclass
class Jpeg:
    """What the markers of a JPEG or JPEG-LS stream say."""

    precision: int = 0
    height: int = 0
    width: int = 0
    samples: int = 0
    ids: bytes = b""
    sizes: frozenset[int] = frozenset()
    jfif: bool = False
    adobe: int | None = None
    transformed: bool = False  # by the colour transforms of a JPEG-LS variant

    def colour(self, tag: str) -> str:
        """'RGB' or 'YBR', by the table of `dicom_pixels`. Raises Unreadable."""
        if self.transformed:
            raise Unreadable("unsupported", "JPEG-LS with a colour transform")
        if self.adobe == 0 and self.jfif:
            raise Unreadable("unsupported", "the JPEG's markers contradict each other")
        if self.adobe == 0 or self.ids in (b"RGB", b"rgb"):
            return "RGB"
        if self.adobe == 1 or self.jfif or len(self.sizes) > 1:
            return "YBR"
        if self.adobe is not None or tag not in ("RGB", "YBR_FULL", "YBR_FULL_422"):
            raise Unreadable("unsupported", "neither stream nor tags say the colours")
        return tag[:3]


def _segments(stream: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(marker, where it is, content) of the segments up to the first scan, its too."""
    position = 2
    while position + 4 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD7:  # fill, or no length
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack(">H", stream[position + 2 : position + 4])
        yield marker, position, stream[position + 4 : position + 2 + length]
        if marker == _SCAN:
            return
        position += 2 + length


def ends(stream: bytes) -> bool:
    """Whether a JPEG has its end marker after its pixels begin.

    One that is cut short may go on with whatever was on the disk; a thumbnail before
    the pixels has an end marker of its own.
    """
    starts = (at for marker, at, _ in _segments(stream) if marker == _SCAN)
    return stream.rfind(b"\xff\xd9", next(starts, 2)) >= 0


def jpeg_header(stream: bytes) -> Jpeg:
    """The markers of a JPEG or JPEG-LS stream up to its first scan."""
    about = Jpeg()
    for marker, _, body in _segments(stream):
        frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        if frame or marker == 0xF7:
            about.precision, about.height, about.width, about.samples = struct.unpack(
                ">BHHB", body[:6]
            )
            about.ids = body[6::3][: about.samples]
            about.sizes = frozenset(body[7::3][: about.samples])
        elif marker == 0xE0 and body.startswith(b"JFIF\0"):
            about.jfif = True
        elif marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            about.adobe = body[11]
        elif marker == 0xE8 and body.startswith(b"mrfx"):
            about.transformed = any(body[4:5])
    return about


def is_transformed(stream: bytes, position: int) -> bool:
    """Whether the COD marker asks for a multiple component transform."""
    position += 2
    while position + 4 <= len(stream):
        marker, length = struct.unpack(">HH", stream[position : position + 4])
        if marker == 0xFF52:
            return stream[position + 8] == 1
        if marker == 0xFF90:
            break
        position += 2 + length
    raise Unreadable("unreadable", "JPEG 2000 without a COD marker")
