"""Files of JSON lines that survive a crash: the last line may be cut."""

import json
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The lines of a JSON-lines file; [] when there is none. A cut line ends it."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class MetricFile:
    """JSON lines {'step': k, name: value, ..} that survive a restart.

    Opening at `start_step` drops the lines of later steps (and a line cut by a crash),
    so a resumed run leaves the same bytes as one that was never stopped.
    """

    def __init__(self, path: Path, start_step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < start_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: dict) -> None:
        """Append one line, flushed."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
