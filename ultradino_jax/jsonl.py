"""Files of JSON lines that survive a crash: the last line may be cut."""

import json
from pathlib import Path
from typing import BinaryIO


def _rows_and_ends(data: bytes) -> tuple[list[dict], list[int]]:
    """Rows up to the first line that is cut or no JSON object, and where each ends."""
    rows, ends, end = [], [], 0
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        end += len(line)
        rows.append(row)
        ends.append(end)
    return rows, ends


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file; [] when there is none. A cut line ends it."""
    path = Path(path)
    return _rows_and_ends(path.read_bytes())[0] if path.exists() else []


def open_rows(path: str | Path, keep=lambda row: True) -> BinaryIO:
    """A file to append rows to, cut off before the first row that is not to be kept.

    A line cut by a crash goes too. `append` writes to it.
    """
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    kept = 0
    for row, end in zip(*_rows_and_ends(data), strict=True):
        if not keep(row):
            break
        kept = end
    file = path.open("ab")
    file.truncate(kept)
    if not data[:kept].endswith(b"\n") and kept:  # whole but for its newline
        file.write(b"\n")
    return file


def append(file: BinaryIO, row: dict) -> None:
    """Append one row, flushed."""
    file.write((json.dumps(row) + "\n").encode())
    file.flush()


class MetricFile:
    """Rows {'step': k, name: value, ..}.

    Opening at `start_step` cuts off the rows from the first of that step or later on,
    so a resumed run leaves the same bytes as one that was never stopped.
    """

    def __init__(self, path: str | Path, start_step: int):
        def is_before(row):
            return row.get("step", start_step) < start_step

        self._file = open_rows(path, is_before)

    def write(self, step: int, values: dict) -> None:
        """Append one row, flushed."""
        append(self._file, {"step": step, **values})

    def close(self) -> None:
        """Close the file."""
        self._file.close()
