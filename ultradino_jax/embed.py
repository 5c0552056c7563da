"""Features of every image of a folder, in one file.

    python -m ultradino_jax.embed --checkpoint runs/vitb --input IMAGES \
        --out features.npz --tokens cls,mean

`--checkpoint` takes a run or whatever `weights.load.load_backbone` reads,
`--input` a folder of images (searched recursively) or a prepared cache. Run it again
after an interruption and it goes on where it stopped.
"""

import argparse
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultradino_jax.cli import command
from ultradino_jax.data.sources import BadImage, open_source, report_ignored
from ultradino_jax.errors import MissingPackage, UserError
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.progress import Progress, warn
from ultradino_jax.sharding import row_sharding
from ultradino_jax.weights.backbone import Backbone
from ultradino_jax.weights.load import load_backbone
from ultradino_jax.whole import claim, named, whole_file

TOKENS = ("cls", "mean", "patch")
SUFFIXES = (".npz", ".parquet")
PART = 1024  # images between two points from which an interrupted run can go on


def embed(
    checkpoint: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    tokens: tuple[str, ...] = ("cls", "mean"),
    image_size: int | None = None,
    batch_size: int = 64,
) -> dict[str, int]:
    """Write features of all images below a folder; returns {'images': n, 'failed': m}.

    tokens: any of 'cls' [n,D] (for USFM the mean patch token, its representation),
    'mean' [n,D] (mean of the patch tokens), 'patch' [n,N,D], all final-normed float32.
    image_size: side in pixels the images are resized to; None for the backbone's own.

    A .npz holds one array per token kind, `ids` (paths below the folder), `failed` and
    `failed_reason` (images that could not be read; they have no row). A .parquet file
    (needs pyarrow) holds a row per image, its tokens flattened, the shapes in the
    schema's metadata.

    Files of the folder that are no pictures are listed in `OUT.ignored.csv`.

    Parts wait in `OUT.parts` until all are there. Raises UserError for an unknown
    token or suffix, or when parts of another checkpoint, folder or setting lie there;
    FileExistsError when `out` exists; FileNotFoundError for what is missing.
    """
    out = Path(out)
    _check_arguments(out, tokens, batch_size)
    backbone = load_backbone(checkpoint, image_size=image_size)
    images = named(images, "image folder")
    source = open_source(images, channels=backbone.channels)
    report_ignored(source, warn, f"{out}.ignored.csv")
    parts = out.with_name(out.name + ".parts")
    settings = {
        "backbone": backbone.digest,
        "images": source.digest(),
        "tokens": list(tokens),
        "image_size": backbone.image_size,
        "part": PART,
    }
    advice = "delete it or choose another --out"
    claim(parts / "manifest.json", settings, "parts", advice)
    forward = _Forward(backbone, tokens, batch_size)
    starts = range(0, len(source), PART)
    progress = Progress("embed", len(source), unit="img")
    for start in starts:
        path = parts / f"{start:09d}.npz"
        stop = min(start + PART, len(source))
        if not path.exists():
            _write_part(path, forward, source, range(start, stop))
        progress.update(stop)
    progress.close()
    files = [parts / f"{start:09d}.npz" for start in starts]
    merge = _merge_npz if out.suffix == ".npz" else _merge_parquet
    with whole_file(out) as fresh:
        counts = merge(files, fresh, tokens)
    shutil.rmtree(parts)
    return counts


