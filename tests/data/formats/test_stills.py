"""Stills read through `formats`, against Pillow, tifffile and closed formulas."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image, ImageOps

from ultradino_jax.data.formats.depth import to_uint8
from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.data.formats.readers import (
    HEAD,
    STILLS,
    kind_of,
    read_clip,
    read_picture,
)
from ultradino_jax.data.formats.unreadable import Unreadable

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (24, 40), dtype=np.uint8)
RGB = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)


def saved(image, form, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def first(data, **options):
    return read_picture(data, **options)[0]


def luma(rgb):
    return np.asarray(Image.fromarray(rgb).convert("L"))


def test_prepare_and_training_read_the_same_pixels():
    for data in (saved(RGB, "JPEG"), saved(RGB, "PNG"), saved(GREY, "JPEG")):
        frame = read_clip(data, kind_of(data[:HEAD])).frames[0]
        assert np.array_equal(first(data), frame)
        grey = frame if frame.ndim == 2 else luma(frame)
        assert np.array_equal(first(data, channels=1), grey)
        assert first(data, channels=3).shape == (24, 40, 3)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("write", ["png", "tiff", "npy", "opencv"])
def test_one_rule_of_depth(bits, write):
    deep = RNG.integers(0, 2**bits, (24, 40)).astype(np.uint16)
    deep[0, 0] = 2**bits - 1
    if write == "npy":
        buffer = io.BytesIO()
        np.save(buffer, deep)
        data = buffer.getvalue()
    elif write == "opencv":
        data = cv2.imencode(".png", deep)[1].tobytes()
    else:
        data = saved(deep, "PNG") if write == "png" else tiff(deep)
    want = np.rint(deep * (255 / (2**bits - 1)))
    assert np.array_equal(first(data), want)
    assert np.array_equal(read_clip(data, kind_of(data[:HEAD])).frames[0], want)


def test_numbers_of_any_type():
    wide = RNG.normal(0, 1000, (24, 40))
    wide[3, 4], wide[5, 6] = np.nan, np.inf
    for kind in (np.float16, np.float32, np.float64):
        pixels = wide.astype(kind)
        finite = pixels[np.isfinite(pixels)].astype(float)
        span = finite.max() - finite.min()
        want = (
            np.where(np.isfinite(pixels), pixels, finite.min()) - finite.min()
        ) / span
        got = first(tiff(pixels))
        assert abs(got - want.astype(float) * 255).max() <= 0.51 + 255e-3
        for options in ({"byteorder": ">", "compression": "zlib"}, {"tile": (16, 16)}):
            assert np.array_equal(first(tiff(pixels, **options)), first(tiff(pixels)))
    for kind in (np.int8, np.int16, np.int32):
        pixels = np.nan_to_num(wide / 10, posinf=0).astype(kind)
        low, high = int(pixels.min()), int(pixels.max())
        want = np.rint((pixels.astype(float) - low) * (255 / (high - low)))
        assert np.array_equal(first(tiff(pixels)), want)
    many = np.full((24, 40), 2**32 - 1, np.uint32)
    many[:, ::2] = 2**31
    assert set(np.unique(first(tiff(many)))) == {128, 255}
    bits = tiff(GREY > 99, photometric="minisblack")
    assert np.array_equal(first(bits), (GREY > 99) * 255)
    with pytest.raises(Unreadable, match="no finite pixel"):
        to_uint8([np.full((4, 4), np.nan)])
    assert not to_uint8([np.full((4, 4), 7.0)])[0].any()


def packed_12_bit(pixels, photometric=1):
    a = pixels.reshape(len(pixels), -1, 2)
    parts = [
        a[..., 0] >> 4,
        ((a[..., 0] & 15) << 4) | (a[..., 1] >> 8),
        a[..., 1] & 255,
    ]
    data = np.stack(parts, -1).astype(np.uint8).tobytes()
    h, w = pixels.shape
    tags = [(256, w), (257, h), (258, 12), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, h), (279, len(data))]
    ifd = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + ifd + b"\0" * 4


def test_tiffs_of_every_make():
    deep = RNG.integers(0, 65536, (24, 40), dtype=np.uint16)
    deep[0, 0] = 65535
    colour = np.stack([deep, deep // 2, deep // 3], -1)
    want, want_colour = np.rint(deep / 257), np.rint(colour / 257)
    for options in (
        {}, {"bigtiff": True}, {"byteorder": ">"}, {"tile": (16, 16)},
        {"compression": "zlib", "predictor": True}, {"rowsperstrip": 5},
    ):  # fmt: skip
        assert np.array_equal(first(tiff(deep, **options)), want), options
        got = first(tiff(colour, photometric="rgb", **options))
        assert np.array_equal(got, want_colour), options
    planes = {"photometric": "rgb", "planarconfig": "separate"}
    assert np.array_equal(first(tiff(np.moveaxis(RGB, -1, 0), **planes)), RGB)
    assert np.array_equal(
        first(tiff(np.moveaxis(colour, -1, 0), **planes)), want_colour
    )
    # White is zero: turned, whatever the depth.
    for pixels in (255 - GREY, 65535 - deep, GREY.astype(np.float32)):
        light = to_uint8([pixels])[0]
        got = first(tiff(pixels, photometric="miniswhite"))
        assert np.array_equal(got, 255 - light), pixels.dtype
    twelve = deep >> 4
    assert np.array_equal(first(packed_12_bit(twelve)), np.rint(twelve * (255 / 4095)))
    white = first(packed_12_bit(twelve, photometric=0))
    assert np.array_equal(white, 255 - np.rint(twelve * (255 / 4095)))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        assert np.array_equal(first(saved(RGB, "TIFF", compression=compression)), RGB)
    fax = saved(Image.fromarray(GREY > 99), "TIFF", compression="group4")
    assert np.array_equal(first(fax), (GREY > 99) * 255)
    lossy = saved(np.full_like(RGB, 90), "TIFF", compression="jpeg", quality=95)
    assert abs(first(lossy).astype(int) - 90).max() <= 2


def test_pages_are_counted_and_read():
    pages = [np.full((24, 40), 10 * k, np.uint8) for k in range(1, 6)]
    images = [Image.fromarray(p) for p in pages]
    many = {"save_all": True, "append_images": images[1:]}
    for data in (
        saved(images[0], "TIFF", **many),
        saved(images[0], "GIF", **many),
        saved(images[0], "WEBP", lossless=True, **many),
        saved(images[0], "PNG", **many),
        tiff(np.stack(pages).astype(np.float16)),
    ):
        clip = read_clip(data, kind_of(data[:HEAD]), fps=1000, max_frames=9)
        assert clip.count == 5 and clip.chosen == [0, 1, 2, 3, 4]
        pixel, count = read_picture(data, channels=1)
        assert count == 5 and pixel.shape == (24, 40)
        if clip.frames[0].ndim == 2 and data[:4] != b"II*\0":
            assert [f[0, 0] for f in clip.frames] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("code", range(1, 9))
def test_pictures_and_masks_are_upright(code):
    exif = Image.Exif()
    exif[274] = code
    shapes = GREY > 99
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = saved((shapes * 255).astype(np.uint8), form, exif=exif, **options)
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            want = np.asarray(upright.convert("L"))
        assert np.array_equal(first(data, channels=1), want), form
    mask = saved(shapes.astype(np.uint8), "PNG", exif=exif)
    want = want > 127
    assert np.array_equal(read_labels(mask), want)
    deep = saved(GREY.astype(np.uint16) * 257, "PNG", exif=exif)
    plain = saved(GREY, "PNG", exif=exif)
    assert np.array_equal(first(deep), first(plain))
    tag = [(274, 3, 1, code, False)]
    half = first(tiff(GREY.astype(np.float16), extratags=tag))
    assert half.shape == want.shape


def chunk(kind, content):
    length = struct.pack(">I", len(content))
    return length + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_what_surrounds_a_picture_says_nothing():
    png, jpeg = saved(GREY, "PNG"), saved(GREY, "JPEG")
    text = chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 200_000_000))
    for extra in (text, bomb, chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb[20:-4])):
        for at in (33, len(png) - 12):  # after IHDR, and before IEND
            assert np.array_equal(first(png[:at] + extra + png[at:]), GREY)
    for junk in (b"\0" * 100_000, b"MORE" * 5000, jpeg):
        assert np.array_equal(first(jpeg + junk), first(jpeg))
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(jpeg) + 2) + jpeg
    assert np.array_equal(first(jpeg[:2] + thumbnail + jpeg[2:]), first(jpeg))
    for cut in (0.3, 0.6, 0.9, 0.99):
        for before in (b"", thumbnail):
            half = jpeg[:2] + before + jpeg[2 : int(len(jpeg) * cut)]
            for filler in (b"", b"\0" * 9000):
                with pytest.raises((Unreadable, OSError)):
                    first(half + filler)


def test_what_cannot_be_read_is_refused():
    wide = bytearray(saved(GREY, "PNG"))
    wide[16:24] = struct.pack(">II", 60_000, 60_000)
    wide[29:33] = struct.pack(">I", zlib.crc32(wide[12:29]))
    many = {"photometric": "minisblack", "planarconfig": "contig"}
    seven = tiff(np.zeros((24, 40, 7), np.float32), **many)
    lab = saved(Image.merge("LAB", [Image.fromarray(GREY)] * 3), "TIFF")
    for data, reason in (
        (bytes(wide), "too_large"),
        (lab, "unsupported"),
        (b"words", "unsupported"),
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 300, "archive"),
        (b"\x1aE\xdf\xa3" + b"\0" * 300, "video"),
        (seven, "unsupported"),
    ):
        with pytest.raises(Unreadable) as error:
            first(data)
        assert error.value.reason == reason


def test_transparency_and_cmyk():
    alpha = np.dstack([RGB, RNG.integers(0, 256, RGB.shape[:2], dtype=np.uint8)])
    assert np.array_equal(first(saved(alpha, "PNG")), RGB)
    # 16 bits a channel, by OpenCV, which has BGRA.
    deep = cv2.imencode(".png", alpha[..., [2, 1, 0, 3]].astype(np.uint16) * 257)[1]
    assert np.array_equal(first(deep.tobytes()), RGB)
    palette = Image.fromarray(RGB).quantize(9)
    data = saved(palette, "PNG", transparency=0)
    assert np.array_equal(first(data), np.asarray(palette.convert("RGB")))
    flat = Image.new("RGB", (32, 32), (200, 100, 50)).convert("CMYK")
    got = first(saved(flat, "JPEG", quality=97))
    assert abs(got.astype(int) - [200, 100, 50]).max() <= 3


def test_skimage_s_pictures_are_as_pillow_reads_them():
    folder = Path(skimage.data.__file__).parent
    seen = 0
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        kind = kind_of(path.read_bytes()[:HEAD])
        if kind not in STILLS:
            continue
        got = read_picture(path)[0]
        if path.name == "multipage_rgb.tif":  # float64 in planes: Pillow has no mode
            planes = tifffile.imread(path, key=0)
            want = to_uint8([np.moveaxis(planes, 0, -1)])[0]
        else:
            with Image.open(path) as image:
                grey = image.mode in ("L", "1", "LA")
                want = np.asarray(image.convert("L" if grey else "RGB"))
        assert np.array_equal(got, want), path.name
        seen += 1
    assert seen >= 10
