import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from skimage.draw import disk

from tests.data.prepare.inputs import fan, region_item, screen
from ultradino_jax.data.formats.dicom import read_dicom
from ultradino_jax.data.prepare.burned_text import count_text_lines
from ultradino_jax.data.prepare.region import (
    Box,
    bmode_boxes,
    chroma,
    find_regions,
    has_colour_flow,
    sector_mask,
)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def paste(shape, box, mask):
    full = np.zeros(shape, bool)
    full[box.y0 : box.y1, box.x0 : box.x1] = mask
    return full


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(160, 500),
    half_angle=st.floats(0.45, 0.9),
    jpeg=st.booleans(),
)
def test_fan_is_found_and_the_screen_around_it_is_not(seed, height, half_angle, jpeg):
    picture, mask = fan(height, height * 4 // 3, half_angle, seed)
    pixels, full, interface = screen(picture, mask)
    if jpeg:
        coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
        pixels = cv2.imdecode(coded, 0)
    ((box, found),) = find_regions([pixels], [None], None)
    found = paste(pixels.shape, box, found)
    hull = cv2.convexHull(cv2.findNonZero(full.astype(np.uint8)))
    truth = cv2.fillConvexPoly(np.zeros(full.shape, np.uint8), hull, 1) > 0
    assert overlap(found, truth) > 0.9
    assert not (found & (interface > 60)).any()


# Boxes read off the pictures by eye: rows y0:y1, columns x0:x1, each within 12 pixels.
BY_EYE = {
    "examples_palette.dcm": Box(66, 333, 162, 592),
    "examples_ybr_color.dcm": Box(21, 38, 204, 300),
    "examples_jpeg2k.dcm": Box(107, 13, 337, 625),
    "examples_rgb_color.dcm": Box(54, 7, 169, 312),
}


@pytest.mark.parametrize("name", BY_EYE)
def test_real_files_against_boxes_stated_by_hand(name):
    path = get_testdata_file(name, download=False)
    with open(path, "rb") as file:
        clip = read_dicom(file.read(), 30.0, 32, False)
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in clip.frames]
    spreads = [chroma(f) for f in clip.frames]
    # Both files with region tags carry boxes of a larger screen.
    assert bmode_boxes(clip.regions, *grey[0].shape) is None
    ((box, mask),) = find_regions(grey, spreads, None)
    assert np.abs(np.subtract(box, BY_EYE[name])).max() <= 12, box
    flow = has_colour_flow(
        None if spreads[0] is None else spreads[0][box.y0 : box.y1, box.x0 : box.x1],
        mask,
    )
    assert flow == (name in ("examples_jpeg2k.dcm", "examples_rgb_color.dcm"))


def test_video_capture_with_grey_and_noisy_black():
    picture, mask = fan()
    pixels, full, interface = screen(picture, mask)
    rng = np.random.default_rng(1)
    noisy = 16 + pixels * 0.86 + rng.normal(0, 2, pixels.shape)
    ((box, found),) = find_regions([noisy.clip(0, 255).astype(np.uint8)], [None], None)
    found = paste(pixels.shape, box, found)
    assert overlap(found, full) > 0.85 and not (found & (interface > 60)).any()


def test_motion_tells_a_textured_toolbar_from_the_sector():
    frames, truth = [], None
    bar = np.random.default_rng(9).integers(30, 90, (60, 460), dtype=np.uint8)
    for seed in range(4):
        pixels, truth, _ = screen(*fan(seed=seed))
        pixels[-60:] = cv2.blur(bar, (3, 3))
        frames.append(pixels)
    nothing = [None] * 4
    ((still_box, _),) = find_regions(frames[:1], nothing[:1], None)
    ((clip_box, clip_mask),) = find_regions(frames, nothing, None)
    assert still_box.y1 > 300  # one still cannot tell: the bar is taken for tissue
    assert clip_box.y1 <= 282
    assert overlap(paste(truth.shape, clip_box, clip_mask), truth) > 0.85


