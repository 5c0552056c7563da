import hashlib
import json
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from ultradino_jax.data.phantom.source import PhantomSource
from ultradino_jax.data.sources import (
    BadImage,
    FolderSource,
    ListSource,
    open_source,
    read_image,
)


def gradient(height=40, width=50, dtype=np.uint8):
    """A smooth image that uses the whole range of its type."""
    ramp = np.linspace(0, np.iinfo(dtype).max, height * width)
    return ramp.reshape(height, width).astype(dtype)


@pytest.fixture
def colour():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA")


@pytest.mark.parametrize(
    ("extension", "mode"),
    [
        *(("png", mode) for mode in ("L", "RGB", "RGBA", "LA", "P", "1")),
        *(("jpg", mode) for mode in ("L", "RGB", "CMYK")),
        *(("tiff", mode) for mode in ("L", "RGB", "RGBA", "LA", "P", "1", "CMYK")),
        *(("bmp", mode) for mode in ("L", "RGB", "RGBA", "P", "1")),
    ],
)
def test_grey_is_pillow_s_luma(tmp_path, colour, mode, extension):
    path = tmp_path / f"image.{extension}"
    colour.convert(mode).save(path)
    with Image.open(path) as saved:
        saved.info.pop("transparency", None)
        grey, rgb = saved.convert("L"), saved.convert("RGB")
    got = read_image(path)
    assert got.shape == (40, 50, 1) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[:, :, 0], grey)
    np.testing.assert_array_equal(read_image(path, channels=3), rgb)
    if mode == "RGBA":  # alpha is ignored, not blended
        luma = np.asarray(rgb) @ [0.299, 0.587, 0.114]
        assert abs(got[:, :, 0] - luma).max() <= 1


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path, extension, channels):
    deep = gradient(dtype=np.uint16)
    path = tmp_path / f"deep.{extension}"
    Image.fromarray(deep).save(path)
    expected = np.rint(deep.astype(np.float64) * 255 / 65535)
    got = read_image(path, channels)
    assert got.shape == (40, 50, channels)
    for c in range(channels):
        np.testing.assert_array_equal(got[:, :, c], expected)


def test_images_are_read_only(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="read-only"):
        FolderSource(tmp_path)[0][0, 0] = 1


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_are_bad(tmp_path, extension, kept):
    path = tmp_path / f"cut.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BadImage) as caught:
        FolderSource(tmp_path)[0]
    assert caught.value.record == f"cut.{extension}" and caught.value.reason


def test_damaged_bytes_in_a_png_are_bad(tmp_path):
    path = tmp_path / "damaged.png"
    Image.fromarray(gradient()).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(BadImage):
        read_image(path)


def test_other_unusable_files_are_bad(tmp_path):
    Image.fromarray(gradient(15, 400)).save(tmp_path / "thin.png")
    lab = Image.merge("LAB", [Image.fromarray(gradient())] * 3)
    lab.save(tmp_path / "lab.tif")
    (tmp_path / "text.jpg").write_text("not an image")
    for name, reason in [
        ("thin.png", "400x15 pixels, a side below 16"),
        ("lab.tif", "not a picture, clip or archive this reads .colour space LAB"),
        ("text.jpg", "not a picture"),
        ("missing.png", "FileNotFoundError"),
    ]:
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name)


def test_bad_image_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage("truncated", "a/b.png")))
    assert (error.reason, error.record) == ("truncated", "a/b.png")
    assert str(error) == "a/b.png: truncated" and isinstance(error, ValueError)


@pytest.fixture
def folder(tmp_path):
    names = ["b.PNG", "a/Ä ü/片.jpg", "a/x.tiff", "c.Bmp", "z/deep/er/y.jpeg"]
    for k, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient(30 + k)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a/._x.tiff").write_text("resource fork of another system")
    (tmp_path / ".hidden").mkdir()
    Image.fromarray(gradient()).save(tmp_path / ".hidden/h.png")
    (tmp_path / "folder.png").mkdir()
    return tmp_path, sorted(names)


def test_folder_is_searched_sorted_and_recursively(folder):
    root, names = folder
    source = FolderSource(root)
    assert [source.record_id(i) for i in range(len(source))] == names
    for i, name in enumerate(names):
        np.testing.assert_array_equal(source[i], read_image(root / name))
    joined = b"".join(name.encode() + b"\0" for name in names)
    assert source.digest() == hashlib.sha256(joined).hexdigest()
    for index in (-1, len(names)):
        with pytest.raises(IndexError):
            source[index]


