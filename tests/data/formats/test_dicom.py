import importlib.util
import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.pixels import pixel_array

from tests.data.prepare.inputs import dicom
from ultradino_jax.data.formats.dicom import _frames, read_dicom
from ultradino_jax.data.formats.frames import choose_frames
from ultradino_jax.data.formats.readers import kind_of, looks_like_dicom
from ultradino_jax.data.formats.unreadable import Unreadable

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 48), dtype=np.uint8)
RGB = RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)


def read(data, fps=1e6, max_frames=100, any_modality=False):
    return read_dicom(data, fps, max_frames, any_modality)


def bundled(name):
    with open(get_testdata_file(name, download=False), "rb") as file:
        return file.read()


def test_grey_inverted_and_windowed():
    assert np.array_equal(read(dicom(GREY)).frames[0], GREY)
    inverted = read(dicom(GREY, "MONOCHROME1")).frames[0]
    assert np.array_equal(inverted, 255 - GREY)
    # A window over the whole range changes nothing; PS3.3 C.11.2.1.2.1 otherwise.
    same = read(dicom(GREY, WindowCenter=128, WindowWidth=256)).frames[0]
    assert np.array_equal(same, GREY)
    deep = RNG.integers(0, 4096, (40, 48), dtype=np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100}
    got = read(
        dicom(deep, WindowCenter=["3000", "1"], WindowWidth=["2001", "2"], **tags)
    )
    want = ((2.0 * deep - 100 - 2999.5) / 2000 + 0.5) * 255
    assert np.array_equal(got.frames[0], np.clip(np.rint(want), 0, 255))
    # No window: the range of 12 bits; senseless windows count as none.
    for tags in ({}, {"WindowCenter": "nan", "WindowWidth": 5}, {"WindowWidth": 9}):
        got = read(dicom(deep, **tags)).frames[0]
        assert np.array_equal(got, np.rint(deep * (255 / 4095)))


