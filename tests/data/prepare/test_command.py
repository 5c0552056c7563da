"""The command, and folders that do not fit."""

import fcntl

import pytest

from tests.data.prepare.inputs import (
    export,
    run,
)
from ultradino_jax.data.cache import OutputError
from ultradino_jax.data.prepare.scan import Key
from ultradino_jax.data.sources import CacheSource
from ultradino_jax.errors import UserError
from ultradino_jax.prepare import main


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
    with pytest.raises(UserError, match="the cache holds no picture"):
        CacheSource(tmp_path / "d")


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
    with pytest.raises(ValueError, match="short_side: 256 there, 64 now.*another out"):
        main([*arguments, "--short-side", "64"])
    hashes = str(tmp_path / "h")
    series = str(root / "series")
    main(["--input", series, "--write-hashes", hashes, "--workers", "0"])
    assert "2 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--input", str(root)])
