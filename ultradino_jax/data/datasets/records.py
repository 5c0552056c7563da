"""Prepared ArrayRecord data sets (tensorflow-datasets without TensorFlow)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ultradino_jax.data.datasets.archive import decode_grey
from ultradino_jax.data.datasets.labelled import LabelledImages, labelled_images
from ultradino_jax.data.datasets.segmented import SegmentedImages, segmented_images


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


def masked_features():
    """Features of a segmentation set: image and index mask as PNG bytes, and texts."""
    png = tfds.features.Image(
        shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
    )
    texts = {name: tfds.features.Text() for name in ("id", "patient")}
    return tfds.features.FeaturesDict({"image": png, "mask": png, **texts})


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
        raise ValueError(f"{builder_class.name}: data_dir is empty; name a folder")
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
