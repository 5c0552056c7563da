"""Are images of an evaluation among those that the backbone was pretrained on?"""

from pathlib import Path, PurePosixPath

import numpy as np

from ultradino_jax.data.datasets.labelled import SPLITS, LabelledImages
from ultradino_jax.data.prepare.dedup import pixel_sha256
from ultradino_jax.data.sources import BadImage, CacheSource, open_source
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.whole import read_json


def pretraining_source(checkpoint: str | Path):
    """(source, its root) of the run a checkpoint belongs to, or (None, why not).

    It is found through the config.json that a run leaves in its workdir.
    """
    path = Path(checkpoint)
    for folder in (path, path.parent):
        if (folder / "config.json").is_file():
            break
    else:
        return None, "there is no config.json of a pretraining run beside it"
    try:
        data = read_json(folder / "config.json")["data"]
        if not data["root"]:
            return None, "it was pretrained on the built-in phantom"
        source = open_source(
            data["root"], list_file=data["list_file"] or None, channels=1
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"its pretraining images cannot be opened: {error}"
    return source, data["root"]


def overlapping_images(source, root, data: LabelledImages) -> np.ndarray:
    """bool [n]: images whose pixels are in the pretraining source.

    A prepared cache is asked by the hash of the pixels. In a folder or a list only
    files of an image's own name are compared, so renamed copies are not found.
    """
    found = np.zeros(len(data), bool)
    if isinstance(source, CacheSource):
        known = cache_hashes(root)
        for i in range(len(data)):
            found[i] = pixel_sha256(data[i]) in known
        return found
    by_stem: dict[str, list[int]] = {}
    wanted = {stem(name) for name in data.ids}
    for i in range(len(source)):
        name = stem(source.record_id(i))
        if name in wanted:
            by_stem.setdefault(name, []).append(i)
    for i, name in enumerate(data.ids):
        candidates = by_stem.get(stem(name), ())
        found[i] = any(_same(source, k, data[i]) for k in candidates)
    return found


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
    been seen: pretraining uses no label. {'checked': False, 'reason'} when it cannot be
    known, or nothing was pretrained (no checkpoint).
    """
    if checkpoint is None:
        return {"checked": False, "reason": "nothing was pretrained"}
    source, root = pretraining_source(checkpoint)
    if source is None:
        say(f"overlap with pretraining not checked: {root}")
        return {"checked": False, "reason": root}
    known: dict[str, bool] = {}  # an image is compared once, however many runs have it
    runs = []
    for data in splits:
        new = np.array([name not in known for name in data.ids], bool)
        part = data.take(new)
        known |= dict(
            zip(part.ids, overlapping_images(source, root, part), strict=True)
        )
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
    return {"checked": True, **counts}
