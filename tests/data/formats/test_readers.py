import io
import pickle
import tarfile
import zipfile
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data.formats import archives
from ultradino_jax.data.formats.readers import HEAD, kind_of, read_clip
from ultradino_jax.data.formats.restricted_pickle import UnsafePickle, load_npy_pickle
from ultradino_jax.data.formats.unreadable import Unreadable
from ultradino_jax.data.formats.video import read_video

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 48), dtype=np.uint8)
RGB = RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)


def read(data, **options):
    return read_clip(data, kind_of(data[:HEAD]), **options)


def pillow(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "WEBP", "PPM", "GIF"])
def test_stills_against_pillow(form):
    lossless = {"lossless": True} if form == "WEBP" else {}
    for pixels in (GREY, RGB):
        if form == "GIF" and pixels is RGB:
            continue
        data = pillow(Image.fromarray(pixels), form, **lossless)
        (got,) = read(data).frames
        if form in ("WEBP", "GIF") and pixels is GREY:  # these store colour
            got = got if got.ndim == 2 else got[..., 1]
        assert np.array_equal(got, pixels)


def test_stills_of_other_modes():
    (got,) = read(pillow(Image.fromarray(RGB).convert("RGBA"), "PNG")).frames
    assert np.array_equal(got, RGB)
    (got,) = read(pillow(Image.fromarray(GREY).convert("LA"), "PNG")).frames
    assert np.array_equal(got.reshape(40, 48, -1)[..., 0], GREY)
    palette = Image.fromarray(RGB).quantize(64)
    (got,) = read(pillow(palette, "PNG")).frames
    assert np.array_equal(got, np.asarray(palette.convert("RGB")))
    deep = GREY.astype(np.uint16) * 16
    for form in ("PNG", "TIFF"):
        (got,) = read(pillow(Image.fromarray(deep), form)).frames
        assert np.abs(got.astype(float) - GREY).max() <= 1  # its range fills 0..255
    jpeg = pillow(Image.fromarray(GREY), "JPEG", quality=95)
    with Image.open(io.BytesIO(jpeg)) as image:
        want = np.asarray(image).astype(int)
    assert np.abs(read(jpeg).frames[0] - want).max() <= 2


def test_pages_and_frames_are_clips():
    pages = [Image.fromarray(np.roll(GREY, k)) for k in range(6)]
    data = pillow(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    clip = read(data, max_frames=3)
    assert (clip.count, clip.chosen) == (6, [0])  # no times: 30 frames per second
    clip = read(data, fps=1e6, max_frames=3)
    assert clip.chosen == [0, 2, 5]
    for frame, page in zip(clip.frames, clip.chosen, strict=True):
        assert np.array_equal(frame, np.asarray(pages[page]))
    gif = pillow(pages[0], "GIF", save_all=True, append_images=pages[1:], duration=1000)
    assert read(gif, fps=1).chosen == [0, 1, 2, 3, 4, 5]


def test_arrays():
    assert np.array_equal(read(npy(GREY)).frames[0], GREY)
    assert np.array_equal(read(npy(RGB)).frames[0], RGB)
    assert read(npy(np.stack([GREY] * 5)), fps=1e6).count == 5
    assert read(npy(np.stack([RGB] * 5)), fps=1e6).frames[0].shape == RGB.shape
    gaps = np.where(GREY > 9, GREY, np.nan).astype(np.float32)
    (got,) = read(npy(gaps)).frames
    assert got.max() == 255 and (got[GREY <= 9] == 0).all()
    for bad in (
        npy(GREY)[:-1],
        npy(np.full((40, 48), np.nan)),
        npy(GREY.astype(complex)),
        npy(GREY[0]),
        npy(np.zeros((0, 40, 48), np.uint8)),
        npy(GREY).replace(b"(40, 48)", b"(4000000000, 48)"),
    ):
        with pytest.raises((Unreadable, ValueError)):
            read(bad)


def mha(array, kind, compressed=False, extra=""):
    shape = " ".join(str(n) for n in array.shape[::-1])
    body = zlib.compress(array.tobytes()) if compressed else array.tobytes()
    return (
        f"ObjectType = Image\nNDims = {array.ndim}\nDimSize = {shape}\n"
        f"ElementType = {kind}\nCompressedData = {compressed}\n{extra}"
        "ElementDataFile = LOCAL\n"
    ).encode() + body


def test_metaimage():
    stack = RNG.integers(0, 256, (3, 40, 48), dtype=np.uint8)
    for compressed in (False, True):
        clip = read(mha(stack, "MET_UCHAR", compressed), fps=1e6)
        assert np.array_equal(np.stack(clip.frames), stack)
    big = read(
        mha(stack.astype(">i2"), "MET_SHORT", extra="BinaryDataByteOrderMSB = True\n"),
        fps=1e6,
    )
    want = (stack.astype(float) - stack.min()) * 255 / np.ptp(stack)
    assert np.array_equal(np.stack(big.frames), np.rint(want))
    bomb = mha(np.zeros((1, 40, 48), np.uint8), "MET_UCHAR", True)
    for bad in (
        mha(stack, "MET_UCHAR")[:-1],
        mha(stack, "MET_STRANGE"),
        mha(stack, "MET_UCHAR").replace(b"LOCAL", b"a.raw"),
        bomb.replace(b"48 40 1", b"48 40 99999999"),
        b"ObjectType = Image\n" * 3,
    ):
        with pytest.raises(Unreadable):
            read(bad)


@pytest.mark.parametrize("codec, suffix", [("MJPG", "avi"), ("mp4v", "mp4")])
def test_video(tmp_path, codec, suffix):
    path = tmp_path / f"clïp 産科.{suffix}"
    fourcc = cv2.VideoWriter_fourcc(*codec)
    writer = cv2.VideoWriter(str(path), fourcc, 25, (64, 48))
    for level in range(0, 250, 10):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    with open(path, "rb") as file:
        assert kind_of(file.read(HEAD)) == "video"
    clip = read_video(path, 5, 32)
    assert clip.chosen == [0, 5, 10, 14, 19, 24] or clip.chosen[-1] == 24
    for position, frame in zip(clip.chosen, clip.frames, strict=True):
        assert abs(frame.mean() - 10 * position) < 6
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Unreadable):
        read_video(path, 5, 32)


