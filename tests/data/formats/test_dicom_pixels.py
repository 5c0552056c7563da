"""What a DICOM file's data say against what its tags say."""

import io
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import generate_uid

from tests.data.formats.files import (
    DEFLATED,
    GREY,
    J2K,
    JPEG,
    RLE,
    RNG,
    SMOOTH,
    SYNTAXES,
    dataset,
    frames_of,
    j2k,
    jpeg,
    marked,
    refusal,
    saved,
    with_ids,
    ycbcr,
)

RGB_STREAM = jpeg(SMOOTH, keep_rgb=True, subsampling="4:4:4")
YBR_STREAM = jpeg(SMOOTH, subsampling="4:4:4")
HALF_STREAM = jpeg(SMOOTH, subsampling="4:2:2")
TAGS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", None)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    ("stream", "read_by_all"),
    [
        (marked(RGB_STREAM, jfif=False, adobe=0), True),
        (marked(YBR_STREAM, jfif=False, adobe=1), True),
        (marked(YBR_STREAM, jfif=True, adobe=None), True),
        (marked(YBR_STREAM, jfif=True, adobe=1), True),
        (with_ids(marked(RGB_STREAM, jfif=False, adobe=None), b"RGB"), True),
        (marked(HALF_STREAM, jfif=False, adobe=None), True),
        (marked(RGB_STREAM, jfif=True, adobe=0), False),
        (with_ids(marked(RGB_STREAM, jfif=False, adobe=None), b"\1\2\3"), "RGB"),
        (marked(YBR_STREAM, jfif=False, adobe=None), "YBR"),
    ],
    ids=["adobe0", "adobe1", "jfif", "both", "ids", "4:2:2", "contradiction",
         "silent rgb", "silent ybr"],
)  # fmt: skip
def test_the_jpeg_says_its_colours(stream, read_by_all, tag):
    ds = dataset(SMOOTH.shape, tag or "RGB", syntax=JPEG)
    if tag is None:
        del ds.PhotometricInterpretation
    data = saved(ds, encapsulate([stream]))
    silent = isinstance(read_by_all, str)
    if read_by_all is False or (silent and tag in (None, "YBR_RCT")):
        assert refusal(data)[0] == "unsupported"
        return
    if silent and not tag.startswith(read_by_all):
        return  # nobody can know: the tag is all there is, and it is wrong
    off = np.abs(frames_of(data)[0].astype(int) - SMOOTH)
    assert off.mean() < 2, off.mean()


