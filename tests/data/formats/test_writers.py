"""Random pictures through every writer at hand, read back through `formats`."""

import io

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.formats.test_stills import first, saved, tiff

FORMS = ("PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG", "JPEG2000", "tifffile",
         "opencv-png", "opencv-tiff", "npy")  # fmt: skip
DEEP = ("tifffile", "opencv-png", "opencv-tiff", "npy")


@st.composite
def written(draw):
    """(file, the right picture, mean levels it may be off)."""
    form = draw(st.sampled_from(FORMS))
    size = draw(st.tuples(st.integers(1, 33), st.integers(1, 33)))
    colour = draw(st.booleans())
    seed = draw(st.integers(0, 99))
    shape = (*size, 3) if colour else size
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    exact = form not in ("JPEG",)
    if not exact:
        pixels = np.full(shape, rng.integers(0, 256, 3) if colour else seed, np.uint8)
    deep = form in ("tifffile", "opencv-png", "opencv-tiff", "npy") and draw(
        st.booleans()
    )
    right = pixels
    if deep:
        pixels = pixels.astype(np.uint16) * 257
        pixels.flat[0], right = 65535, right.copy()
        right.flat[0] = 255
    if form == "npy":
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        return buffer.getvalue(), right, 0
    if form == "tifffile":
        options = draw(
            st.fixed_dictionaries(
                {
                    "bigtiff": st.booleans(),
                    "byteorder": st.sampled_from("<>"),
                    "compression": st.sampled_from([None, "zlib"]),
                    "tile": st.sampled_from([None, (16, 16)]),
                }
            )
        )
        options["photometric"] = "rgb" if colour else "minisblack"
        if colour and draw(st.booleans()):
            return (
                tiff(np.moveaxis(pixels, -1, 0), planarconfig="separate", **options),
                right,
                0,
            )
        return tiff(pixels, **options), right, 0
    if form.startswith("opencv"):
        bgr = pixels[..., ::-1] if colour else pixels
        suffix = "." + form.split("-")[1]
        return cv2.imencode(suffix, np.ascontiguousarray(bgr))[1].tobytes(), right, 0
    options = {
        "PNG": {"compress_level": seed % 10, "optimize": seed % 2 == 0},
        "TIFF": {"compression": draw(st.sampled_from(
            [None, "tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd"]))},
        "WEBP": {"lossless": True, "exact": True},
        "JPEG": {"quality": draw(st.integers(60, 98)), "progressive": seed % 2 == 0,
                 "subsampling": seed % 3},
        "JPEG2000": {"irreversible": False},
    }.get(form, {})  # fmt: skip
    if form == "GIF" and colour:
        form = "PNG"  # 256 colours would not do
        options = {}
    return saved(pixels, form, **options), right, 0 if exact else 2


@settings(max_examples=300, deadline=None)
@given(written())
def test_what_is_written_is_read(case):
    data, right, tolerance = case
    got = first(data)
    if got.ndim == 3 and right.ndim == 2:  # WebP knows no grey
        assert (got == got[:, :, :1]).all()
        got = got[:, :, 0]
    assert got.shape == right.shape
    assert abs(got.astype(int) - right).mean() <= tolerance
