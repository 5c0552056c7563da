"""Burned-in text that is removed on the ordinary path is never stored on an odd one."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom.encaps import encapsulate

from tests.data.formats.files import dataset, group, j2k, jpeg, saved, ycbcr
from tests.data.prepare.inputs import encoded, fan, region_item, run, screen, skipped
from ultradino_jax.data.sources import CacheSource

SCREEN, FAN, INTERFACE = screen(*fan(seed=3))
RGB = np.repeat(SCREEN[:, :, None], 3, axis=2)
OTHER = np.repeat(screen(*fan(seed=4))[0][:, :, None], 3, axis=2)
SYNTAX = {"JPEG": "1.2.840.10008.1.2.4.50", "J2K": "1.2.840.10008.1.2.4.90"}


def native(pixels, colour, **tags):
    bits = 8 * pixels.dtype.itemsize
    shape = tags.pop("shape", pixels.shape)
    return saved(dataset(shape, colour, bits, **tags), pixels.tobytes())


def half(rgb):
    full = ycbcr(rgb)
    out = np.empty((full.shape[0], full.shape[1] // 2, 4), np.uint8)
    out[..., 0], out[..., 1] = full[:, 0::2, 0], full[:, 1::2, 0]
    out[..., 2:] = full[:, 0::2, 1:]
    return out


def coded(streams, colour, syntax, shape=RGB.shape, **tags):
    ds = dataset(shape, colour, syntax=SYNTAX[syntax], **tags)
    return saved(ds, encapsulate(streams))


def palette():
    ds = dataset(SCREEN.shape, "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
        setattr(
            ds,
            f"{name}PaletteColorLookupTableData",
            np.arange(256, dtype="u1").tobytes(),
        )
    return saved(ds, SCREEN.tobytes())


def rle():
    ds = dataset(RGB.shape, "RGB")
    ds.SOPInstanceUID, ds.SOPClassUID = "1.2.3", "1.2"
    ds.PixelData = RGB.tobytes()
    ds["PixelData"].VR = "OB"
    ds.compress("1.2.840.10008.1.2.5", encoding_plugin="pydicom")
    ds.PlanarConfiguration = 1
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def enhanced():
    deep = np.stack([SCREEN.astype(np.uint16) * 16] * 2)
    window = group(FrameVOILUTSequence=[group(WindowCenter=2048, WindowWidth=4096)])
    return native(
        deep, "MONOCHROME2", shape=SCREEN.shape, NumberOfFrames=9,
        SharedFunctionalGroupsSequence=[window],
    )  # fmt: skip


def tiff(pixels, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def pages():
    buffer = io.BytesIO()
    more = [Image.fromarray(OTHER[..., 0])]
    Image.fromarray(SCREEN).save(buffer, "GIF", save_all=True, append_images=more)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tagged():
    """A region that the tags give too large on purpose: the pixels decide inside."""
    height, width = SCREEN.shape
    item = region_item(0, 0, width + 50, height + 50)  # does not fit: not believed
    return native(SCREEN, "MONOCHROME2", SequenceOfUltrasoundRegions=[item])


ODD = {
    "rgb": lambda: native(RGB, "RGB"),
    "planar": lambda: native(
        RGB.transpose(2, 0, 1), "RGB", shape=RGB.shape, PlanarConfiguration=1
    ),
    "planar without saying so": lambda: native(
        RGB.transpose(2, 0, 1), "RGB", shape=RGB.shape
    ),
    "interleaved called planar": lambda: native(RGB, "RGB", PlanarConfiguration=1),
    "ycbcr": lambda: native(ycbcr(RGB), "YBR_FULL"),
    "ycbcr called rgb": lambda: native(ycbcr(RGB), "RGB"),
    "rgb called ycbcr": lambda: native(RGB, "YBR_FULL"),
    "4:2:2": lambda: native(half(RGB), "YBR_FULL_422", shape=RGB.shape),
    "4:2:2 of all samples": lambda: native(ycbcr(RGB), "YBR_FULL_422"),
    "jpeg called rgb": lambda: coded([jpeg(RGB)], "RGB", "JPEG"),
    "rgb jpeg": lambda: coded([jpeg(RGB, keep_rgb=True)], "YBR_FULL_422", "JPEG"),
    "jpeg 2000": lambda: coded([j2k(RGB, mct=1)], "RGB", "J2K"),
    "more frames than said": lambda: coded(
        [jpeg(RGB), jpeg(OTHER)], "YBR_FULL_422", "JPEG", NumberOfFrames=1
    ),
    "other columns": lambda: native(SCREEN, "MONOCHROME2", Columns=SCREEN.shape[1] - 7),
    "palette": palette,
    "run lengths": rle,
    "inverse": lambda: native(255 - SCREEN, "MONOCHROME1"),
    "enhanced": enhanced,
    "deep": lambda: native(SCREEN.astype(np.uint16) * 257, "MONOCHROME2"),
    "regions that do not fit": tagged,
    "deep png": lambda: encoded(SCREEN.astype(np.uint16) * 16),
    "deep colour png": lambda: encoded(RGB.astype(np.uint16) * 257),
    "white is zero": lambda: tiff(255 - SCREEN, photometric="miniswhite"),
    "planes in tiff": lambda: tiff(
        RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    ),
    "gif": pages,
    "array": lambda: npy(np.stack([SCREEN, SCREEN]).astype(np.float32)),
}


@pytest.mark.parametrize("name", ODD)
def test_no_odd_path_keeps_the_text(tmp_path, name):
    root, cache = tmp_path / "in", tmp_path / "cache"
    root.mkdir()
    (root / "x").write_bytes(ODD[name]())
    run(root, cache, encoding="raw", short_side=0, dedup="none")
    manifest = (cache / "manifest.json").read_text()
    if '"records": 0' in manifest:
        assert skipped(cache)  # nothing is stored, and it is said why
        return
    source = CacheSource(cache)
    for index in range(len(source)):
        record = source[index][:, :, 0]
        h, w = record.shape
        assert h <= SCREEN.shape[0] and w <= SCREEN.shape[1]
        match = cv2.matchTemplate(SCREEN, record, cv2.TM_CCOEFF_NORMED)
        y, x = np.unravel_index(match.argmax(), match.shape)
        place = (slice(y, y + h), slice(x, x + w))
        text = (INTERFACE[place] > 60) & ~FAN[place]
        assert (record[text] > 60).sum() < 20
        assert (record[FAN[place]] > 0).mean() > 0.5


def test_the_ordinary_path_keeps_the_fan(tmp_path):
    """What the test above compares with: the text is removed, the picture is not."""
    root, cache = tmp_path / "in", tmp_path / "cache"
    root.mkdir()
    (root / "x").write_bytes(native(SCREEN, "MONOCHROME2"))
    run(root, cache, encoding="raw", short_side=0, dedup="none")
    record = CacheSource(cache)[0][:, :, 0]
    assert record.shape[0] < SCREEN.shape[0] and (record > 0).mean() > 0.3
