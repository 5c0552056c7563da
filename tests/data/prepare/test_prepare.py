"""What prepare keeps of an export, and what it leaves out."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from tests.data.prepare.inputs import (
    dicom,
    encoded,
    export,
    fan,
    region_item,
    run,
    screen,
    skipped,
    still,
)
from ultradino_jax.data.cache import INDEX
from ultradino_jax.data.formats.walk import walk
from ultradino_jax.data.phantom.dicom import write_dicom
from ultradino_jax.data.sources import CacheSource, open_source
from ultradino_jax.jsonl import read_rows
from ultradino_jax.prepare import lookup, write_hashes


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
    count = sum(1 for _ in walk(inputs))
    assert count >= 170 + 20
    open_, closed = tmp_path / "open", tmp_path / "closed"
    key = tmp_path / "key"
    for cache, region in ((open_, False), (closed, True)):
        manifest = run(inputs, cache, region=region, key=key, dedup="none")
        assert manifest["counts"]["inputs"]["read"] == count
        ids = {line["id"] for line in read_rows(cache / "skipped.jsonl")}
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
    write_dicom(tmp_path / "in", 2, size=256)
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
        picture = still(seed)
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


def test_index_is_what_the_files_hold():
    assert INDEX.itemsize == 12 + 4 + 1 + 12 + 12 + 32 + 272 + 2 + 2 + 2
