import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data as pictures

from tests.data.prepare.inputs import encoded, fan
from ultradino_jax.data.prepare.dedup import (
    ExcludeList,
    NearIndex,
    format_hashes,
    near_hash,
    pixel_sha256,
)


def again(picture, how):
    if how == "jpeg":
        coded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
        return cv2.imdecode(coded, 0)
    if how == "half":
        return cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    if how == "brighter":
        return cv2.convertScaleAbs(picture, alpha=1.1)
    return picture[2:, 3:]  # cut


@pytest.mark.parametrize("how", ["jpeg", "half", "brighter", "cut"])
def test_copies_are_near_and_others_are_not(how):
    originals = [fan(seed=seed)[0] for seed in range(12)]
    originals += [pictures.camera(), pictures.coins(), pictures.moon()]
    index = NearIndex()
    for picture in originals:
        assert index.find(near_hash(picture)) is None
        index.add(near_hash(picture))
    found = [index.find(near_hash(again(picture, how))) for picture in originals]
    assert found == list(range(len(originals)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 127), max_size=7, unique=True), st.integers(0, 99))
def test_every_change_of_seven_bits_is_found(flipped, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (1500, 272), dtype=np.uint8)  # grows the table once
    index = NearIndex()
    for row in rows[:50] if seed else rows:
        index.add(row)
    query = rows[17].copy()
    bits = np.unpackbits(query[:16])
    bits[flipped] ^= 1
    query[:16] = np.packbits(bits)
    assert index.find(query) == 17
    query[16:] = rows[18, 16:]  # same hash, another picture
    assert index.find(query) is None


def test_the_first_of_equals_is_named():
    index = NearIndex()
    value = near_hash(fan()[0])
    for _ in range(3):
        index.add(value)
    assert index.find(value) == 0 and len(index) == 3
    flat = near_hash(np.zeros((40, 40), np.uint8))
    index.add(flat)
    assert index.find(flat) == 3


def test_pixel_hash_sees_pixels_not_files():
    picture, _ = fan()
    for extension in (".png", ".bmp", ".tiff"):
        back = cv2.imdecode(np.frombuffer(encoded(picture, extension), np.uint8), 0)
        assert pixel_sha256(back) == pixel_sha256(picture)
    assert pixel_sha256(picture[::-1]) != pixel_sha256(picture)
    assert pixel_sha256(picture.reshape(320, 240)) != pixel_sha256(picture)
    assert pixel_sha256(picture[:, ::2]) == pixel_sha256(picture[:, ::2].copy())


def test_exclude_list(tmp_path):
    kept, left = fan(seed=1)[0], fan(seed=2)[0]
    path = tmp_path / "eval.hashes"
    path.write_text(format_hashes([(pixel_sha256(left), [near_hash(left)])]))
    listed = ExcludeList([path])
    assert listed.matches(pixel_sha256(left), [])
    assert listed.matches(pixel_sha256(kept), [near_hash(again(left, "jpeg"))])
    assert not listed.matches(pixel_sha256(kept), [near_hash(kept)])
    assert not ExcludeList([]).matches(pixel_sha256(left), [near_hash(left)])
    for text in ("", "[]", "x", path.read_text() + '{"sha256": "zz"}', '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"eval\.hashes: not a hash list"):
            ExcludeList([path])
