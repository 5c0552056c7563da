"""PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, PNM: upright pages, of light or labels.

Pillow decodes, because it notices a file that is cut short, where OpenCV fills in grey.
What Pillow has no mode for, more than 8 bits in colour and TIFFs of signed or unusual
numbers, is decoded by OpenCV and tifffile. Pages are turned as EXIF or TIFF say. Alpha
is ignored: a pixel has the colour that is stored, however transparent it is.
"""

import io
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from ultradino_jax.data.formats.codestreams import ends
from ultradino_jax.data.formats.depth import to_uint8
from ultradino_jax.data.formats.frames import MAX_PIXELS
from ultradino_jax.data.formats.unreadable import Unreadable

logging.getLogger("tifffile").addHandler(logging.NullHandler())
# Sizes are checked here, before a pixel is decoded; Pillow would warn and go on.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION = 274
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
_PNG_DEPTH = 24  # where IHDR holds it
_WITH_LUMA = ("RGB", "RGBA", "P", "PA", "LA")  # Pillow's "L" of them is of ITU-R 601
_GREY = ("L", "LA", "I;16", "I;16B", "I;16L")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def read_pages(
    data: bytes,
    choose: Callable[[int, float | None], list[int]],
    *,
    grey: bool = False,
    stored: bool = False,
) -> tuple[list[np.ndarray], list[int], int]:
    """(pages, their positions, pages in the file).

    choose(pages, milliseconds each or None) -> positions. Pages are uint8 [H,W] or
    [H,W,3] RGB. grey: all [H,W], by Pillow's convert("L"), ITU-R 601. stored: labels,
    not light: numbers as they are in the file, palette indices, [H,W] or [H,W,3].
    Raises Unreadable; Pillow and others raise what they like for a damaged file.
    """
    try:
        return _read(data, choose, grey, stored)
    except Unreadable:
        raise
    except ValueError:  # a text or profile above Pillow's limits, which is no fault
        bare = _without_text(data) if data[:4] == b"\x89PNG" else data
        if bare == data:
            raise
        return _read(bare, choose, grey, stored)


def _read(data: bytes, choose, grey: bool, stored: bool):
    with _opened(data) as image:
        if image is None:
            return _by_tifffile(data, choose, grey, stored)
        if image.width * image.height > MAX_PIXELS:
            raise Unreadable("too_large")
        if image.format in ("JPEG", "MPO") and not ends(data):
            raise Unreadable("unreadable", "truncated")
        if stored:
            _check_lossless(image, data)
        # Of a JPEG's further pictures, one is a preview or another eye's view.
        count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        chosen = choose(count, image.info.get("duration"))
        pages, white_is_zero = [], []
        for position in chosen:
            image.seek(position)
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable("too_large")
            if _beyond_pillow(image, data):
                if image.format == "TIFF":
                    return _by_tifffile(data, choose, grey, stored)
                page = _by_opencv(data, image)
            elif stored:
                page = _labels(image)
            else:
                page = _light(image, grey)
            pages.append(page)
            white_is_zero.append(
                image.format == "TIFF"
                and page.dtype.itemsize > 1
                and _tags(image).get(262) == 0  # Pillow turns 1 and 8 bits by itself
            )
    return _finished(pages, white_is_zero, grey, stored), chosen, count


def count_pages(path: str | os.PathLike) -> int:
    """Pages of a still, from its header."""
    with Image.open(path) as image:
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _finished(pages, white_is_zero, grey: bool, stored: bool) -> list[np.ndarray]:
    if stored:
        return pages
    pages = [
        255 - p if turned else p
        for p, turned in zip(to_uint8(pages), white_is_zero, strict=True)
    ]
    return [to_grey(p) if grey else p for p in pages]


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H,W] or [H,W,3] -> [H,W]: luma of ITU-R 601, as Pillow's convert("L")."""
    if pixels.ndim == 2:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile.ImageFile | None]:
    """The file in Pillow; None for a TIFF that it does not know."""
    if data[:4] in (b"II+\0", b"MM\0+"):  # Pillow stumbles over some BigTIFFs
        yield None
        return
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[:2] not in (b"II", b"MM"):
            raise Unreadable("unreadable") from None
        yield None
        return
    with image:
        yield image


def _without_text(data: bytes) -> bytes:
    """A PNG without its text and profile, which are not unpacked: they may be bombs."""
    parts, position = [data[:8]], 8
    while position + 8 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if data[position + 4 : position + 8] not in _TEXT_CHUNKS:
            parts.append(data[position:end])
        position = end
    return b"".join(parts)


