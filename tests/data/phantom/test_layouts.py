"""The layouts re-read with csv, Pillow, numpy and pydicom, none of them our readers."""

import csv
import hashlib
import re
import zlib

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels import apply_color_lut

from ultradino_jax import phantom as command
from ultradino_jax.data.phantom import layouts
from ultradino_jax.data.phantom.dicom import KINDS
from ultradino_jax.data.phantom.render import PLANES, render_phantom


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every layout once, small; {layout: folder}."""
    root = tmp_path_factory.mktemp("phantom")
    for layout, write in command.LAYOUTS.items():
        write(root / layout, 5 if layout == "african" else 2, seed=1, size=96)
    return {layout: root / layout for layout in command.LAYOUTS}


def digest(folder):
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


@pytest.mark.parametrize("layout", sorted(command.LAYOUTS))
def test_same_arguments_give_the_same_bytes(layout, written, tmp_path):
    patients = 5 if layout == "african" else 2
    arguments = [f"--layout={layout}", f"--patients={patients}", "--seed=1"]
    command.main([*arguments, "--size=96", f"--out={tmp_path / 'again'}"])
    assert digest(tmp_path / "again") == digest(written[layout])


def test_fetal_planes_table_and_pictures(written):
    root = written["fetal_planes"] / "FETAL_PLANES_ZENODO"
    raw = (root / "FETAL_PLANES_DB_data.csv").read_text()
    assert raw.splitlines()[0].endswith("US_Machine;Train ")  # the trailing blank
    rows = list(csv.DictReader(raw.splitlines(), delimiter=";"))
    assert len(rows) == 24 == len(list((root / "Images").iterdir()))
    names = re.compile(r"Patient(\d{5})_Plane([1-6])_([12])_of_2")
    codes = {"1": "Other", "2": "Fetal abdomen", "3": "Fetal brain"}
    codes |= {"4": "Maternal cervix", "5": "Fetal femur", "6": "Fetal thorax"}
    for index, row in enumerate(rows):
        patient, code, _ = names.fullmatch(row["Image_name"]).groups()
        assert codes[code] == row["Plane"] in PLANES
        assert int(patient) == int(row["Patient_num"]) == 1 + index // 12
        assert row["Train "] == str(int(patient) % 2)
        with Image.open(root / "Images" / f"{row['Image_name']}.png") as picture:
            assert picture.mode == "RGBA" and max(picture.size) == 96
            grey = np.asarray(picture.convert("L"))
        phantom = render_phantom(index, seed=1, size=grey.shape, images_per_patient=12)
        np.testing.assert_array_equal(grey, phantom.image)
        assert row["Brain_plane"] == phantom.brain_plane
        assert row["US_Machine"] == phantom.machine
    assert len({row["Image_name"] for row in rows}) == 24


def test_fass_pictures_and_pickled_arrays(written):
    (root,) = written["fass"].iterdir()
    pictures = sorted((root / "IMAGES").iterdir())
    stems = {path.stem for path in pictures}
    assert stems == {path.stem for path in (root / "ARRAY_FORMAT").iterdir()}
    assert all(re.fullmatch(r"P0\d+_IMG\d+", stem) for stem in stems)
    modes, differ, overlap = set(), 0, 0
    for path in pictures:
        array = np.load(root / "ARRAY_FORMAT" / f"{path.stem}.npy", allow_pickle=True)
        record = array.item()
        with Image.open(path) as picture:
            modes.add(picture.mode)
            pixels = np.asarray(picture)
        assert pixels.shape == record["image"].shape and pixels.shape[:2] == (72, 96)
        differ += (pixels != record["image"]).any()
        structures = record["structures"]
        assert list(structures) == ["artery", "liver", "stomach", "vein"]
        for mask in structures.values():
            assert mask.dtype == np.uint8 and mask.shape == (72, 96)
            assert set(np.unique(mask)) <= {0, 1}
        overlap += (structures["liver"] & structures["vein"]).any()
    assert modes == {"L", "RGB"} and 0 < differ < len(stems) and overlap > 0


def test_jnu_videos_masks_and_counts(written):
    root = written["jnu_ifm"] / "JNU-IFM" / "us_data"
    videos = sorted(path.name for path in root.iterdir())
    stamps = [re.match(r"\d{8}T\d{6}", video).group() for video in videos]
    assert len(videos) == 4 and len(set(stamps)) == 2
    assert any(not video.isascii() for video in videos)
    counts = dict.fromkeys(("image", "mask", "mask_enhance", "row"), 0)
    for video in videos:
        table = (root / video / "frame_label.csv").read_bytes()
        assert table.startswith(b"\xef\xbb\xbf")  # utf-8-sig
        rows = list(csv.DictReader(table.decode("utf-8-sig").splitlines()))
        counts["row"] += len(rows)
        for kind in ("image", "mask", "mask_enhance"):
            counts[kind] += len(list((root / video / kind).iterdir()))
        for row in rows:
            stem = f"{video}_{row['frame_id']}"
            with Image.open(root / video / "mask" / f"{stem}_mask.png") as picture:
                mask = np.asarray(picture)
            with Image.open(root / video / "image" / f"{stem}.png") as picture:
                assert picture.size == mask.shape[::-1] == (96, 76)
            assert set(np.unique(mask)) <= {0, 7, 8}
            code = {(False, False): 3, (True, False): 4}
            code |= {(False, True): 5, (True, True): 6}
            seen = bool((mask == 7).any()), bool((mask == 8).any())
            assert int(row["frame_label"]) == code[seen]
    assert counts == {"image": 24, "mask": 22, "mask_enhance": 20, "row": 22}


def parse_mha(path):
    text, _, body = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    header = dict(line.split(" = ") for line in text.decode().splitlines())
    if header["CompressedData"] == "True":
        body = zlib.decompress(body)
    assert header["ElementType"] == "MET_UCHAR"
    shape = [int(n) for n in header["DimSize"].split()][::-1]
    assert int(header["NDims"]) == len(shape)
    return header, np.frombuffer(body, np.uint8).reshape(shape)


def test_psfhs_metaimages(written):
    root = written["psfhs"] / "PSFHS"
    names = sorted(path.name for path in (root / "image_mha").iterdir())
    assert names == sorted(path.name for path in (root / "label_mha").iterdir())
    packed = set()
    for index, name in enumerate(names):
        header, image = parse_mha(root / "image_mha" / name)
        packed.add(header["CompressedData"])
        _, label = parse_mha(root / "label_mha" / name)
        assert image.shape == (3, 96, 96) and label.shape == (96, 96)
        assert (image == image[:1]).all() and set(np.unique(label)) <= {0, 1, 2}
        options = {"images_per_patient": 1, "overlays": False, "task": "jnu"}
        phantom = render_phantom(index, seed=1, size=(96, 96), **options)
        np.testing.assert_array_equal(image[0], phantom.image)
        np.testing.assert_array_equal(label == 1, phantom.masks["symphysis"] == 1)
    assert packed == {"True", "False"}


def test_african_numbers_collide_between_countries(written):
    root = written["african"] / "Zenodo_dataset"
    with open(root / "African_planes_database.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 4 and {row["Patient_num"] for row in rows} == {"1"}
    assert len({row["Center"] for row in rows}) == 5
    assert {row["Plane"] for row in rows} == set(PLANES) - {"Other", "Maternal cervix"}
    for row in rows:
        assert (root / row["Center"] / f"{row['Filename']}.png").is_file()


def test_folder_holds_grey_png_and_jpeg(written):
    paths = [path for path in written["folder"].rglob("*") if path.is_file()]
    kinds = set()
    for path in paths:
        with Image.open(path) as picture:
            assert picture.mode == "L" and picture.size == (96, 72)
            kinds.add(picture.format)
    assert len(paths) == 24 and kinds == {"PNG", "JPEG"}


def read_dicom(path):
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = (apply_color_lut(pixels, dataset) >> 8).astype(np.uint8)
    if dataset.SamplesPerPixel == 3 or dataset.PhotometricInterpretation.startswith(
        "P"
    ):
        pixels = pixels[..., 1]  # grey but for one mark
    return dataset, pixels.reshape(-1, dataset.Rows, dataset.Columns)


def test_dicom_pixels_regions_and_identity(written):
    with open(written["dicom"] / "truth.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == [*KINDS] * 2
    pictured = set()
    for row in rows:
        dataset, pixels = read_dicom(written["dicom"] / "DICOM" / row["file"])
        pictured.add(dataset.PhotometricInterpretation)
        assert "PHANTOM" in str(dataset.PatientName) and dataset.PatientID[:3] == "MRN"
        assert dataset.Modality == "US"
        assert any(element.tag.is_private for element in dataset)
        x0, y0, x1, y1 = (int(row[key]) for key in ("x0", "y0", "x1", "y1"))
        assert (
            len(pixels) == int(row["frames"]) == int(dataset.get("NumberOfFrames", 1))
        )
        assert pixels[:, :y0].max() > 150  # burned-in text above the picture
        patient, order = int(row["patient"]) - 1, [*KINDS].index(row["kind"])
        cine = len(pixels) > 1
        phantom = render_phantom(
            patient * 8 + (0 if cine else order),
            seed=1,
            size=(72, 96),
            images_per_patient=8,
            overlays=not cine,
            task="jnu" if cine else "planes",
        )
        inside = pixels[0, y0 : y1 + 1, x0 : x1 + 1].astype(int)
        error = np.abs(inside - phantom.image)
        assert error.mean() < (4 if row["kind"] == "ybr_cine" else 0.1), row["kind"]
        if where := {"inside": 1, "outside": 2}.get(KINDS[row["kind"]][1]):
            region = dataset.SequenceOfUltrasoundRegions[0]
            assert region.RegionLocationMaxX1 == where * x1
            assert (region.RegionLocationMaxX1 < dataset.Columns) == (where == 1)
            pitch = 10 * region.PhysicalDeltaX * where
            assert pitch == pytest.approx(phantom.mm_per_px)
        else:
            assert "SequenceOfUltrasoundRegions" not in dataset
        if cine:
            assert float(dataset.FrameTime) == 40
            assert (pixels.astype(int).std(0)[y0:, x0 : x1 + 1] > 0).any()
    assert pictured == {"MONOCHROME2", "RGB", "PALETTE COLOR", "YBR_FULL_422"}


def test_dicom_identifiers_are_unique(written):
    paths = [p for p in (written["dicom"] / "DICOM").rglob("*") if p.is_file()]
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    assert len({header.SOPInstanceUID for header in headers}) == len(paths) == 10
    assert len({header.StudyInstanceUID for header in headers}) == 2
    assert len({header.PatientID for header in headers}) == 2


def test_sheet_is_one_small_palette_picture(tmp_path):
    out = tmp_path / "docs" / "sheet.png"
    command.main(["--layout=sheet", f"--out={out}", "--patients=1", "--size=64"])
    with Image.open(out) as picture:
        assert picture.mode == "P" and picture.size == (6 * 64, 3 * 18 + 3 * 48)


def test_long_runs_report_rate_and_time_left(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(layouts.time, "monotonic", lambda: next(clock))
    assert list(layouts.progress("abcdef", 6, "folder")) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    # The clock moves 4 s a picture, so reports fall on 12 s and 24 s.
    assert lines[0] == "phantom folder: 2/6 images, 0.2/s, 24 s left"
    assert len(lines) == 2


def test_bad_flags_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--layout=folder", f"--out={tmp_path}", "--patients=0"])
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--patients must be >= 1, --seed >= 0 and --size >= 32")
    )
