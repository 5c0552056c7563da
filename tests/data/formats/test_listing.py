"""Which files are read, and that no other goes unsaid."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.prepare.inputs import dicom
from ultradino_jax.data.formats.listing import is_junk, list_pictures, stem
from ultradino_jax.data.sources import FolderSource, report_ignored


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24), dtype=np.uint8)
    Image.fromarray(noise).save(path, "PNG")
    return path


def test_every_file_is_a_picture_or_has_a_reason(tmp_path):
    kept = ["a.png", "b.PNG", "sub/c", "sub/d.webp", "odd.dat", "scan.mhd", "gone.png"]
    for name in kept[:5]:
        picture(tmp_path / name)
    (tmp_path / "scan.mhd").write_text("ObjectType = Image\n")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "scan.raw").write_bytes(b"1234")  # belongs to scan.mhd
    why = {
        "notes.txt": (b"words", "unsupported"),
        "more.txt": (b"words", "unsupported"),
        "README": (b"words", "unsupported"),
        "alone.raw": (b"1234", "unsupported"),
        "all.zip": (b"PK\x03\x04", "archive"),
        "clip.avi": (b"RIFF\0\0\0\0AVI ", "video"),
        ".DS_Store": (b"", "junk"),
        "._a.png": (b"\0\5\x16\7", "junk"),
        "sub/Thumbs.db": (b"", "junk"),
        "broken": (None, "not_a_file"),
        ".git": (None, "junk"),
    }
    for name, (content, _) in why.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    picture(tmp_path / ".git/e.png")
    listing = list_pictures(tmp_path)
    assert listing.names == sorted(kept)
    assert dict(listing.ignored) == {name: reason for name, (_, reason) in why.items()}
    assert str(listing) == (
        "7 of 18 files read; 4 junk, 2 .txt unsupported, 1 .raw unsupported, "
        "1 archive, 1 not a file, 1 video, 1 without suffix unsupported"
    )


def test_what_is_ignored_is_said_and_listed(tmp_path):
    said, file = [], tmp_path / "ignored.csv"
    picture(tmp_path / "in/a.png")
    report_ignored(FolderSource(tmp_path / "in"), said.append, file)
    assert not said and not file.exists()  # nothing to say
    (tmp_path / "in/new\nline, and 'quotes'.txt").write_bytes(b"x")
    report_ignored(FolderSource(tmp_path / "in"), said.append, file)
    assert said == [f"1 of 2 files read; 1 .txt unsupported; listed in {file}"]
    with file.open(newline="") as text:
        rows = list(csv.reader(text))
    assert rows == [["reason", "file"], ["unsupported", "new\nline, and 'quotes'.txt"]]


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    """As root finds it on network drives alone."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked/b.png")
    listdir = os.listdir

    def refuse(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    listing = list_pictures(tmp_path)
    assert listing.names == ["a.png"]
    assert listing.ignored == [("locked", "no_permission")]


def test_frames_beyond_the_first_are_counted(tmp_path):
    pages = [Image.fromarray(np.full((20, 24), k, np.uint8)) for k in range(4)]
    for name in ("a.tif", "b.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    (tmp_path / "c.dcm").write_bytes(dicom(np.zeros((5, 20, 24), np.uint8)))
    (tmp_path / "d.dcm").write_bytes(dicom(np.zeros((20, 24), np.uint8)))
    (tmp_path / "e.tif").write_bytes(b"broken")
    picture(tmp_path / "f.png")
    source = FolderSource(tmp_path)
    said = "6 of 6 files read; the first frame or page of 3, prepare reads 10 more"
    assert str(source.listing) == said
    lines = []
    report_ignored(source, lines.append, tmp_path / "none.csv")
    assert lines == [said] and not (tmp_path / "none.csv").exists()


def test_a_folder_without_a_picture_says_what_is_in_it(tmp_path):
    (tmp_path / "a.doc").write_bytes(b"words")
    with pytest.raises(ValueError, match="0 of 1 files read; 1 .doc unsupported"):
        FolderSource(tmp_path)


def test_names():
    assert stem("p/a.nii.gz") == "p/a" and stem("a.b.PNG") == "a.b" and stem("a") == "a"
    assert all(map(is_junk, (".x", "Thumbs.db", "__MACOSX", "Desktop.ini")))
    assert not is_junk("thumbs.png")