def test_uncompressed_colours():
    full = ycbcr(SMOOTH)
    half = np.empty((*full.shape[:1], full.shape[1] // 2, 4), np.uint8)
    half[..., 0], half[..., 1] = full[:, 0::2, 0], full[:, 1::2, 0]
    half[..., 2:] = full[:, 0::2, 1:]
    planes = SMOOTH.transpose(2, 0, 1)
    for colour, content, tags in (
        ("RGB", SMOOTH, {}),
        ("RGB", SMOOTH, {"PlanarConfiguration": None}),
        ("RGB", planes, {"PlanarConfiguration": 1}),
        ("YBR_FULL", full, {}),
        ("YBR_FULL", full.transpose(2, 0, 1), {"PlanarConfiguration": 1}),
        ("YBR_FULL_422", half, {}),
        ("YBR_FULL_422", full, {}),
    ):
        for count in (1, 2, 3):
            ds = dataset(SMOOTH.shape, colour, NumberOfFrames=count, **tags)
            frames = frames_of(saved(ds, content.tobytes() * count))
            assert len(frames) == count
            for frame in frames:
                assert np.abs(frame.astype(int) - SMOOTH).max() <= 3, (colour, tags)


def test_colours_that_do_not_fit_are_refused():
    flat = SMOOTH.tobytes()
    for colour, shape in (
        ("MONOCHROME2", SMOOTH.shape), ("YBR_PARTIAL_420", SMOOTH.shape),
        ("YBR_RCT", SMOOTH.shape), ("HSV", SMOOTH.shape), ("RGB", SMOOTH.shape[:2]),
    ):  # fmt: skip
        assert refusal(saved(dataset(shape, colour), flat))[0] == "unsupported"
    ds = dataset(SMOOTH.shape, "YBR_FULL_422", NumberOfFrames=5)
    assert "neither 4:2:2" in refusal(saved(ds, flat * 2))[1]
    ds = dataset(GREY.shape, "MONOCHROME2", syntax=JPEG)
    assert refusal(saved(ds, encapsulate([YBR_STREAM])))[0] == "unsupported"
    ds = dataset((*GREY.shape, 3), "RGB", syntax=JPEG)
    assert refusal(saved(ds, encapsulate([jpeg(GREY)])))[0] == "unsupported"


@pytest.mark.parametrize("mct", [True, False])
@pytest.mark.parametrize("tag", ["RGB", "YBR_RCT", "YBR_ICT", "YBR_FULL"])
def test_jpeg_2000_says_whether_it_is_transformed(tag, mct):
    buffer = io.BytesIO()
    image = Image.fromarray(SMOOTH if tag != "YBR_FULL" else ycbcr(SMOOTH))
    image.save(buffer, "JPEG2000", irreversible=False, no_jp2=True, mct=int(mct))
    data = saved(
        dataset(SMOOTH.shape, tag, syntax=J2K), encapsulate([buffer.getvalue()])
    )
    if (mct and tag == "YBR_FULL") or (not mct and tag in ("YBR_RCT", "YBR_ICT")):
        assert refusal(data)[0] == "unsupported"
    else:
        assert np.abs(frames_of(data)[0].astype(int) - SMOOTH).max() <= 3


def test_as_many_frames_as_there_are():
    stack = RNG.integers(0, 256, (3, 40, 48), dtype=np.uint8)
    for declared in (None, 0, 1, 2, 3, 9):
        ds = dataset(GREY.shape)
        if declared is not None:
            ds.NumberOfFrames = declared
        assert np.array_equal(frames_of(saved(ds, stack.tobytes())), stack)
    streams = [jpeg(f) for f in stack]
    right = [np.asarray(Image.open(io.BytesIO(s))) for s in streams]
    for declared in (0, 1, 3, 9):
        for fragments, table in ((1, True), (1, False), (2, True), (3, False)):
            ds = dataset(GREY.shape, syntax=JPEG, NumberOfFrames=declared)
            content = encapsulate(streams, fragments_per_frame=fragments, has_bot=table)
            if table:  # that lies
                content = content[:8] + b"\x05\0\0\0" * 3 + content[20:]
            assert np.array_equal(frames_of(saved(ds, content)), right)
    ds = dataset(GREY.shape, syntax=JPEG, NumberOfFrames=3)
    one = encapsulate([b"".join(streams)], has_bot=False)  # all in one fragment
    assert np.array_equal(frames_of(saved(ds, one)), right)
    content, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = (
        encapsulate_extended(streams)
    )
    assert np.array_equal(frames_of(saved(ds, content)), right)
    assert refusal(saved(dataset((400, 48)), stack.tobytes()))[0] == "unreadable"
    odd = RNG.integers(0, 256, (3, 7, 5), dtype=np.uint8)
    assert np.array_equal(frames_of(saved(dataset((7, 5)), odd.tobytes())), odd)


def test_a_deflated_bomb_is_refused():
    ds = dataset(GREY.shape, syntax=DEFLATED)
    data = saved(ds, GREY.tobytes())
    assert np.array_equal(frames_of(data)[0], GREY)
    head = data[: 144 + int.from_bytes(data[140:144], "little")]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(packer.compress(b"\0" * 2**20) for _ in range(300)) + packer.flush()
    assert len(body) < 2**20
    assert refusal(head + body) == ("too_large", "")


@st.composite
def written(draw):
    """(file, right frames [n,H,W(,3)] as uint8 levels, mean levels it may be off)."""
    syntax = draw(st.sampled_from(SYNTAXES))
    height, width = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    count = draw(st.integers(1, 3))
    colour = draw(st.booleans())
    bits = (
        8 if colour or syntax in (JPEG, J2K) else draw(st.sampled_from([8, 10, 12, 16]))
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (count, height, width, 3) if colour else (count, height, width)
    kind = np.uint8 if bits == 8 else np.uint16
    pixels = rng.integers(0, 2**bits, shape).astype(kind)
    if syntax == JPEG:  # noise is what it is bad at
        pixels[:] = pixels[:, :1, :1]
    pixels[0, 0, 0] = 2**bits - 1 if syntax != JPEG else pixels[0, 0, 0]
    largest = int(pixels.max())
    fits = min(b for b in (8, 10, 12, 14, 16) if largest < 2**b)
    right = np.rint(pixels * (255 / (2**fits - 1)))
    names = {"big": "1.2.840.10008.1.2.2", "implicit": "1.2.840.10008.1.2"}
    ds = dataset(shape[1:], "RGB" if colour else "MONOCHROME2",
                 8 if bits == 8 else 16, bits, names.get(syntax, syntax))  # fmt: skip
    ds.NumberOfFrames = draw(st.sampled_from([count, count, count + 1, 1]))
    if draw(st.booleans()) and not colour:
        ds.PhotometricInterpretation = "MONOCHROME1"
        right = 255 - right
    if syntax == JPEG:
        content = encapsulate(
            [jpeg(f) for f in pixels],
            fragments_per_frame=draw(st.integers(1, 2)),
            has_bot=draw(st.booleans()),
        )
        return saved(ds, content), right, 2
    if syntax == J2K:
        if colour:
            ds.PhotometricInterpretation = draw(st.sampled_from(["RGB", "YBR_RCT"]))
        mct = int(ds.PhotometricInterpretation == "YBR_RCT")
        return saved(ds, encapsulate([j2k(f, mct=mct) for f in pixels])), right, 0
    if syntax == RLE:
        plain = dataset(shape[1:], ds.PhotometricInterpretation, ds.BitsAllocated, bits)
        plain.NumberOfFrames = count
        plain.PixelData = pixels.tobytes()
        plain["PixelData"].VR = "OW"
        plain.SOPInstanceUID, plain.SOPClassUID = generate_uid(), "1.2"
        plain.compress(syntax, encoding_plugin="pydicom", generate_instance_uid=False)
        plain.NumberOfFrames = ds.NumberOfFrames
        buffer = io.BytesIO()
        plain.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue(), right, 0
    if colour and draw(st.booleans()):
        ds.PlanarConfiguration = 1
        pixels = np.moveaxis(pixels, -1, 1)
    order = ">" if syntax == "big" else "<"
    content = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if syntax == "big":
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    return saved(ds, content), right, 0


@settings(max_examples=200, deadline=None)
@given(written())
def test_what_is_written_is_read(case):
    data, right, tolerance = case
    got = frames_of(data)
    assert len(got) == len(right)
    for frame, want in zip(got, right, strict=True):
        assert frame.shape == want.shape
        assert np.abs(frame.astype(int) - want).mean() <= tolerance