def test_symbolic_links_are_followed_once(folder):
    root, names = folder
    (root / "a/loop").symlink_to(root, target_is_directory=True)
    (root / "zz").symlink_to(root / "z", target_is_directory=True)
    (root / "broken.png").symlink_to(root / "nowhere.png")
    elsewhere = root.parent / f"{root.name}-elsewhere"
    elsewhere.mkdir()
    Image.fromarray(gradient()).save(elsewhere / "e.png")
    (root / "link").symlink_to(elsewhere, target_is_directory=True)
    source = FolderSource(root)
    got = [source.record_id(i) for i in range(len(source))]
    assert got == sorted([*names, "broken.png", "link/e.png"])
    with pytest.raises(BadImage):
        source[got.index("broken.png")]


def test_file_sources_survive_pickling(folder):
    root, _ = folder
    source = FolderSource(root, channels=3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.digest() == source.digest()
    np.testing.assert_array_equal(copy[1], source[1])


def test_list_source_reads_the_reference_format(folder):
    root, names = folder
    chosen = [names[3], names[0], "gone.png"]
    list_file = root / "train_paths.csv"
    list_file.write_text("\ufeff" + "\n".join(chosen) + "\n\n", encoding="utf-8")
    source = ListSource(list_file)
    assert [source.record_id(i) for i in range(3)] == chosen
    np.testing.assert_array_equal(source[0], read_image(root / names[3]))
    with pytest.raises(BadImage, match=r"gone\.png"):
        source[2]
    assert source.digest() != FolderSource(root).digest()

    moved = root.parent / f"{root.name}-list.csv"
    list_file.rename(moved)
    for opened in (
        open_source(root, list_file=moved),
        ListSource(moved, root),
    ):
        assert opened.digest() == source.digest()
        np.testing.assert_array_equal(opened[1], source[1])


@pytest.fixture
def fake_phantom(monkeypatch):
    calls = []

    def render_phantom(index, *, seed, size, settings):
        calls.append(index)
        rng = np.random.default_rng([seed, index])
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        return types.SimpleNamespace(image=pixels, label=0, patient=0)

    module = types.ModuleType("ultradino_jax.data.phantom.render")
    module.render_phantom = render_phantom
    monkeypatch.setitem(sys.modules, "ultradino_jax.data.phantom.render", module)
    return calls


def test_phantoms_are_rendered_once_per_process(fake_phantom):
    source = PhantomSource(3, size=(20, 30), seed=4, channels=3)
    first = [source[i] for i in range(3)]
    assert first[0].shape == (20, 30, 3) and len(source) == 3
    again = [source[i] for i in range(3)]
    assert fake_phantom == [0, 1, 2]
    np.testing.assert_array_equal(first, again)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2], source[2])
    assert fake_phantom == [0, 1, 2, 2]
    digests = {
        PhantomSource(*arguments).digest()
        for arguments in [(3,), (4,), (3, (20, 30)), (3, (256, 256), 1)]
    }
    assert len(digests) == 4


def test_real_phantom():
    image = PhantomSource(2, (48, 64))[1]
    assert image.shape == (48, 64, 1) and image.dtype == np.uint8 and image.std() > 5


def test_open_source_chooses(folder, monkeypatch):
    root, names = folder
    assert len(open_source(root, channels=3)) == len(names)
    assert open_source(str(root), channels=3)[0].shape[2] == 3

    fake = lambda root, channels: ("cache", root, channels)  # noqa: E731
    monkeypatch.setattr("ultradino_jax.data.sources.CacheSource", fake)
    manifest = root / "manifest.json"
    manifest.write_text(json.dumps({"format": "something else"}))
    assert isinstance(open_source(root), FolderSource)
    manifest.write_text(json.dumps({"format": "ultradino_cache"}))
    assert open_source(root) == ("cache", root, 1)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json' is cut or not JSON"):
        open_source(root)


def test_wrong_arguments_are_named(tmp_path):
    missing = tmp_path / "nowhere"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "list.csv").write_text("\n \n")
    cases = [
        (FileNotFoundError, "nowhere' does not exist", lambda: open_source(missing)),
        (FileNotFoundError, "nowhere' does not exist", lambda: FolderSource(missing)),
        (
            ValueError,
            r"no picture in folder .*empty': 0 of 1 files read; 1 .csv unsupported",
            lambda: open_source(empty),
        ),
        (
            FileNotFoundError,
            "no.csv' does not exist",
            lambda: open_source(empty, list_file="no.csv"),
        ),
        (
            ValueError,
            "list.csv' names no image",
            lambda: open_source(empty, list_file="list.csv"),
        ),
        (
            ValueError,
            "channels must be 1 or 3, got 2",
            lambda: PhantomSource(1, channels=2),
        ),
        (ValueError, "num_images=0", lambda: PhantomSource(0)),
    ]
    for kind, match, call in cases:
        with pytest.raises(kind, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
