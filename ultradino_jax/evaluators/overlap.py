"""Are images of an evaluation among those that the backbone was pretrained on?"""

from pathlib import Path, PurePosixPath

import numpy as np

from ultradino_jax.data.datasets.labelled import SPLITS, LabelledImages
from ultradino_jax.data.prepare.dedup import pixel_sha256
from ultradino_jax.data.sources import BadImage, CacheSource, open_source
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.weights.lineage import lineage
from ultradino_jax.whole import read_json


def pretraining_sources(
    checkpoint: str | Path,
) -> tuple[list[tuple], list[str], bool]:
    """([(source, its root)], why there are no others, whether all runs were reached).

    The runs behind a checkpoint are found through what they leave in their workdirs,
    `weights.lineage`. One on phantoms saw no image that could leak; one whose images
    cannot be opened is a hole.
    """
    try:
        runs = lineage(checkpoint)
    except (OSError, UserError) as error:
        return [], [f"its pretraining images cannot be found: {error}"], False
    sources, reasons, whole = [], [], True
    for i, run in enumerate(runs):
        if "file" in run:
            # Weights that a known run began with are named; their images are not ours.
            what = f"the weights of {run['file']}" if i else "it"
            line = f"there is no config.json of a pretraining run beside {what}"
        elif not run["root"]:
            line = "it was pretrained on the built-in phantom"
        else:
            try:
                sources.append((_opened(run), run["root"]))
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                line, whole = f"its pretraining images cannot be opened: {error}", False
        reasons.append(line if i == 0 else f"{next(iter(run.values()))}: {line}")
    return sources, reasons, whole


def _opened(run: dict):
    source = open_source(run["root"], list_file=run["list_file"] or None, channels=1)
    if run["digest"] not in (None, source.digest()):
        raise UserError(
            f"{run['root']!r} now holds other images than it was trained on"
        )
    return source


def overlapping_images(source, root, data: LabelledImages) -> np.ndarray:
    """bool [n]: images whose pixels, as stored, are in the pretraining source.

    A prepared cache is asked by the hash of the pixels. In a folder or a list only
    files of an image's own name are compared, so renamed copies are not found.
    """
    found = np.zeros(len(data), bool)
    if _by_hash(source):
        known = cache_hashes(root)
        for i in range(len(data)):
            found[i] = pixel_sha256(data.stored_pixels(i)) in known
        return found
    by_stem: dict[str, list[int]] = {}
    wanted = {stem(name) for name in data.ids}
    for i in range(len(source)):
        name = stem(source.record_id(i))
        if name in wanted:
            by_stem.setdefault(name, []).append(i)
    for i, name in enumerate(data.ids):
        candidates = by_stem.get(stem(name), ())
        found[i] = any(_same(source, k, data.stored_pixels(i)) for k in candidates)
    return found


def _by_hash(source) -> bool:
    return isinstance(source, CacheSource)


def cache_hashes(root: str | Path) -> set[bytes]:
    """Pixel hashes of the frames that the records of a prepared cache were cut from."""
    root = Path(root)
    with damaged(root):
        shards = read_json(root / "manifest.json")["shards"]
        indexes = (np.load((root / s["file"]).with_suffix(".npy")) for s in shards)
        return {row.tobytes() for index in indexes for row in index["sha256"]}


def stem(name: str) -> str:
    """File name without folders and suffix."""
    return PurePosixPath(str(name)).stem


def _same(source, index: int, image: np.ndarray) -> bool:
    try:
        return np.array_equal(source[index][:, :, 0], image)
    except BadImage:
        return False


def check_overlap(
    checkpoint: str | Path | None, *splits: LabelledImages, allowed: bool, say=print
) -> dict:
    """Counts per split of images seen in pretraining, for the record.

    splits: the data as split for one run, or for each of several: counts are then those
    of the first, with the largest of any run for 'val' and 'test'. Raises UserError
    when one of any val or test was seen, unless `allowed`. Training images may have
    been seen: pretraining uses no label. 'checked' is true when the images of all runs
    behind the checkpoint could be asked; 'of' lists them and 'not_checked' says what
    could not. {'checked': False, 'reason'} when none could, or nothing was pretrained
    (no checkpoint).
    """
    if checkpoint is None:
        return {"checked": False, "reason": "nothing was pretrained"}
    sources, reasons, whole = pretraining_sources(checkpoint)
    for reason in reasons:
        say(f"overlap with pretraining not checked: {reason}")
    if not sources:
        return {"checked": False, "reason": "; ".join(reasons)}
    known: dict[str, bool] = {}  # an image is compared once, however many runs have it
    runs = []
    for data in splits:
        new = np.array([name not in known for name in data.ids], bool)
        part = data.take(new)
        found = [overlapping_images(source, root, part) for source, root in sources]
        known |= dict(zip(part.ids, np.any(found, axis=0), strict=True))
        seen = np.array([known[name] for name in data.ids], bool)
        runs.append({name: int(seen[data.splits == name].sum()) for name in SPLITS})
        held_out = seen & (data.splits != "train")
        if held_out.any() and not allowed:
            raise UserError(
                f"{held_out.sum()} validation or test images of {data.name} are among "
                f"the pretraining images, first {str(data.ids[held_out][0])!r}; leave "
                "them out of pretraining, or set config.allow_overlap=True"
            )
    counts = runs[0] | {name: max(r[name] for r in runs) for name in ("val", "test")}
    if sum(counts.values()):
        say(f"images seen in pretraining: {counts}")
    by = ["pixels" if _by_hash(s) else "names and pixels" for s, _ in sources]
    roots = [str(root) for _, root in sources]
    of = [{"images": r, "by": b} for r, b in zip(roots, by, strict=True)]
    record = {"checked": whole, **counts, "of": of}
    return record | ({"not_checked": reasons} if reasons else {})
