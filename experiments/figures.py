"""What figure scripts share: a picture as PNG and PDF, its data as csv beside it."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def new_figure(width: float, height: float, **layout):
    """(matplotlib Figure without a display, its axes); sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**layout)


def save_figure(figure, stem: Path) -> None:
    """Write stem.png (150 dpi) and stem.pdf, without the time in them."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A csv; floats with six digits, None as nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            shown = [f"{x:.6g}" if isinstance(x, float) else x for x in row]
            writer.writerow(["" if x is None else x for x in shown])