def test_truncated_stills_are_refused():
    image = Image.fromarray(GREY)
    for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF"):
        data = pillow(image, form)
        assert read(data).frames[0].shape == GREY.shape
        with pytest.raises(Exception):  # noqa: B017 (Pillow has many kinds)
            read(data[: len(data) * 2 // 3])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_pickles_hold_arrays_only(tmp_path):
    masks = {"artery": GREY > 9, "liver": GREY > 99}
    fass = {"image": RGB, "structures": masks, "note": "x", "size": np.int64(3)}
    path = tmp_path / "P01_IMG1.npy"
    for protocol in range(2, 6):
        file = io.BytesIO(npy(np.array(0), allow_pickle=True))
        head = npy(np.array(fass, dtype=object), allow_pickle=True)
        head = head[: head.index(b"\n") + 1]
        body = pickle.dumps(np.array(fass, dtype=object), protocol=protocol)
        path.write_bytes(head + body)
        got = load_npy_pickle(path)
        assert np.array_equal(got["image"], RGB) and got["size"] == 3
        assert np.array_equal(got["structures"]["liver"], masks["liver"])
        assert np.array_equal(read(path.read_bytes()).frames[0], RGB)
        assert file
    for bad in (Evil(), [1, Evil()], {"image": Evil()}, np.load, pickle.Unpickler):
        data = npy(np.array(bad, dtype=object), allow_pickle=True)
        with pytest.raises(UnsafePickle):
            load_npy_pickle(data)
        with pytest.raises(Unreadable) as error:
            read(data)
        assert error.value.reason == "unsafe_pickle"
    with pytest.raises(UnsafePickle, match="damaged"):
        load_npy_pickle(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="plain"):
        load_npy_pickle(npy(GREY))


def members(path, start=0, stop=99):
    with open(path, "rb") as file:
        kind = kind_of(file.read(HEAD))
    got = archives.read_members(str(path), kind, start, stop, lambda _: None)
    return {name: c if isinstance(c, bytes) else c.reason for _, name, c in got}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_tar_members(tmp_path, mode):
    path = tmp_path / "any.name"
    with tarfile.open(path, mode) as file:
        for name, data in (("a/1", b"one"), ("../out", b"two"), ("/root", b"three")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.DIRTYPE, "folder")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    unsafe = "unsafe_member"
    want = {"a/1": b"one", "../out": unsafe, "/root": unsafe, "link": unsafe}
    assert members(path) == want
    assert members(path, 1, 2) == {"../out": unsafe}
    with open(path, "rb") as file:
        kind = kind_of(file.read(HEAD))
    assert archives.count_members(str(path), kind, lambda _: None) == (4, False)
    assert list(archives.member_names(str(path), kind)) == list(want)
    data = bytearray(path.read_bytes())
    if mode == "w":
        data[1024] ^= 255  # the second header's name
        path.write_bytes(data)
        assert archives.count_members(str(path), kind, lambda _: None) == (1, True)
    else:
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(Unreadable):
            count, damaged = archives.count_members(str(path), kind, lambda _: None)
            assert damaged and count < 4
            raise Unreadable("unreadable")


def test_zip_members(tmp_path):
    path = tmp_path / "any.name"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1", b"one" * 100)
        file.writestr("../out", b"two")
        file.writestr("C:/out", b"two")
        file.mkdir("folder")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    unsafe = "unsafe_member"
    want = {"a/1": b"one" * 100, "../out": unsafe, "C:/out": unsafe, "link": unsafe}
    assert members(path) == want
    assert archives.count_members(str(path), "zip", lambda _: None) == (4, False)
    data = bytearray(path.read_bytes())
    data[40] ^= 255  # inside the first member's compressed bytes
    path.write_bytes(data)
    assert members(path)["a/1"] == "unreadable"
    data[6] |= 1  # encrypted, says the local header; and the directory
    path.write_bytes(
        data.replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
        )
    )
    assert members(path)["a/1"] == "encrypted"
    path.write_bytes(data[:60])
    with pytest.raises(Unreadable):
        archives.count_members(str(path), "zip", lambda _: None)


def test_kinds_come_from_bytes_alone():
    assert kind_of(b"") == kind_of(b"\0" * 512) == kind_of(b"name;age\n" * 60) == ""
    assert kind_of(b"P5 is a good name for a text") == ""
    assert kind_of(b"BM is the start of a text too") == ""
    with pytest.raises(Unreadable):
        read_clip(b"anything", "")