def _check_arguments(out: Path, tokens, batch_size: int) -> None:
    unknown = [name for name in tokens if name not in TOKENS]
    if unknown or not tokens or len(set(tokens)) < len(tokens):
        raise UserError(
            f"tokens must be one or more of {', '.join(TOKENS)}, each once, got "
            f"{','.join(tokens)!r}"
        )
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, it must be 1 or more")
    if out.suffix not in SUFFIXES:
        raise UserError(f"{str(out)!r} must end in {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet":
        _import_pyarrow()
    if out.exists():
        raise FileExistsError(f"{str(out)!r} exists; delete it or choose another name")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {str(out.absolute().parent)!r} does not exist")


@functools.partial(jax.jit, static_argnames=("model", "preprocess", "tokens"))
def _features(model, params, images, preprocess: Preprocess, tokens: tuple[str, ...]):
    out = model.apply({"params": params}, preprocess.normalise(images))
    patches = out.patch_tokens
    found = {"cls": out.cls_token, "mean": patches.mean(1), "patch": patches}
    return {name: found[name].astype(jnp.float32) for name in tokens}


class _Forward:
    """Images -> tokens, in batches of one shape spread over the local devices."""

    def __init__(self, backbone: Backbone, tokens, batch_size: int):
        self.preprocess = Preprocess.of(backbone)
        self.batch_size = batch_size
        self.model = backbone.model.clone(dtype=jnp.float32)
        self.tokens = tuple(tokens)
        self.by_row, everywhere = row_sharding(batch_size)
        self.params = jax.device_put(backbone.params, everywhere)

    def __call__(self, images: list[np.ndarray]) -> dict[str, np.ndarray]:
        """uint8 [S,S,C] each -> {token kind: float32 [n,..]}."""
        outputs = []
        for start in range(0, len(images), self.batch_size):
            rows = images[start : start + self.batch_size]
            padding = rows[-1:] * (self.batch_size - len(rows))
            batch = jax.device_put(np.stack(rows + padding), self.by_row)
            args = (self.model, self.params, batch, self.preprocess, self.tokens)
            result = jax.device_get(_features(*args))
            outputs.append({k: v[: len(rows)] for k, v in result.items()})
        return {k: np.concatenate([x[k] for x in outputs]) for k in outputs[0]}


def _write_part(path: Path, forward: _Forward, source, indices: range) -> None:
    """Features of some records and the names of those that cannot be read."""

    def read(index):
        try:
            return forward.preprocess.resize(source[index]), None
        except BadImage as error:
            return None, error.reason

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read, indices))
    ids = [source.record_id(i) for i in indices]
    good = [image for image, _ in results if image is not None]
    failed = [(name, r) for name, (_, r) in zip(ids, results, strict=True) if r]
    arrays: dict[str, Any] = forward(good) if good else {}
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise UserError(
                f"{name} features of images {ids[0]!r} to {ids[-1]!r} are not finite; "
                "the parameters are damaged or overflow"
            )
    bad = {name for name, _ in failed}
    with whole_file(path) as fresh, fresh.open("wb") as file:
        np.savez(
            file,
            ids=np.array([name for name in ids if name not in bad], str),
            failed=np.array([name for name, _ in failed], str),
            failed_reason=np.array([reason for _, reason in failed], str),
            **arrays,
        )


def _read(files: list[Path], name: str) -> Iterator[np.ndarray]:
    """One array of every part that has it; parts without a readable image have none."""
    for path in files:
        with np.load(path) as part:
            if name in part:
                yield part[name]


def _texts(files: list[Path], name: str) -> np.ndarray:
    return np.concatenate(list(_read(files, name)))


def _merge_npz(files: list[Path], out: Path, tokens) -> dict[str, int]:
    """Part by part, so that patch tokens of a large folder need not fit in memory."""
    texts = {n: _texts(files, n) for n in ("ids", "failed", "failed_reason")}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, text in texts.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, text)
        for name in tokens:
            shape = next(_read(files, name), np.empty((0, 0))).shape[1:]
            header = {
                "descr": "<f4",
                "fortran_order": False,
                "shape": (len(texts["ids"]), *shape),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for x in _read(files, name):
                    file.write(np.ascontiguousarray(x, "<f4").tobytes())
    return {"images": len(texts["ids"]), "failed": len(texts["failed"])}


def _import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage(
            "a .parquet file needs pyarrow: pip install pyarrow, or write .npz"
        ) from error
    return pyarrow


def _merge_parquet(files: list[Path], out: Path, tokens) -> dict[str, int]:
    """A row group per part."""
    pyarrow = _import_pyarrow()
    shapes = {k: next(_read(files, k), np.empty((0, 0))).shape[1:] for k in tokens}
    sizes = {k: int(np.prod(shape)) for k, shape in shapes.items()}
    failed = [
        list(pair)
        for pair in zip(
            _texts(files, "failed").tolist(),
            _texts(files, "failed_reason").tolist(),
            strict=True,
        )
    ]
    schema = pyarrow.schema(
        [("id", pyarrow.string())]
        + [(k, pyarrow.list_(pyarrow.float32(), size)) for k, size in sizes.items()],
        metadata={
            "shapes": json.dumps({k: list(shape) for k, shape in shapes.items()}),
            "failed": json.dumps(failed),
        },
    )
    count = 0
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for path in files:
            with np.load(path) as part:
                if not len(part["ids"]):
                    continue
                columns = [pyarrow.array(part["ids"].tolist())]
                for name, size in sizes.items():
                    values = pyarrow.array(part[name].reshape(-1))
                    array = pyarrow.FixedSizeListArray.from_arrays(values, size)
                    columns.append(array)
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(columns[0])
    return {"images": count, "failed": len(failed)}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("ultradino_jax.embed", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run, folder or file")
    parser.add_argument("--input", required=True, help="folder of images, or a cache")
    parser.add_argument("--out", required=True, help="FILE.npz or FILE.parquet")
    parser.add_argument("--tokens", default="cls,mean", help="of cls, mean and patch")
    parser.add_argument("--image-size", type=int, help="side in pixels; native if left")
    parser.add_argument("--batch-size", type=int, default=64)
    flags = parser.parse_args(argv)
    counts = embed(
        flags.checkpoint,
        flags.input,
        flags.out,
        tokens=tuple(flags.tokens.split(",")),
        image_size=flags.image_size,
        batch_size=flags.batch_size,
    )
    print(f"features of {counts['images']} images in {flags.out}")
    if counts["failed"]:
        print(f"{counts['failed']} could not be read; they are listed in the file")


if __name__ == "__main__":
    command(main)