def test_colour_is_converted_once():
    assert np.array_equal(read(dicom(RGB, "RGB")).frames[0], RGB)
    planar = np.ascontiguousarray(RGB.transpose(2, 0, 1)).reshape(RGB.shape)
    got = read(dicom(planar, "RGB", PlanarConfiguration=1)).frames[0]
    assert np.array_equal(got, RGB)
    ycrcb = cv2.cvtColor(RGB, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    got = read(dicom(ycrcb, "YBR_FULL")).frames[0]
    want = cv2.cvtColor(ycrcb[..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
    assert np.abs(got.astype(int) - want).max() <= 2
    smooth = cv2.GaussianBlur(RGB, (0, 0), 6)
    got = read(dicom(smooth, "YBR_FULL_422", jpeg=True)).frames[0]
    assert np.abs(got.astype(int) - smooth).mean() < 3


def test_palette_of_16_and_8_bits():
    table = RNG.integers(0, 256, (3, 256), dtype=np.uint8)
    names = ("Red", "Green", "Blue")
    for bits, entries in ((16, table.astype("<u2") << 8), (8, table)):
        tags = {}
        for name, row in zip(names, entries, strict=True):
            tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
            tags[f"{name}PaletteColorLookupTableData"] = row.tobytes()
        got = read(dicom(GREY, "PALETTE COLOR", **tags)).frames[0]
        assert np.array_equal(got, table.T[GREY]), bits


@pytest.mark.parametrize("name", ["MR_small", "CT_small", "image_dfl", "JPEG2000"])
def test_grey_files_keep_the_order_of_their_levels(name):
    # Whatever the window, a viewer's picture is a monotone map of the stored numbers.
    (got,) = read(bundled(f"{name}.dcm"), any_modality=True).frames
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = pydicom.dcmread(get_testdata_file(f"{name}.dcm")).pixel_array
    order = np.argsort(stored.ravel())
    assert (np.diff(got.ravel()[order].astype(int)) >= 0).all() and np.ptp(got) > 100


def test_cine_frames_are_those_of_pydicom():
    clip = read(bundled("examples_ybr_color.dcm"), fps=3)
    assert (clip.count, clip.chosen) == (30, [0, 14, 29])  # 33.333 ms: 10 frames apart
    whole = pixel_array(get_testdata_file("examples_ybr_color.dcm", download=False))
    assert np.array_equal(np.stack(clip.frames), whole[clip.chosen])


def test_frame_choice():
    assert choose_frames(1, None, 3, 32) == [0]
    assert choose_frames(100, 1000, 3, 32)[:2] == [0, 3]  # slower than asked: the cap
    assert choose_frames(100, 1000, 3, 200) == list(range(100))
    assert choose_frames(61, 100, 2, 32) == list(range(0, 61, 5))
    assert choose_frames(900, None, 3, 5) == [0, 225, 450, 674, 899]


def timed(**tags):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom(np.stack([GREY] * 21), **tags)
    return len(read(data, fps=2).chosen)


def test_frame_times():
    assert timed(FrameTime=100) == 5
    assert timed(FrameTimeVector=[0] + [100] * 20) == 5
    assert timed(CineRate=10) == 5
    assert timed(RecommendedDisplayFrameRate=10) == 5
    assert timed() == 2  # taken to be 30 frames per second
    assert timed(FrameTime=0, CineRate=10) == 5
    assert timed(FrameTime="nan", CineRate=10) == 5


def reason(data, **options):
    with pytest.raises(Unreadable) as error:
        read(data, **options)
    return error.value.reason, error.value.detail


def test_what_cannot_be_used_has_a_reason():
    assert reason(dicom(GREY, Modality="CT")) == ("not_ultrasound", "")
    assert read(dicom(GREY, Modality="CT"), any_modality=True).count == 1
    assert reason(bundled("DICOMDIR"))[0] == "no_pixels"
    assert reason(bundled("test-SR.dcm"))[0] == "no_pixels"
    assert reason(dicom(GREY, Rows=60000, Columns=60000))[0] == "too_large"
    detail = "12-bit JPEG: no permissive decoder"
    got = reason(bundled("JPEG-lossy.dcm"), any_modality=True)
    assert got == ("missing_decoder", detail)
    if importlib.util.find_spec("gdcm") is None:
        for name, wanted in (
            ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS: pip install python-gdcm"),
            ("SC_rgb_jpeg_gdcm.dcm", "JPEG lossless: pip install python-gdcm"),
        ):
            got = reason(bundled(name), any_modality=True)
            assert got == ("missing_decoder", wanted)


def test_dicom_is_known_by_its_bytes():
    data = dicom(GREY)
    assert kind_of(data[:512]) == "dicom"
    assert looks_like_dicom(data[132:])  # without preamble
    assert looks_like_dicom(bundled("ExplVR_BigEndNoMeta.dcm"))
    assert not looks_like_dicom(b"Dear colleague, " * 20)
    assert not looks_like_dicom(b"\x08")
    # Implicit little endian without any meta information, as old scanners wrote it.
    dataset = pydicom.dcmread(io.BytesIO(data))
    for implicit in (True, False):
        file = DicomBytesIO()
        file.is_implicit_VR, file.is_little_endian = implicit, True
        write_dataset(file, dataset)
        assert kind_of(file.getvalue()[:512]) == "dicom"
        assert np.array_equal(read(file.getvalue()).frames[0], GREY)


def test_patient_and_study_are_read_for_grouping():
    clip = read(dicom(GREY, PatientID="A1", StudyInstanceUID="1.2.3"))
    other = read(dicom(GREY, PatientID="A1", IssuerOfPatientID="Elsewhere"))
    assert clip.study == "1.2.3" and clip.patient != other.patient
    assert read(dicom(GREY, StudyInstanceUID="1.2.3")).patient == "1.2.3"
    assert read(dicom(GREY)).patient is None


# What pydicom's own files are refused for; all others are as pydicom reads them.
REFUSED = {
    "J2K_pixelrep_mismatch.dcm": "unsupported",  # its sign is not that of the tags
    "JPEG-lossy.dcm": "missing_decoder",
    "JPGExtended.dcm": "missing_decoder",
    "JPEG2000-embedded-sequence-delimiter.dcm": "unsupported",
    "MR_truncated.dcm": "unreadable",
    "meta_missing_tsyntax.dcm": "unreadable",
    "nested_priv_SQ.dcm": "unreadable",
}


def test_pydicom_s_own_files_are_as_pydicom_reads_them():
    root = Path(pydicom.__file__).parent / "data" / "test_files"
    equal, optional = 0, 0
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        data = path.read_bytes()
        try:
            found = read(data, any_modality=True)
        except Unreadable as error:
            if error.reason == "missing_decoder" and path.name not in REFUSED:
                optional += 1
            elif error.reason != "no_pixels":
                assert REFUSED.get(path.name) == error.reason, path.name
            continue
        except RuntimeError:  # of Pillow, which cannot read every JPEG 2000
            assert importlib.util.find_spec("openjpeg") is None, path.name
            optional += 1
            continue
        assert path.name not in REFUSED
        if path.name == "badVR.dcm":  # its number of frames is no number
            continue
        dataset = pydicom.dcmread(path, force=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = pixel_array(dataset)
        count, frame = _frames(dataset)
        colour = frame(0).ndim == 3
        want = want if want.ndim == (4 if colour else 3) else want[None]
        assert len(want) == count == found.count, path.name
        for k, pixels in enumerate(want):
            assert np.array_equal(frame(k), pixels), path.name
        equal += 1
    if importlib.util.find_spec("gdcm") and importlib.util.find_spec("openjpeg"):
        assert (equal, optional) == (87, 0)
