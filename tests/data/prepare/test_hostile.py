"""Inputs that are damaged, hostile or private."""

import io
import os
import tarfile
import warnings
import zipfile

import numpy as np

from tests.data.prepare.fuzz import fuzz
from tests.data.prepare.inputs import (
    contents,
    dicom,
    encoded,
    fan,
    run,
    screen,
    skipped,
)
from ultradino_jax.data.sources import CacheSource
from ultradino_jax.prepare import lookup

PLANTED = ("Zebedee", "Quill", "19711223", "23.12.1971", "1.2.826.0.77", "Ward-Nine")


def test_nothing_of_the_input_is_in_the_output(tmp_path):
    root, cache = tmp_path / "Ward-Nine", tmp_path / "cache"
    (root / "Quill^Zebedee 23.12.1971").mkdir(parents=True)
    folder = root / "Quill^Zebedee 23.12.1971"
    tags = {
        "PatientName": "Quill^Zebedee",
        "PatientID": "Ward-Nine 4711",
        "PatientBirthDate": "19711223",
        "StudyInstanceUID": "1.2.826.0.77.1",
        "SeriesInstanceUID": "1.2.826.0.77.2",
        "ImageComments": "Zebedee, seen 23.12.1971",
    }
    (folder / "Zebedee.dcm").write_bytes(dicom(screen(*fan())[0], **tags))
    (folder / "broken").write_bytes(dicom(fan()[0], Rows=999, **tags))
    (folder / "Zebedee copy.dcm").write_bytes(dicom(screen(*fan())[0], **tags))
    (folder / "Quill.txt").write_text("Zebedee Quill, 23.12.1971")
    with tarfile.open(folder / "Zebedee.tar", "w") as archive:
        for name in ("Quill.png", "../Zebedee.png"):
            data = encoded(fan(seed=3)[0]) if name[0] == "Q" else b"x"
            info = tarfile.TarInfo(name)
            info.size, info.uname = len(data), "Zebedee"
            archive.addfile(info, io.BytesIO(data))
    key = tmp_path / "keys" / "key"
    key.parent.mkdir()
    manifest = run(root, cache, encoding="raw", key=key)
    assert manifest["records"] == 2
    reasons = {"unreadable", "unsupported", "unsafe_member", "exact_duplicate"}
    assert set(skipped(cache)) == reasons
    for name, data in contents(cache).items():
        for text in (*PLANTED, str(tmp_path), "4711"):
            assert text.encode() not in data, (name, text)
            assert text.encode("utf-16-le") not in data, (name, text)
    # Ids follow the key: another key, other ids; and the key is the owner's alone.
    assert oct(key.stat().st_mode)[-3:] == "600"
    other = tmp_path / "other"
    run(root, other, encoding="raw", key=tmp_path / "key2")
    ids = [{CacheSource(c).record_id(i) for i in range(2)} for c in (cache, other)]
    assert not ids[0] & ids[1]
    # Who holds the key finds the file.
    names = {path: file_id for file_id, path in lookup(root, [root], key)}
    assert (
        CacheSource(cache)
        .record_id(0)
        .startswith(names[str(folder / "Zebedee copy.dcm")])
    )
    assert f"{folder / 'Zebedee.tar'}!Quill.png" in names


class Bomb:
    def __reduce__(self):
        return (os._exit, (77,))


def bad_inputs(root):
    """Writes one of everything hostile; returns name -> reason."""
    good = encoded(fan(seed=5)[0])
    pickled = io.BytesIO()
    np.save(pickled, np.array({"image": Bomb()}), allow_pickle=True)
    sound = dicom(fan(seed=6)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nan = dicom(
            screen(*fan(seed=7))[0],
            FrameTime="nan",
            WindowCenter="nan",
            WindowWidth="inf",
            RescaleSlope="nan",
        )
    files = {
        "corrupt.png": (good[:60] + b"rubbish" * 9 + good[200:], "unreadable"),
        "empty": (b"", "empty"),
        "no frames.dcm": (dicom(fan()[0], NumberOfFrames=0), ""),  # but there is one
        "small.dcm": (dicom(fan()[0], Rows=999), "unreadable"),
        "pickle.npy": (pickled.getvalue(), "unsafe_pickle"),
        "truncated.dcm": (sound[: len(sound) // 2], "unreadable"),
        "truncated.jpg": (encoded(fan()[0], ".jpg")[:3000], "unreadable"),
        "é 産科.png": (good[:200], "unreadable"),
        os.fsdecode(b"\xff\xfe.png"): (good[:300], "unreadable"),
        "it is a png.dcm": (good, ""),
        "it is a dicom.png": (nan, ""),
    }
    for name, (data, _) in files.items():
        (root / name).write_bytes(data)
    (root / "loop").mkdir()
    (root / "loop" / "again").symlink_to(root)
    (root / "nowhere").symlink_to(root / "missing")
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe")
    with zipfile.ZipFile(root / "z.zip", "w") as archive:
        archive.writestr("../../escape.png", good)
    wanted = {name: reason for name, (_, reason) in files.items()}
    links = dict.fromkeys(("loop/again", "nowhere", "self", "pipe"), "not_a_file")
    return wanted | links | {"z.zip!../../escape.png": "unsafe_member"}


def test_every_bad_input_gets_one_line_and_the_rest_goes_on(tmp_path):
    root, cache = tmp_path / "in", tmp_path / "cache"
    root.mkdir()
    wanted = bad_inputs(root)
    manifest = run(root, cache, workers=1, timeout=20)
    assert manifest["records"] == 3
    got = skipped(cache, tmp_path / "cache.key", root)
    found = {name: reason for reason, names in got.items() for name in names}
    assert found == {name: reason for name, reason in wanted.items() if reason}
    assert sum(map(len, got.values())) == len(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "cache.key", "in"]


def test_damaged_inputs_are_all_accounted_for(tmp_path):
    fates = fuzz(tmp_path, 100, seed=3, workers=1, timeout=30)
    assert sum(fates.values()) == 100
    assert fates["kept"] > 3 and fates["unreadable"] > 20
    assert "timeout" not in fates and "worker_died" not in fates