def nothing_to_see():
    rng = np.random.default_rng(0)
    labels = np.zeros((300, 400), np.uint8)
    labels[disk((150, 200), 90)] = 7
    page = np.full((300, 400), 250, np.uint8)
    text = np.zeros((300, 400), np.uint8)
    for line in range(12):
        for sheet, ink in ((page, 20), (text, 255)):
            cv2.putText(sheet, "report of the day", (10, 24 * line + 20), 0, 0.6, ink)
    return {
        "black": np.zeros((300, 400), np.uint8),
        "sensor noise": rng.integers(0, 3, (300, 400), dtype=np.uint8),
        "label map": labels,
        "bright label map": labels * 36,
        "white page": page,
        "text on black": text,
        "checkerboard": (np.indices((300, 400)) // 40).sum(0).astype(np.uint8)
        % 2
        * 255,
        "few pixels": np.full((3, 5), 90, np.uint8),
    }


@pytest.mark.parametrize("what", nothing_to_see())
def test_closed_when_nothing_looks_like_ultrasound(what):
    assert sector_mask([nothing_to_see()[what].astype(np.uint8)]) is None


def test_region_tags():
    tissue = region_item(10, 20, 199, 179)
    assert bmode_boxes([tissue], 240, 320) == [Box(20, 10, 180, 200)]
    assert bmode_boxes(None, 240, 320) is None
    assert bmode_boxes([], 240, 320) is None
    # One past the end is an exclusive corner; more is another pixel grid.
    assert bmode_boxes([region_item(0, 0, 320, 240)], 240, 320) == [Box(0, 0, 240, 320)]
    assert bmode_boxes([region_item(0, 0, 400, 200)], 240, 320) is None
    assert bmode_boxes([region_item(0, 0, 2**32 - 1, 100)], 240, 320) is None
    # Spectrum and ECG only: nothing to keep.
    strips = [region_item(0, 200, 300, 230, 3, 3), region_item(0, 230, 300, 239, 4, 10)]
    assert bmode_boxes(strips, 240, 320) == []
    assert bmode_boxes([tissue, *strips], 240, 320) == [Box(20, 10, 180, 200)]
    # Colour flow drawn over tissue does not count twice; alone it does.
    flow = region_item(50, 50, 149, 149, 1, 2)
    assert bmode_boxes([flow, tissue], 240, 320) == [Box(20, 10, 180, 200)]
    assert bmode_boxes([flow], 240, 320) == [Box(50, 50, 150, 150)]
    # Two views give two boxes, one view stated twice gives one.
    right = region_item(210, 20, 309, 179)
    assert len(bmode_boxes([tissue, right], 240, 320)) == 2
    assert len(bmode_boxes([tissue, tissue], 240, 320)) == 1
    # Missing or senseless corners.
    broken = region_item(10, 20, 199, 179)
    del broken.RegionLocationMaxX1
    assert bmode_boxes([broken], 240, 320) is None
    assert bmode_boxes([region_item(199, 20, 10, 179)], 240, 320) is None


def test_text_inside_a_tagged_box_is_masked():
    pixels, _, interface = screen(*fan())
    box = Box(0, 0, *pixels.shape)  # the tag names the whole screen
    ((found, mask),) = find_regions([pixels], [None], [box])
    assert not (paste(pixels.shape, found, mask) & (interface > 60)).any()
    # Two tagged views of which one is empty: one region.
    halves = [Box(0, 0, 320, 230), Box(0, 230, 320, 460)]
    pixels[:, 230:] = 0
    assert len(find_regions([pixels], [None], halves)) == 1


def test_colour_overlay_against_tint_and_calipers():
    grey, mask = fan()
    rgb = np.repeat(grey[..., None], 3, axis=2)
    assert chroma(rgb) is None
    caliper = rgb.copy()
    cv2.ellipse(caliper, (160, 130), (60, 40), 0, 0, 360, (255, 255, 0), 1)
    assert not has_colour_flow(chroma(caliper), mask)
    flow = rgb.copy()
    flow[disk((130, 160), 18)] = (220, 40, 20)
    assert has_colour_flow(chroma(flow), mask)
    sepia = (rgb * np.array([1.0, 0.82, 0.6])).astype(np.uint8)
    assert chroma(sepia) is None
    assert not has_colour_flow(None, mask)


def test_text_lines_are_counted_and_speckle_is_not():
    clean = [fan(seed=seed)[0] for seed in range(8)]
    assert [count_text_lines(picture) for picture in clean] == [0] * 8
    for picture in clean:
        cv2.putText(picture, "HEAD 12cm", (110, 150), 0, 0.5, 255, 1, cv2.LINE_AA)
    assert sum(count_text_lines(picture) > 0 for picture in clean) >= 7
    # The scanner's own fonts, on black: the banner and settings of the bundled file.
    path = get_testdata_file("examples_palette.dcm", download=False)
    indices = pydicom.dcmread(path)
    rgb = pydicom.pixels.apply_color_lut(indices.pixel_array, indices) >> 8
    banner = cv2.cvtColor(rgb.astype(np.uint8), cv2.COLOR_RGB2GRAY)
    assert count_text_lines(banner) >= 10