def _beyond_pillow(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Whether Pillow would give fewer bits than there are, or other numbers."""
    if image.format == "PNG":
        return data[_PNG_DEPTH] == 16 and not image.mode.startswith("I;16")
    if image.format != "TIFF":
        return False
    bits = _tags(image).get(258, (1,))
    kinds = set(_tags(image).get(339, (1,)))
    if kinds == {3}:
        # Packed floats in big-endian order come out of it in the wrong one.
        return image.mode != "F" or set(bits) != {32} or data[:2] == b"MM"
    return kinds != {1} or (max(bits) > 8 and not image.mode.startswith("I;16"))


def _tags(image: ImageFile.ImageFile) -> Mapping:
    """The tags of a TIFF's page."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    return image.tag_v2


def _light(image: ImageFile.ImageFile, grey: bool) -> np.ndarray:
    image.info.pop("transparency", None)  # ignored, and Pillow would warn
    if image.mode in ("LAB", "HSV"):
        raise Unreadable("unsupported", f"colour space {image.mode}")
    wanted = "L" if grey or image.mode in ("L", "LA", "1") else "RGB"
    if image.mode not in ("1", wanted) and image.mode[0] not in "IF":
        if image.mode in _WITH_LUMA or wanted == "RGB":
            image_of_mode = image.convert(wanted)
        else:
            image_of_mode = image.convert("RGB").convert("L")
        return _upright(np.asarray(image_of_mode), image)
    return _upright(np.asarray(image), image)


def _check_lossless(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raises Unreadable for a form of labels that changes or inverts them."""
    lossy = image.format in ("JPEG", "MPO", "JPEG2000")
    if image.format == "WEBP":
        lossy = b"VP8L" not in data[:4096]
    if image.format == "TIFF":
        lossy = _tags(image).get(259) in (6, 7)
        if _tags(image).get(262) == 0:
            raise Unreadable("unsupported", "a mask whose zero is white")
    if lossy:
        raise Unreadable("unsupported", "JPEG changes labels: save the mask as PNG")


def _labels(image: ImageFile.ImageFile) -> np.ndarray:
    pixels = np.asarray(image)
    if image.mode in ("LA", "PA"):
        pixels = pixels[:, :, 0]
    elif image.mode in ("RGBA", "RGBX"):
        pixels = pixels[:, :, :3]
    elif image.mode not in (*_GREY, "1", "P", "RGB", "I", "F"):
        raise Unreadable("unsupported", f"labels in the colour space {image.mode}")
    return _upright(pixels, image)


def _upright(pixels: np.ndarray, image: ImageFile.ImageFile) -> np.ndarray:
    """As EXIF says. Of a TIFF Pillow has done it when it decoded the pixels."""
    code = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    return _turned(pixels, code)


def _turned(pixels: np.ndarray, code: object) -> np.ndarray:
    turn = _TURNS.get(code) if isinstance(code, int) else None
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _by_opencv(data: bytes, image: ImageFile.ImageFile) -> np.ndarray:
    """A PNG of 16 bits in colour, or in grey with alpha."""
    image.load()  # only to notice that it is cut short
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise Unreadable("unreadable")
    if image.mode in _GREY:
        pixels = pixels if pixels.ndim == 2 else pixels[:, :, 0]
    else:
        pixels = pixels[:, :, 2::-1]
    return _upright(np.ascontiguousarray(pixels), image)


def _by_tifffile(data, choose, grey: bool, stored: bool):
    """As `read_pages`, for TIFFs that Pillow has no mode for."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        count = len(file.pages)
        chosen, pages, white_is_zero = choose(count, None), [], []
        for position in chosen:
            page = file.pages[position]
            assert isinstance(page, tifffile.TiffPage)
            if page.imagewidth * page.imagelength > MAX_PIXELS:
                raise Unreadable("too_large")
            unusual = page.imagedepth != 1 or page.samplesperpixel > 4
            if unusual or page.photometric not in _TIFF_COLOURS:
                raise Unreadable("unsupported", "TIFF colour space")
            white = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
            if white and stored:
                raise Unreadable("unsupported", "a mask whose zero is white")
            white_is_zero.append(white)
            try:
                pixels = page.asarray()
            except (NotImplementedError, ValueError, ImportError) as error:
                if "imagecodecs" not in str(error):
                    raise
                pages.append(_tiff_by_opencv(data, position, page))
                continue
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
                pixels = np.moveaxis(pixels, 0, -1)
            if pixels.ndim == 3:
                samples = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
                pixels = pixels[:, :, :samples].squeeze(-1 if samples == 1 else ())
            tag = page.tags.get(_ORIENTATION)
            code = int(tag.value) if tag is not None else 1
            pages.append(_turned(np.ascontiguousarray(pixels), code))
    return _finished(pages, white_is_zero, grey, stored), chosen, count


def _tiff_by_opencv(data: bytes, position: int, page) -> np.ndarray:
    """A page of 16 bits in a compression that tifffile alone does not undo."""
    height, width = page.imagelength, page.imagewidth
    plain = page.bitspersample in (12, 16) and page.samplesperpixel in (1, 3)
    if page.dtype == np.uint16 and plain:
        good, pages = cv2.imdecodemulti(
            np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED
        )
        if good and len(pages) > position:
            pixels = pages[position]  # upright already
            colour = pixels.ndim == 3
            if {*pixels.shape[:2]} == {height, width} and pixels.dtype == np.uint16:
                # It fills up 12 bits.
                pixels = np.right_shift(pixels, 16 - int(page.bitspersample))
                return np.ascontiguousarray(pixels[..., ::-1]) if colour else pixels
    raise Unreadable("missing_decoder", "TIFF compression: pip install imagecodecs")


_TIFF_COLOURS = (
    tifffile.PHOTOMETRIC.MINISBLACK,
    tifffile.PHOTOMETRIC.MINISWHITE,
    tifffile.PHOTOMETRIC.RGB,
)
