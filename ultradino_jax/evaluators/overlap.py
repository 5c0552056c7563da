"""Are images of an evaluation among those that the backbone was pretrained on?"""

import json
from pathlib import Path, PurePosixPath

import numpy as np

from ultradino_jax.data.cache import CacheSource
from ultradino_jax.data.datasets.labelled import SPLITS, LabelledImages
from ultradino_jax.data.dedup import pixel_sha256
from ultradino_jax.data.sources import BadImage, open_source


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
        data = json.loads((folder / "config.json").read_text())["data"]
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
    shards = json.loads((root / "manifest.json").read_text())["shards"]
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
    checkpoint: str | Path | None, data: LabelledImages, *, allowed: bool, say=print
) -> dict:
    """Counts per split of images seen in pretraining, for the record.

    Raises ValueError when one of val or test was seen, unless `allowed`. Training
    images may have been seen: pretraining uses no label. {'checked': False, 'reason'}
    when it cannot be known, or nothing was pretrained (no checkpoint).
    """
    if checkpoint is None:
        return {"checked": False, "reason": "nothing was pretrained"}
    source, root = pretraining_source(checkpoint)
    if source is None:
        say(f"overlap with pretraining not checked: {root}")
        return {"checked": False, "reason": root}
    seen = overlapping_images(source, root, data)
    counts = {name: int(seen[data.splits == name].sum()) for name in SPLITS}
    held_out = counts["val"] + counts["test"]
    if held_out and not allowed:
        first = data.ids[seen & (data.splits != "train")][0]
        raise ValueError(
            f"{held_out} validation or test images of {data.name} are among the "
            f"pretraining images, first {str(first)!r}; leave them out of pretraining, "
            f"or set config.allow_overlap=True"
        )
    if sum(counts.values()):
        say(f"images seen in pretraining: {counts}")
    return {"checked": True, **counts}
