"""NIfTI, MetaImage with its pixels beside it, and masks of every format."""

import gzip
import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.data.formats.readers import HEAD, kind_of, read_clip, read_picture
from ultradino_jax.data.formats.unreadable import Unreadable

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (3, 20, 26), dtype=np.uint8)  # [N,H,W]


def frames_of(data, path=None):
    kind = kind_of(data[:HEAD])
    return read_clip(data, kind, fps=1000, max_frames=9, path=path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_nifti_as_nibabel_writes_it(version, packed):
    nibabel = pytest.importorskip("nibabel")
    make = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image

    def written(array, **header):
        image = make(array, np.eye(4))
        for name, value in header.items():
            getattr(image.header, name)(*value)
        data = image.to_bytes()
        return gzip.compress(data) if packed else data

    assert kind_of(written(FRAMES.T)[:HEAD]) == "nifti"
    clip = frames_of(written(FRAMES.T))
    assert clip.count == 3 and np.array_equal(clip.frames, FRAMES)
    assert np.array_equal(frames_of(written(FRAMES[0].T)).frames[0], FRAMES[0])
    # Slices, then time: [x,y,z,t].
    four = np.stack([FRAMES, 255 - FRAMES]).T
    assert np.array_equal(frames_of(written(four)).frames, [*FRAMES, *(255 - FRAMES)])
    deep = FRAMES.astype(np.uint16) * 257
    deep[0, 0, 0] = 65535
    got = frames_of(written(deep.T)).frames
    assert np.array_equal(got, np.rint(deep / 257))
    colour = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb = np.zeros((26, 20, 3), colour)
    rgb["G"] = FRAMES.T
    got = frames_of(written(rgb)).frames
    assert got[1].shape == (20, 26, 3) and np.array_equal(got[1][..., 1], FRAMES[1])
    assert np.array_equal(read_picture(written(FRAMES.T))[0], FRAMES[0])
    scaled = written(FRAMES.T, set_slope_inter=(2.0, 5.0))  # numbers are 2 v + 5
    low, high = FRAMES.min(), FRAMES.max()
    want = (FRAMES.astype(float) - low) * (255 / (high - low))
    assert abs(np.array(frames_of(scaled).frames) - want).max() <= 0.5001


def test_nifti_of_senseless_size_is_refused():
    nibabel = pytest.importorskip("nibabel")
    data = bytearray(nibabel.Nifti1Image(FRAMES.T, np.eye(4)).to_bytes())
    data[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    with pytest.raises(Unreadable, match="more bytes or pixels"):
        frames_of(bytes(data))


HEADER = """ObjectType = Image
NDims = 3
DimSize = 26 20 3
ElementType = MET_UCHAR
ElementDataFile = {}
"""


def test_metaimage_with_its_pixels_beside_it(tmp_path):
    (tmp_path / "m.raw").write_bytes(FRAMES.tobytes())
    path = tmp_path / "m.mhd"
    for name, reason in (
        ("m.raw", ""),
        ("../m.raw", "another folder"),
        ("/etc/passwd", "another folder"),
        ("none.raw", "is not there"),
        ("m%03d.raw", "several files"),
        ("LIST", "several files"),
    ):
        data = HEADER.format(name).encode()
        path.write_bytes(data)
        if reason:
            with pytest.raises(Unreadable, match=reason):
                frames_of(data, path)
        else:
            assert np.array_equal(frames_of(data, path).frames, FRAMES)
            assert np.array_equal(read_picture(path)[0], FRAMES[0])
    with pytest.raises(Unreadable, match="another file of an archive"):
        frames_of(HEADER.format("m.raw").encode())


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_masks_of_every_format(tmp_path):
    labels = RNG.integers(0, 4, (20, 26), dtype=np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    buffer = io.BytesIO()
    np.save(buffer, labels.astype(np.int64))
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, labels.astype(np.float32))
    (tmp_path / "m.raw").write_bytes(labels.tobytes())
    header = HEADER.replace("= 3\n", "= 2\n", 1).replace("26 20 3", "26 20")
    (tmp_path / "m.mhd").write_text(header.format("m.raw"))
    for source in (
        png(Image.fromarray(labels)),
        png(palette),
        png(palette, transparency=0),
        png(Image.fromarray(labels.astype(np.uint16))),
        png(Image.merge("RGB", [Image.fromarray(labels)] * 3)),
        png(
            Image.merge("LA", [Image.fromarray(labels), Image.fromarray(255 - labels)])
        ),
        buffer.getvalue(),
        tiff.getvalue(),
        tmp_path / "m.mhd",
    ):
        assert np.array_equal(read_labels(source), labels)
    assert np.array_equal(read_labels(png(Image.fromarray(labels > 1))), labels > 1)
    nibabel = pytest.importorskip("nibabel")
    data = nibabel.Nifti1Image(labels.T, np.eye(4)).to_bytes()
    assert np.array_equal(read_labels(gzip.compress(data)), labels)


def written(form, **options):
    buffer = io.BytesIO()
    Image.new("L", (26, 20), 1).save(buffer, form, **options)
    return buffer.getvalue()


def test_masks_that_are_none():
    labels = np.zeros((20, 26), np.uint16)
    labels[3, 3] = 300
    half = io.BytesIO()
    tifffile.imwrite(half, np.full((20, 26), 0.5, np.float32))
    pages = io.BytesIO()
    tifffile.imwrite(pages, np.zeros((3, 20, 26), np.uint8), photometric="minisblack")
    jpeg = io.BytesIO()
    Image.fromarray(np.zeros((20, 26), np.uint8)).save(jpeg, "JPEG")
    white = io.BytesIO()
    tifffile.imwrite(white, np.ones((20, 26), np.uint8), photometric="miniswhite")
    colour = Image.new("RGB", (26, 20), (1, 2, 3))
    whole = png(Image.fromarray(RNG.integers(0, 9, (99, 99), dtype=np.uint8)))
    for data, said in (
        (png(Image.fromarray(labels)), "m: the value 300 is not between 0 and 255"),
        (half.getvalue(), "m: labels are whole numbers"),
        (pages.getvalue(), r"m: .*a mask of 3 pages"),
        (jpeg.getvalue(), "m: .*JPEG changes labels: save the mask as PNG"),
        (white.getvalue(), "m: .*a mask whose zero is white"),
        (written("TIFF", compression="jpeg"), "m: .*JPEG changes labels"),
        (written("WEBP", quality=50), "m: .*JPEG changes labels"),
        (written("JPEG2000"), "m: .*JPEG changes labels"),
        (png(colour), "m: a colour picture is no index mask"),
        (whole[: len(whole) // 2], "m: damaged"),
        (b"", "m: the file has no bytes"),
        (b"words", "m: not a picture"),
    ):
        with pytest.raises(ValueError, match=said):
            read_labels(data, "m")
