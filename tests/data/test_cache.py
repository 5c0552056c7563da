import hashlib
import json
import pickle

import grain
import numpy as np
import pytest

from tests.data.prepare.inputs import fan
from ultradino_jax.data.cache import (
    FORMAT,
    INDEX,
    VERSION,
    OutputError,
    decode,
    encode,
    write_shard,
)
from ultradino_jax.data.sources import BadImage, CacheSource, open_source

PICTURES = [fan(40 + k, 56, seed=k)[0] for k in range(7)]


def write(root, encoding="png"):
    root.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, part in enumerate((PICTURES[:4], PICTURES[4:])):
        index = np.zeros(len(part), INDEX)
        index["frame"] = range(len(part))
        index["file"][:, 0] = number
        payloads = [encode(p, encoding) for p in part]
        shards.append(write_shard(root / f"shard-{number:05d}", payloads, index))
    manifest = {"format": FORMAT, "version": VERSION, "shards": shards}
    manifest |= {"mean": [0.5], "std": [0.25]}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.parametrize("encoding", ["png", "raw", "jpeg"])
def test_round_trip(tmp_path, encoding):
    source = open_source(write(tmp_path, encoding))
    assert isinstance(source, CacheSource) and len(source) == 7
    for got, want in zip((source[i] for i in range(7)), PICTURES, strict=True):
        assert got.dtype == np.uint8 and got.shape == (*want.shape, 1)
        error = np.abs(got[..., 0].astype(int) - want)
        assert error.mean() < 3 if encoding == "jpeg" else error.max() == 0
    three = CacheSource(tmp_path, channels=3)[5]
    assert three.shape[2] == 3 and (three == three[..., :1]).all()
    assert source.record_id(4) == "01" + "0" * 22 + "-0-0"
    assert len({source.record_id(i) for i in range(7)}) == 7
    text = (tmp_path / "manifest.json").read_bytes()
    assert source.digest() == hashlib.sha256(text).hexdigest()
    for position in (-1, 7):
        with pytest.raises(IndexError):
            source[position]


def test_bytes_depend_on_the_content_alone(tmp_path):
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def total(source):
    return int(sum(source[i].astype(int).sum() for i in range(len(source))))


def test_pickles_while_its_files_are_open(tmp_path):
    source = CacheSource(write(tmp_path))
    want = total(source)  # readers are open now
    assert total(pickle.loads(pickle.dumps(source))) == want


def test_reads_through_grain(tmp_path):
    source = CacheSource(write(tmp_path))
    dataset = grain.MapDataset.source(source).seed(1).shuffle()
    means = sorted(float(p.mean()) for p in dataset.to_iter_dataset())
    assert np.allclose(means, sorted(float(p.mean()) for p in PICTURES))


def test_damage_is_a_bad_image_and_its_neighbours_survive(tmp_path):
    write(tmp_path)
    path = tmp_path / "shard-00001.array_record"
    data = bytearray(path.read_bytes())
    place = data.find(encode(PICTURES[5], "png")[20:40])
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)
    source = CacheSource(tmp_path)
    with pytest.raises(BadImage, match="shard-00001.*record 1"):
        source[5]
    assert np.array_equal(source[4][..., 0], PICTURES[4])
    assert np.array_equal(source[6][..., 0], PICTURES[6])
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="shard-00001"):
        CacheSource(tmp_path)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(BadImage):
        CacheSource(tmp_path)[4]


def test_an_unfinished_or_foreign_folder_is_refused(tmp_path):
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version"):
        CacheSource(tmp_path)
    manifest.unlink()
    with pytest.raises(ValueError, match="run prepare again"):
        CacheSource(tmp_path)
    with pytest.raises(ValueError, match="channels"):
        CacheSource(tmp_path, channels=2)


def test_damaged_records_do_not_decode():
    for encoding in ("png", "jpeg", "raw"):
        with pytest.raises(ValueError):
            decode(encode(PICTURES[0], encoding)[: 30 if encoding == "raw" else 4])
    with pytest.raises(ValueError):
        decode(b"")


def test_no_room_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_shard(tmp_path / "none" / "shard-00000", [b"x"], np.zeros(1, INDEX))
