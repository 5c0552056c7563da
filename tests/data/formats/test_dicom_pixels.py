"""What a DICOM file's data say against what its tags say."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels.processing import apply_windowing
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


RGB_STREAM = jpeg(SMOOTH, keep_rgb=True, subsampling="4:4:4")
YBR_STREAM = jpeg(SMOOTH, subsampling="4:4:4")
HALF_STREAM = jpeg(SMOOTH, subsampling="4:2:2")
TAGS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", None)


def with_ids(stream, ids):
    """The ids of the components in the frame and scan headers changed."""
    stream = bytearray(stream)
    sof, sos = stream.index(b"\xff\xc0"), stream.index(b"\xff\xda")
    for k, name in enumerate(ids):
        stream[sof + 10 + 3 * k] = stream[sos + 5 + 2 * k] = name
    return bytes(stream)


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


def ycbcr(rgb):
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


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
    content, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = (
        encapsulate_extended(streams)
    )
    assert np.array_equal(frames_of(saved(ds, content)), right)
    assert refusal(saved(dataset((400, 48)), stack.tobytes()))[0] == "unreadable"
    odd = RNG.integers(0, 256, (3, 7, 5), dtype=np.uint8)
    assert np.array_equal(frames_of(saved(dataset((7, 5)), odd.tobytes())), odd)


def group(**tags):
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return item


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
