"""Prepared ArrayRecord data sets (tensorflow-datasets without TensorFlow)."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.archive import (
    Files,
    decode_grey,
    find_table,
    match_images,
    read_table,
)
from ultradino_jax.data.datasets.labelled import LabelledImages, labelled_images
from ultradino_jax.data.datasets.segmented import SegmentedImages, segmented_images
from ultradino_jax.errors import UserError


def planes_features(classes: Sequence[str], groups: Sequence[str]):
    """Features of a set of labelled PNGs: the files' bytes, label and texts.

    The image is declared grey; files with more channels are stored as they are.
    """
    texts = {name: tfds.features.Text() for name in ("id", "patient", *groups)}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
            ),
            "label": tfds.features.ClassLabel(names=list(classes)),
            **texts,
        }
    )


def planes_info(builder, description: str | None, homepage: str, classes, groups):
    """Info of a builder of labelled planes; arguments as of `planes_features`."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=planes_features(classes, groups),
        supervised_keys=("image", "label"),
        homepage=homepage,
    )


def masked_info(builder, description: str | None, homepage: str):
    """Info of a segmentation builder: image and index mask as PNG bytes, and texts."""
    png = tfds.features.Image(
        shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
    )
    texts = {name: tfds.features.Text() for name in ("id", "patient")}
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"image": png, "mask": png, **texts}),
        homepage=homepage,
    )


def manual_or_download(dl_manager, url: str):
    """The user's own folder or, where there is none, what is fetched from `url`."""
    try:
        return dl_manager.manual_dir
    except AssertionError:  # there is none, or it is empty
        return dl_manager.download(url)


def planes_table(
    source, table: str, name: str, columns: Sequence[str], classes: Sequence[str]
) -> tuple[Files, list[dict[str, str]]]:
    """(files, rows) of a csv of planes with columns Plane, Train and `columns`.

    name: the column of image names; each row gets 'id', that without '.png', and
    'file', the PNG below the table's folder. Raises UserError for an unknown class, a
    Train that is not 0 or 1, and an image that is missing or there twice.
    """
    files, table = find_table(source, table)
    rows = read_table(files.read(table), [name, "Plane", "Train", *columns], table)
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
    return files, [{**row, "file": paths[row["id"]]} for row in rows]


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


def open_records(
    builder_class,
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike,
    download: bool,
):
    """(builder, {split: its records, pictures as bytes}), prepared on first use.

    Raises FileNotFoundError when it is not prepared, `manual_dir` is not given and
    `download` is off.
    """
    if not os.fspath(data_dir):
        raise UserError(f"{builder_class.name}: data_dir is empty; name a folder")
    builder = builder_class(
        data_dir=os.fspath(data_dir), file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    if not builder.is_prepared():
        if os.fspath(manual_dir) and not Path(manual_dir).exists():
            raise FileNotFoundError(f"manual_dir {str(manual_dir)!r} does not exist")
        if not os.fspath(manual_dir) and not download:
            raise FileNotFoundError(
                f"{builder.name} is not prepared in {str(data_dir)!r}: give "
                f"manual_dir=FOLDER with its files, or download=True to fetch it from "
                f"{builder.info.homepage}"
            )
        config = tfds.download.DownloadConfig(manual_dir=os.fspath(manual_dir) or None)
        builder.download_and_prepare(download_config=config)
    raw = {
        name: tfds.decode.SkipDecoding()
        for name in ("image", "mask")
        if name in builder.info.features
    }
    splits = [name for name in ("train", "test") if name in builder.info.splits]
    return builder, {s: builder.as_data_source(split=s, decoders=raw) for s in splits}


def load_records(
    builder_class,
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike,
    download: bool,
    classes: Sequence[str],
    groups: Sequence[str],
) -> LabelledImages:
    """The labelled images of a data set; raises what `open_records` raises."""
    builder, sources = open_records(
        builder_class, data_dir, manual_dir=manual_dir, download=download
    )
    rows = []
    for split, source in sources.items():
        for record in source:
            texts = {k: record[k].decode() for k in ("id", "patient", *groups)}
            rows.append({**texts, "label": classes[record["label"]], "split": split})
    images = RecordImages(list(sources.values()))
    return labelled_images(builder.name, str(builder.version), classes, rows, images)


def load_segmented_records(
    builder_class,
    data_dir: str | os.PathLike,
    *,
    manual_dir: str | os.PathLike,
    download: bool,
    classes: Sequence[str],
) -> SegmentedImages:
    """The images and masks of a data set; raises what `open_records` raises."""
    builder, sources = open_records(
        builder_class, data_dir, manual_dir=manual_dir, download=download
    )
    rows = [
        {"split": split, **{k: record[k].decode() for k in ("id", "patient")}}
        for split, source in sources.items()
        for record in source
    ]
    sources = list(sources.values())
    return segmented_images(
        builder.name,
        str(builder.version),
        classes,
        rows,
        RecordImages(sources),
        RecordImages(sources, "mask"),
    )
