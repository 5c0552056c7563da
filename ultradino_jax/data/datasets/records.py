"""Published data sets, prepared once as ArrayRecords (tfds without TensorFlow).

`Published` says what is a set's own; everything that the sets share is here.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from ultradino_jax.data.datasets.archive import (
    decode_grey,
    find_table,
    match_images,
)
from ultradino_jax.data.datasets.labelled import (
    LabelledImages,
    check_patients,
    labelled_images,
)
from ultradino_jax.data.datasets.segmented import SegmentedImages, segmented_images
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError

Examples = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Published:
    """What is one data set's own.

    name: of the set and of its folder in data_dir. about, homepage: for its record.
    release: which published version this is. url: the file to download; files: what
    that is called, in a sentence. classes: Y names in label order. groups: further
    texts of a labelled image; None for a set with masks. read: the user's folder, or
    what was downloaded -> {split: examples}, an example being {'id', 'patient', 'image'
    (the bytes of a PNG)} and 'label' (a class name) with the groups, or 'mask' (the
    bytes of an index PNG).
    """

    name: str
    about: str | None
    release: str
    homepage: str
    url: str
    files: str
    classes: tuple[str, ...]
    read: Callable[[str | os.PathLike], Mapping[str, Examples]]
    groups: tuple[str, ...] | None = None


@functools.cache
def _builder_class(published: Published):
    """The tfds builder of a set."""
    # Slow to import: only where a set is opened.
    import tensorflow_datasets as tfds

    # Declared grey; files with more channels are stored as they are.
    picture = tfds.features.Image(
        shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
    )
    texts = ("id", "patient", *(published.groups or ()))
    features = {"image": picture, **{name: tfds.features.Text() for name in texts}}
    labelled = published.groups is not None
    if labelled:
        features["label"] = tfds.features.ClassLabel(names=list(published.classes))
    else:
        features["mask"] = picture

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = published.name
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES: ClassVar = {"1.0.0": published.release}
        # tfds would find this through importlib_resources, which nothing installs.
        code_path = tfds.core.Path(__file__)
        source: str | os.PathLike = ""  # the user's own files; '' downloads

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=published.about,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if labelled else None,
                homepage=published.homepage,
            )

        def _split_generators(self, dl_manager):
            source = self.source or dl_manager.download(published.url)
            return {
                split: self._generate_examples(examples)
                for split, examples in published.read(source).items()
            }

        def _generate_examples(self, examples: Examples):
            for example in examples:
                yield example["id"], example

    return Builder


def _open(
    published: Published,
    data_dir: str | os.PathLike,
    manual_dir: str | os.PathLike,
    download: bool,
):
    """(version, {split: its records, pictures as bytes}), prepared on first use."""
    import tensorflow_datasets as tfds

    name = published.name
    if not os.fspath(data_dir):
        raise UserError(f"{name}: data_dir is empty; name a folder")
    builder = _builder_class(published)(
        data_dir=os.fspath(data_dir), file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    if not builder.is_prepared():
        builder.source = _own_files(manual_dir)
        if not builder.source and not download:
            raise FileNotFoundError(
                f"{name} is not prepared in {str(data_dir)!r}: give manual_dir=FOLDER "
                f"with {published.files} or what that unpacks to, or download=True to "
                f"fetch it from {published.homepage}"
            )
        builder.download_and_prepare()
    pictures = ("image",) if published.groups is not None else ("image", "mask")
    raw = {key: tfds.decode.SkipDecoding() for key in pictures}
    splits = [split for split in ("train", "test") if split in builder.info.splits]
    # Its decorator hides the parameters.
    open_split: Any = builder.as_data_source
    return str(builder.version), {
        split: open_split(split=split, decoders=raw) for split in splits
    }


def _own_files(manual_dir: str | os.PathLike) -> str:
    """The folder, or '' when none is given or it is empty."""
    if not os.fspath(manual_dir):
        return ""
    folder = Path(manual_dir)
    if not folder.exists():
        raise FileNotFoundError(f"manual_dir {str(manual_dir)!r} does not exist")
    return "" if folder.is_dir() and not any(folder.iterdir()) else str(folder)


class RecordImages:
    """Stored PNG bytes and grey pixels of record i, over the splits in order.

    field: which of the record's pictures.
    """

    def __init__(self, sources, field: str = "image"):
        self.sources = sources
        self.field = field
        self.ends = np.cumsum([len(source) for source in sources])

    def png(self, index: int) -> bytes:
        """The bytes of the file that the record was made from."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        start = self.ends[which - 1] if which else 0
        return self.sources[which][int(index - start)][self.field]

    def __call__(self, index: int) -> np.ndarray:
        """uint8 [H,W] of record `index`."""
        return decode_grey(self.png(index))


