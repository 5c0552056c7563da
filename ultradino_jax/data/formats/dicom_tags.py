"""Values of DICOM tags as writers leave them: padded, with commas, of another type."""

import math
import re
from collections.abc import Iterator
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

_TEXT = ("DS", "IS", "LO", "SH", "CS", "ST", "LT", "UT")
_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """The finite numbers of a tag; [] where there is none, or any that is no number.

    A comma as decimal sign is taken for a point; blanks and NULs around count as none.
    """
    found = []
    for value in _values(dataset, keyword):
        if isinstance(value, str):
            value = value.strip(" \0\t\r\n")
            if _COMMA.fullmatch(value):
                value = value.replace(",", ".")
            if not value:
                continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return []
        if not math.isfinite(number):
            return []
        found.append(number)
    return found


def number(dataset: Dataset, keyword: str) -> float | None:
    """The first number of a tag, or None."""
    return next(iter(numbers(dataset, keyword)), None)


def whole(dataset: Dataset, keyword: str) -> int | None:
    """The first number of a tag if it is whole, or None."""
    value = number(dataset, keyword)
    return int(value) if value is not None and value == int(value) else None


def text(dataset: Dataset, keyword: str) -> str:
    """The text of a tag without what pads it; "" where there is none."""
    try:
        value = dataset.get(keyword)
    except Exception:  # a value that its type cannot hold
        return ""
    return "" if value is None else str(value).strip(" \0")


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """The items of a sequence; [] where there is none."""
    try:
        value = dataset.get(keyword)
    except Exception:
        return []
    return list(value) if isinstance(value, Sequence) else []


def _values(dataset: Dataset, keyword: str) -> Iterator[Any]:
    """Single values; those that a file holds as text, as text."""
    try:
        element = dataset.get_item(keyword)
    except (KeyError, TypeError):
        return
    if element is None:
        return
    if isinstance(element, RawDataElement):
        vr = element.VR
        if vr in (None, "UN"):
            vr = dictionary_VR(element.tag)
        if vr in _TEXT:
            yield from (element.value or b"").decode("latin1").split("\\")
            return
    try:
        value = dataset[keyword].value
    except Exception:  # bytes that its type cannot hold
        return
    if isinstance(value, bytes):
        value = value.decode("latin1").split("\\")
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        yield value
    else:
        yield from value
