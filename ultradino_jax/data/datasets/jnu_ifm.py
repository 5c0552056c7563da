"""JNU-IFM: intrapartum transperineal videos (figshare 14371652 v2, CC BY 4.0).

78 videos of 51 women, 6,224 labelled frames; 3,743 show both pubic symphysis and fetal
head, and only those are used, as in the paper. No table says which videos are of one
woman, so videos are grouped by the time stamp their names begin with. Read are the
published folders, one per video, and the re-uploads in one flat folder.
"""

import itertools
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath

import numpy as np

from ultradino_jax.data.datasets.mask_files import (
    encode_png,
    find_folder,
    remap,
)
from ultradino_jax.data.datasets.records import Published, load_segmented
from ultradino_jax.data.datasets.segmented import SegmentedImages
from ultradino_jax.data.formats.labels import read_labels
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError
from ultradino_jax.progress import warn

CLASSES = ("background", "pubic symphysis", "fetal head")
VALUES = {0: 0, 7: 1, 8: 2}
BOTH = "6"  # frame_label: 3 none, 4 only symphysis, 5 only head, 6 both
# One in each video's folder; the second is a flat folder's, with a column video_name.
TABLES = ("frame_label.csv", "framelabel.csv")


def _read(source):
    """Frames with both structures as one split."""
    files, _ = find_folder(source, "image")
    return {"train": _examples(files)}


def _examples(files):
    left_out = Counter()
    for frame in frames(files):
        mask = None
        if frame.mask is None:
            left_out["without a mask"] += 1
        elif frame.label is None:
            left_out[f"without a row in {TABLES[0]}"] += 1
        else:
            stored = read_labels(files.read(frame.mask), frame.mask)
            mask = remap(stored, VALUES, frame.mask)
            both = all((mask == k).any() for k in (1, 2))
            if not both or frame.label != BOTH:
                left_out["without both structures"] += 1
                mask = None
        if mask is None:
            continue
        yield {
            "id": frame.name,
            "patient": patient_of(frame.video),
            "image": files.read(frame.image),
            "mask": encode_png(mask),
        }
    for reason, count in left_out.items():
        warn(f"jnu_ifm: {count} frames {reason} left out")


class Frame:
    """Names of a frame's files; mask and label are None where there is none."""

    def __init__(self, video, name, image, mask, label):
        self.video, self.name, self.image = video, name, image
        self.mask, self.label = mask, label


def frames(files):
    """All frames below any nesting, joined over image, mask and table by name.

    The counts of the three differ in the published archive: zipping sorted lists would
    pair the wrong ones.
    """
    known = set(files.names)
    tables: dict[PurePosixPath, dict[str, tuple[str, str]]] = {}
    for image in files.names:
        path = PurePosixPath(image)
        if path.parent.name != "image" or path.suffix.lower() != ".png":
            continue
        folder = path.parents[1]
        if folder not in tables:
            tables[folder] = _labels(files, known, folder)
        mask = str(folder / "mask" / f"{path.stem}_mask.png")
        stem = path.stem
        if stem not in tables[folder]:  # files may be called by their number alone
            stem = f"{folder.name}_{stem}"
        video, label = tables[folder].get(stem, (folder.name, None))
        yield Frame(video, path.stem, image, mask if mask in known else None, label)


def _labels(files, known, folder: PurePosixPath) -> dict[str, tuple[str, str]]:
    """{VIDEO_FRAME: (video, label)} of the table in a folder or above; {} without."""
    for place, name in itertools.product((folder, folder.parent), TABLES):
        table = str(place / name)
        if table not in known:
            continue
        found = {}
        for row in read_table(files.read(table), ["frame_id", "frame_label"], table):
            video, frame = row.get("video_name", folder.name), row["frame_id"]
            stem = frame if frame.startswith(f"{video}_") else f"{video}_{frame}"
            found[stem] = video, row["frame_label"]
        return found
    return {}


def patient_of(video: str) -> str:
    """The time stamp a video's name begins with: '20190909T155747', else the name.

    Suffixes ('I1', '_0', '__B_产科_0') mark further videos of one examination.
    """
    stamp = re.match(r"\d{8}T\d{6}", video)
    return stamp.group() if stamp else video


GROUPS = ("examination", "day")
PUBLISHED = Published(
    name="jnu_ifm",
    about=__doc__,
    release="figshare 14371652, version 2",
    homepage="https://doi.org/10.6084/m9.figshare.14371652",
    url="https://figshare.com/ndownloader/articles/14371652/versions/2",
    files="the archive",
    classes=CLASSES,
    read=_read,
)


def load(
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
    group_by: str = "examination",
) -> SegmentedImages:
    """The data set, without splits; as `load_segmented`.

    group_by: 'examination' groups videos of one time stamp, 'day' those of one day,
    which is stricter.
    """
    if group_by not in GROUPS:
        raise UserError(f"group_by={group_by!r}: choose one of {', '.join(GROUPS)}")
    data = load_segmented(PUBLISHED, data_dir, manual_dir=manual_dir, download=download)
    if group_by == "day":
        days = np.array([p.split("T")[0] for p in data.patients], np.str_)
        data = replace(data, patients=days)
    return data