def load_labelled(
    published: Published,
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
) -> LabelledImages:
    """The labelled images of a set, prepared in `data_dir` on first use.

    manual_dir: folder with the user's archive or unpacked files; otherwise `download`
    allows fetching it. Raises FileNotFoundError when neither is there, UserError for
    files that are not as published or a patient in two splits.
    """
    version, sources = _open(published, data_dir, manual_dir, download)
    rows = []
    for split, source in sources.items():
        for record in source:
            keys = ("id", "patient", *(published.groups or ()))
            texts = {key: record[key].decode() for key in keys}
            label = published.classes[record["label"]]
            rows.append({**texts, "label": label, "split": split})
    images = RecordImages(list(sources.values()))
    data = labelled_images(published.name, version, published.classes, rows, images)
    check_patients(data)
    return data


def load_segmented(
    published: Published,
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike = "",
    download: bool = False,
) -> SegmentedImages:
    """The images and masks of a set; no splits are made. As `load_labelled`."""
    version, sources = _open(published, data_dir, manual_dir, download)
    rows = [
        {"split": split, **{key: record[key].decode() for key in ("id", "patient")}}
        for split, source in sources.items()
        for record in source
    ]
    parts = list(sources.values())
    return segmented_images(
        published.name,
        version,
        published.classes,
        rows,
        RecordImages(parts),
        RecordImages(parts, "mask"),
    )


def planes_examples(
    source: str | os.PathLike,
    table: str,
    *,
    name: str,
    classes: Sequence[str],
    groups: Mapping[str, str],
    patient: Callable[[dict[str, str]], str],
) -> dict[str, Examples]:
    """Examples of a csv of planes with the columns Plane, Train and Patient_num.

    name: the column of image names; the PNGs lie below the table's folder. groups:
    {name: its column}. patient: a row -> who it is of.
    Raises UserError for a class that is unknown, a Train that is not 0 or 1, and an
    image that is missing or there twice.
    """
    files, table = find_table(source, table)
    columns = [name, "Plane", "Train", "Patient_num", *groups.values()]
    rows = read_table(files.read(table), columns, table)
    for row in rows:
        if row["Plane"] not in classes:
            raise UserError(
                f"{table}: image {row[name]!r} has the unknown class "
                f"{row['Plane']!r}; known are {', '.join(map(repr, classes))}"
            )
        if row["Train"] not in ("0", "1"):
            raise UserError(
                f"{table}: Train of image {row[name]!r} is {row['Train']!r}, not 0 or 1"
            )
        row["id"] = row[name].removesuffix(".png")
    folder = str(PurePosixPath(table).parent)
    paths = match_images(files, folder, [row["id"] for row in rows], table)

    def examples(flag: str) -> Iterator[dict[str, Any]]:
        for row in rows:
            if row["Train"] == flag:
                yield {
                    "id": row["id"],
                    "patient": patient(row),
                    "image": files.read(paths[row["id"]]),
                    "label": row["Plane"],
                    **{key: row[column] for key, column in groups.items()},
                }

    return {"train": examples("1"), "test": examples("0")}
