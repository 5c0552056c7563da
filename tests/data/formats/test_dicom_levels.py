"""Stored numbers of DICOM files as grey levels: windows, tables, bits, floats."""

import io

import numpy as np
import pytest
from pydicom.pixels.processing import apply_windowing

from tests.data.formats.files import (
    GREY,
    RNG,
    dataset,
    frames_of,
    group,
    saved,
)


def test_windows_of_functional_groups():
    stack = RNG.integers(0, 4096, (3, 40, 48), dtype=np.uint16)
    windows = [(500, 900), (1000, 2000), (3000, 700)]

    def right(values, centre, width):
        share = (values - (centre - 0.5)) / (width - 1) + 0.5
        return np.rint(np.clip(share, 0, 1) * 255)

    voi = [
        group(FrameVOILUTSequence=[group(WindowCenter=c, WindowWidth=w)])
        for c, w in windows
    ]
    ds = dataset(GREY.shape, bits=16, stored=12, NumberOfFrames=3)
    ds.WindowCenter, ds.WindowWidth = 7, 7  # the nearest one counts
    ds.SharedFunctionalGroupsSequence = [voi[0]]
    want = [right(f, *windows[0]) for f in stack]
    assert np.array_equal(frames_of(saved(ds, stack.tobytes())), want)
    ds.PerFrameFunctionalGroupsSequence = voi
    want = [right(f, *w) for f, w in zip(stack, windows, strict=True)]
    assert np.array_equal(frames_of(saved(ds, stack.tobytes())), want)
    rescale = group(RescaleSlope=2, RescaleIntercept=-50)
    ds.SharedFunctionalGroupsSequence = [
        group(PixelValueTransformationSequence=[rescale])
    ]
    want = [right(2.0 * f - 50, *w) for f, w in zip(stack, windows, strict=True)]
    assert np.array_equal(frames_of(saved(ds, stack.tobytes())), want)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [0, 1])
def test_window_functions_are_those_of_pydicom(function, signed):
    kind = np.int16 if signed else np.uint16
    low = -2048 if signed else 0
    pixels = RNG.integers(low, low + 4096, (40, 48)).astype(kind)
    ds = dataset(GREY.shape, bits=16, stored=12, PixelRepresentation=signed)
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = low + 1500, 800, function
    # pydicom scales to the range of the stored bits.
    shown = apply_windowing(pixels, ds)
    want = (shown - low) * (255 / 4095)
    content = (pixels & 0x0FFF).astype(np.uint16).tobytes()
    got = frames_of(saved(ds, content))[0]
    assert np.abs(got - want).max() <= 0.51
    with_comma = dataset(GREY.shape, bits=16, stored=12, PixelRepresentation=signed)
    with_comma.add_new("WindowCenter", "LO", f" {low + 1500},0 ")
    with_comma.add_new("WindowWidth", "LO", "800,00\0")
    with_comma.VOILUTFunction = function
    again = frames_of(saved(with_comma, content))
    assert np.array_equal(again[0], got)


def test_numbers_and_bits_of_every_kind():
    deep = RNG.integers(0, 4096, (40, 48), dtype=np.uint16)
    deep[0, 0] = 4095
    want = np.rint(deep * (255 / 4095))
    ds = dataset(GREY.shape, bits=16, stored=12)
    assert np.array_equal(frames_of(saved(ds, deep.tobytes()))[0], want)
    overlay = deep | (RNG.integers(0, 16, deep.shape, dtype=np.uint16) << 12)
    assert np.array_equal(frames_of(saved(ds, overlay.tobytes()))[0], want)
    high = dataset(GREY.shape, bits=16, stored=12, HighBit=15)
    assert np.array_equal(frames_of(saved(high, (deep << 4).tobytes()))[0], want)
    eight = dataset(GREY.shape, bits=16)
    content = GREY.astype(np.uint16).tobytes()
    assert np.array_equal(frames_of(saved(eight, content))[0], GREY)
    for shape in ("INVERSE", "IDENTITY"):
        ds = dataset(GREY.shape, PresentationLUTShape=shape)
        turned = 255 - GREY if shape == "INVERSE" else GREY
        assert np.array_equal(frames_of(saved(ds, GREY.tobytes()))[0], turned)
    falling = dataset(GREY.shape, RescaleSlope=-1, RescaleIntercept=255)
    assert np.array_equal(frames_of(saved(falling, GREY.tobytes()))[0], 255 - GREY)
    one = GREY > 99
    bits = np.packbits(one.ravel(), bitorder="little").tobytes()
    ds = dataset(GREY.shape, bits=1)
    assert np.array_equal(frames_of(saved(ds, bits))[0], one * 255)
    for name, kind in (("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")):
        ds = dataset(GREY.shape, bits=32 if kind == "f4" else 64)
        values = RNG.normal(0, 9, (2, 40, 48)).astype(kind)
        setattr(ds, name, values.tobytes())
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        low, high = values.min(), values.max()
        right = (values - low) * (255 / (high - low))
        assert np.abs(np.array(frames_of(buffer.getvalue())) - right).max() <= 0.51


def test_a_table_of_levels():
    table = RNG.permutation(1024).astype(np.uint16)
    ds = dataset(GREY.shape, bits=16, stored=10)
    ds.VOILUTSequence = [group(LUTDescriptor=[1024, 0, 16], LUTData=table.tobytes())]
    ds.VOILUTSequence[0]["LUTData"].VR = "OW"
    ds.VOILUTSequence[0]["LUTDescriptor"].VR = "US"
    pixels = RNG.integers(0, 1024, GREY.shape, dtype=np.uint16)
    got = frames_of(saved(ds, pixels.tobytes()))[0]
    assert np.array_equal(got, np.rint(table[pixels] * (255 / 1023)))
