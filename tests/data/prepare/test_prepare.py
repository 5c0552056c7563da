import csv
import fcntl
import io
import json
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from experiments.fuzz_prepare import fuzz
from tests.data.prepare.inputs import (
    contents,
    dicom,
    encoded,
    export,
    fan,
    region_item,
    run,
    screen,
)
from ultradino_jax.data.cache import INDEX, OutputError
from ultradino_jax.data.phantom.dicom import write_dicom
from ultradino_jax.data.prepare.scan import Key, scan
from ultradino_jax.data.sources import CacheSource, open_source
from ultradino_jax.prepare import lookup, main, write_hashes


def skipped_lines(cache):
    text = (cache / "skipped.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def skipped(cache, key=None, inputs=None):
    """reason -> names of the files (or their number where no key is given)."""
    lines = skipped_lines(cache)
    names = {}
    if inputs is not None:
        for file_id, path in lookup(inputs, [inputs], key):
            names[file_id] = path.removeprefix(f"{inputs}/")
    reasons = {}
    for line in lines:
        reasons.setdefault(line["reason"], []).append(names.get(line["id"], line))
    return reasons


def test_a_cache_from_an_export(tmp_path):
    cache = tmp_path / "cache"
    manifest = run(export(tmp_path / "in"), cache, short_side=64, encoding="png")
    assert manifest["records"] == 10 + 6 + 40
    assert manifest["counts"]["skipped_inputs"] == {"unsupported": 1}
    source = open_source(cache)
    assert isinstance(source, CacheSource) and len(source) == 56
    pixels = [source[i] for i in range(56)]
    assert {min(p.shape[:2]) for p in pixels} == {64}
    flat = np.concatenate([p.ravel() for p in pixels]) / 255
    assert manifest["mean"] == pytest.approx([flat.mean()], abs=1e-12)
    assert manifest["std"] == pytest.approx([flat.std()], abs=1e-9)
    # Frames of a clip share a patient; a zip's members share its folder.
    groups = [source.group_id(i) for i in range(56)]
    assert len(set(groups)) == 3
    page = (cache / "report.html").read_text()
    assert "unsupported" in page and "56" in page
    sheet = cv2.imread(str(cache / "contact_sheet.png"))
    assert sheet.shape[1] == 1280 and sheet.max() > 100
    assert not (cache / ".work").exists()


def test_region_of_tags_and_of_pixels(tmp_path):
    root, cache = tmp_path / "in", tmp_path / "cache"
    root.mkdir()
    one, two = fan(seed=1)[0], fan(seed=2)[0]
    both = np.zeros((320, 800), np.uint8)
    both[40:280, 20:340], both[40:280, 420:740] = one, two
    tags = [region_item(20, 40, 339, 279), region_item(420, 40, 739, 279)]
    data = dicom(both, SequenceOfUltrasoundRegions=tags)
    (root / "dual").write_bytes(data)
    strip = [region_item(0, 0, 700, 300, 3, 3)]
    (root / "spectrum").write_bytes(dicom(both, SequenceOfUltrasoundRegions=strip))
    manifest = run(root, cache, short_side=0, encoding="raw")
    assert manifest["records"] == 2 and list(skipped(cache)) == ["not_bmode"]
    source = CacheSource(cache)
    assert [source.record_id(i)[-4:] for i in range(2)] == ["-0-0", "-0-1"]
    for position, want in enumerate((one, two)):
        got = source[position][..., 0]
        # The crop is the fan's own box, its pixels unchanged inside the mask.
        rows, columns = np.nonzero(want.any(1))[0], np.nonzero(want.any(0))[0]
        assert abs(got.shape[0] - np.ptp(rows)) <= 8
        assert abs(got.shape[1] - np.ptp(columns)) <= 8
        match = cv2.matchTemplate(want, got, cv2.TM_CCOEFF_NORMED)
        assert match.max() > 0.97


def test_real_files_go_through(tmp_path):
    pydicom_files = Path(get_testdata_file("CT_small.dcm", download=False)).parent
    skimage_files = Path(pytest.importorskip("skimage").__file__).parent / "data"
    inputs = [pydicom_files, skimage_files]
    count = sum(1 for _ in scan(inputs))
    assert count >= 170 + 20
    open_, closed = tmp_path / "open", tmp_path / "closed"
    key = tmp_path / "key"
    for cache, region in ((open_, False), (closed, True)):
        manifest = run(inputs, cache, region=region, key=key, dedup="none")
        assert manifest["counts"]["inputs"]["read"] == count
        ids = {line["id"] for line in skipped_lines(cache)}
        for path in cache.glob("shard-*.npy"):
            ids |= {row["file"].tobytes().hex() for row in np.load(path)}
        names = dict(pair for root in inputs for pair in lookup(root, inputs, key))
        found = {names[i].partition("!")[0] for i in ids}  # one of the files is a zip
        assert len(found) == count
    # Whole frames: every picture of 32 pixels with contrast is kept, CT and MR too.
    reasons = skipped(open_)
    assert not {"no_region", "not_ultrasound", "colour", "timeout"} & set(reasons)
    # Ultrasound only: four of the five are B-mode or Doppler at its own place.
    ids = dict((p, i) for i, p in lookup(pydicom_files, inputs, key))
    kept = {r["file"].tobytes().hex() for r in np.load(next(closed.glob("*.npy")))}
    for name in ("examples_palette", "examples_ybr_color"):
        assert ids[str(pydicom_files / f"{name}.dcm")] in kept
    colour = {line["id"] for line in skipped(closed)["colour"]}
    for name in ("examples_rgb_color", "examples_jpeg2k", "ExplVR_BigEnd"):
        assert ids[str(pydicom_files / f"{name}.dcm")] in colour


def test_phantom_dicoms_go_through(tmp_path):
    write_dicom(tmp_path / "in", 2)
    cache = tmp_path / "cache"
    manifest = run(tmp_path / "in", cache, short_side=0, encoding="raw", dedup="none")
    with open(next((tmp_path / "in").rglob("truth.csv")), newline="") as file:
        truth = list(csv.DictReader(file))
    assert manifest["records"] == len(truth) == 10
    assert manifest["counts"]["skipped_inputs"] == {"unsupported": 1}  # truth.csv
    source = CacheSource(cache)
    names = {
        i: p for i, p in lookup(tmp_path, [tmp_path / "in"], tmp_path / "cache.key")
    }
    for position in range(10):
        path = names[source.record_id(position).partition("-")[0]]
        (row,) = (r for r in truth if path.endswith(r["file"]))
        height = int(row["y1"]) - int(row["y0"]) + 1
        width = int(row["x1"]) - int(row["x0"]) + 1
        got = source[position].shape
        # The fan fills most of the picture; banner and scale lie outside it.
        assert 0.6 * height < got[0] <= height + 2 and 0.6 * width < got[1] <= width + 2
    assert len({source.group_id(i) for i in range(10)}) == 2


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
    (folder / "broken").write_bytes(dicom(fan()[0], NumberOfFrames=7, **tags))
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
        "no frames.dcm": (dicom(fan()[0], NumberOfFrames=0), "bad_frame_count"),
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
    manifest = run(root, cache, workers=2, timeout=20)
    assert manifest["records"] == 2
    got = skipped(cache, tmp_path / "cache.key", root)
    found = {name: reason for reason, names in got.items() for name in names}
    assert found == {name: reason for name, reason in wanted.items() if reason}
    assert sum(map(len, got.values())) == len(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "cache.key", "in"]


def test_two_inputs_with_one_name(tmp_path):
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(encoded(fan(seed=seed)[0]))
    (tmp_path / "b" / "twin.png").write_bytes(encoded(fan(seed=0)[0]))
    inputs = [tmp_path / "a", tmp_path / "b"]
    assert run(inputs, tmp_path / "cache")["records"] == 2
    source = CacheSource(tmp_path / "cache")
    assert source.record_id(0) != source.record_id(1)
    # The twin is dropped across inputs and the line says which record it repeats.
    (line,) = skipped(tmp_path / "cache")["exact_duplicate"]
    assert line["like"] == source.record_id(0)


def test_duplicates_within_and_across(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    picture = fan(300, 400, seed=1)[0]
    (root / "a.png").write_bytes(encoded(picture))
    (root / "b.bmp").write_bytes(encoded(picture, ".bmp"))
    (root / "c.jpg").write_bytes(encoded(picture, ".jpg"))
    (root / "d.png").write_bytes(encoded(cv2.resize(picture, (200, 150))))
    still = np.stack([screen(picture, picture > 0)[0]] * 4)
    (root / "frozen.dcm").write_bytes(dicom(still, FrameTime=1000))
    counts = {}
    for dedup in ("near", "exact", "none"):
        cache = tmp_path / dedup
        counts[dedup] = run(root, cache, dedup=dedup)["records"]
    assert counts == {"near": 1, "exact": 4, "none": 8}


def test_excluded_images_never_enter(tmp_path):
    root, evaluation = tmp_path / "in", tmp_path / "eval"
    export(root)
    evaluation.mkdir()
    for seed in (2, 3):
        picture = fan(seed=seed)[0]
        extension = ".jpg" if seed == 2 else ".png"  # one is stored anew with losses
        (evaluation / f"{seed}{extension}").write_bytes(encoded(picture, extension))
    black = np.zeros((50, 60), np.uint8)  # even what prepare would skip is listed
    (evaluation / "black.png").write_bytes(encoded(black))
    (evaluation / "labels.csv").write_text("a;b\n")
    hashes = tmp_path / "eval.hashes"
    assert write_hashes(evaluation, hashes, workers=0) == 3
    manifest = run(root, tmp_path / "cache", exclude=[hashes])
    assert manifest["counts"]["dropped_frames"] == {"excluded": 2}
    key = tmp_path / "cache.key"
    names = skipped(tmp_path / "cache", key, root)["excluded"]
    assert names == ["series/2.png", "series/3.png"]
    (evaluation / "broken.png").write_bytes(encoded(fan()[0])[:99])
    with pytest.raises(ValueError, match="1 unreadable"):
        write_hashes(evaluation, hashes, workers=0)


def test_directories_that_do_not_fit(tmp_path):
    root = export(tmp_path / "in", 1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        run(root, tmp_path / "file" / "cache")
    for output, message in (
        (root / "cache", "lies inside input"),
        (root, "lies inside input"),
    ):
        with pytest.raises(ValueError, match=message):
            run(root, output, key=tmp_path / "k")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        run(root, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(ValueError, match="inside the cache"):
        run(root, tmp_path / "c", key=tmp_path / "c" / "key")
    (tmp_path / "bad.key").write_text("not hex")
    with pytest.raises(ValueError, match="not a key file"):
        run(root, tmp_path / "c", key=tmp_path / "bad.key")
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path / "none", tmp_path / "c")
    for options in ({"encoding": "gif"}, {"short_side": 7}, {"fps": 0}, {"dedup": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            run(root, tmp_path / "c", **options)
    (tmp_path / "c" / ".work").mkdir(parents=True)
    with open(tmp_path / "c" / ".work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another prepare"):
            run([root / "series"], tmp_path / "c")
    assert run([root / "series"], tmp_path / "c")["records"] == 1


def test_an_input_without_pictures_gives_an_empty_cache(tmp_path):
    (tmp_path / "in").mkdir()
    assert run(tmp_path / "in", tmp_path / "c")["records"] == 0
    (tmp_path / "in" / "x").write_text("x")
    manifest = run(tmp_path / "in", tmp_path / "d")
    assert (manifest["records"], manifest["shards"]) == (0, [])
    assert len(CacheSource(tmp_path / "d")) == 0


def test_command_line(tmp_path, capsys):
    root = export(tmp_path / "in", 2)
    arguments = ["--input", str(root), "--output", str(tmp_path / "c")]
    main([*arguments, "--workers", "0"])
    assert "48 pictures" in capsys.readouterr().out
    main([*arguments, "--lookup", str(root / "loop")])
    file_id, path = capsys.readouterr().out.split()
    key = Key.load(tmp_path / "c.key")
    assert (bytes.fromhex(file_id), path) == (
        key.file_id(0, "loop"),
        str(root / "loop"),
    )
    with pytest.raises(SystemExit, match="error: "):
        main([*arguments, "--short-side", "64"])
    hashes = str(tmp_path / "h")
    series = str(root / "series")
    main(["--input", series, "--write-hashes", hashes, "--workers", "0"])
    assert "2 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--input", str(root)])


def test_damaged_inputs_are_all_accounted_for(tmp_path):
    fates = fuzz(tmp_path, 100, seed=3, workers=2, timeout=30)
    assert sum(fates.values()) == 100
    assert fates["kept"] > 3 and fates["unreadable"] > 20
    assert "timeout" not in fates and "worker_died" not in fates


def test_index_is_what_the_files_hold():
    assert INDEX.itemsize == 12 + 4 + 1 + 12 + 12 + 32 + 272 + 2 + 2 + 2
