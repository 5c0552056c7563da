import dataclasses
import functools
import json

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

import ultradino_jax.embed as embedding
from tests.exports.tiny import backbone
from ultradino_jax.cli import command
from ultradino_jax.embed import embed, main
from ultradino_jax.weights.backbone import save_backbone

RNG = np.random.default_rng(0)
IMAGES = {f"{d}/{i}.png": RNG.integers(0, 256, (64, 64), np.uint8)
          for d in "ab" for i in range(5)}  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    """(checkpoint, folder of ten images and a broken one) and parts of three."""
    monkeypatch.setattr(embedding, "PART", 3)
    save_backbone(tmp_path / "model", backbone())
    folder = tmp_path / "images"
    for name, image in IMAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), image)
    (folder / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "model", folder


@functools.cache
def expected():
    """The model applied to the images by hand, in file order."""
    ours = backbone()
    images = np.stack(list(IMAGES.values()))[..., None]
    x = (images.astype(np.float32) / 255 - 0.25) / 0.125
    return ours.model.apply({"params": ours.params}, jnp.asarray(x))


def test_npz_holds_every_token_of_every_readable_image(job, tmp_path):
    checkpoint, folder = job
    out = tmp_path / "features.npz"
    tokens = ("cls", "mean", "patch")
    counts = embed(checkpoint, folder, out, tokens=tokens, batch_size=4)
    assert counts == {"images": 10, "failed": 1}
    g, wanted = np.load(out), expected()
    assert g["ids"].tolist() == list(IMAGES)
    assert g["failed"].tolist() == ["a/broken.png"] and len(g["failed_reason"][0]) > 5
    assert g["patch"].shape == (10, 16, 64) and g["patch"].dtype == np.float32
    np.testing.assert_allclose(g["cls"], wanted.cls_token, atol=1e-5)
    np.testing.assert_allclose(g["patch"], wanted.patch_tokens, atol=1e-5)
    np.testing.assert_allclose(g["mean"], g["patch"].mean(axis=1), atol=1e-5)
    assert not (tmp_path / "features.npz.parts").exists()


def test_parquet_holds_the_same(job, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    checkpoint, folder = job
    out = tmp_path / "features.parquet"
    embed(checkpoint, folder, out, tokens=("cls", "patch"), batch_size=4)
    table, wanted = parquet.read_table(out), expected()
    assert table["id"].to_pylist() == list(IMAGES)
    shapes = json.loads(table.schema.metadata[b"shapes"])
    assert shapes == {"cls": [64], "patch": [16, 64]}
    assert json.loads(table.schema.metadata[b"failed"])[0][0] == "a/broken.png"
    cls = np.array(table["cls"].to_pylist(), np.float32)
    patch = np.array(table["patch"].to_pylist(), np.float32).reshape(10, 16, 64)
    np.testing.assert_allclose(cls, wanted.cls_token, atol=1e-5)
    np.testing.assert_allclose(patch, wanted.patch_tokens, atol=1e-5)


def test_an_interrupted_run_goes_on_and_gives_the_same_file(job, tmp_path, monkeypatch):
    checkpoint, folder = job
    embed(checkpoint, folder, tmp_path / "whole.npz", batch_size=4)
    out, done = tmp_path / "features.npz", []
    write = embedding._write_part

    def stop_after_two(path, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path)
        write(path, *arguments)

    monkeypatch.setattr(embedding, "_write_part", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        embed(checkpoint, folder, out, batch_size=4)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"parts with other settings \(tokens: "):
        embed(checkpoint, folder, out, tokens=("cls",), batch_size=4)
    later = []
    monkeypatch.setattr(
        embedding, "_write_part", lambda p, *a: (later.append(p), write(p, *a))
    )
    embed(checkpoint, folder, out, batch_size=4)
    assert len(later) == 2 and not set(later) & set(done)
    a, b = np.load(out), np.load(tmp_path / "whole.npz")
    assert a.files == b.files
    for name in a.files:
        np.testing.assert_array_equal(a[name], b[name])


def test_command_line_and_bad_input(job, tmp_path, capsys):
    checkpoint, folder = map(str, job)
    out = str(tmp_path / "features.npz")
    flags = ["--checkpoint", checkpoint, "--input", folder, "--batch-size", "4"]
    command(main, [*flags, "--out", out, "--tokens", "mean"])
    printed = capsys.readouterr().out
    assert "features of 10 images" in printed and "1 could not be read" in printed
    other = str(tmp_path / "other.npz")
    for change, message in [
        (["--out", out], "exists; delete it"),
        (["--out", str(tmp_path / "x.csv")], r"must end in \.npz or \.parquet"),
        (["--out", str(tmp_path / "no" / "x.npz")], "folder .*no' does not exist"),
        (["--out", other, "--tokens", "cls,registers"], "one or more of cls, mean"),
        (["--out", other, "--input", "nowhere"], "image folder 'nowhere' does not"),
        (["--out", other, "--checkpoint", "nowhere"], "checkpoint 'nowhere' does not"),
        (["--out", other, "--image-size", "50"], "50 is not a multiple"),
        (["--out", other, "--batch-size", "0"], "it must be 1 or more"),
    ]:
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            command(main, [*flags, *change])


def test_not_finite_features_are_refused(tmp_path, job):
    _, folder = job
    params = backbone().params
    norm = {**params["norm"], "scale": params["norm"]["scale"].at[3].set(np.nan)}
    damaged = dataclasses.replace(backbone(), params={**params, "norm": norm})
    save_backbone(tmp_path / "damaged", damaged)
    with pytest.raises(ValueError, match="'a/0.png' to 'a/2.png' are not finite"):
        embed(tmp_path / "damaged", folder, tmp_path / "f.npz", batch_size=4)
