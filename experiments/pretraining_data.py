"""Score against the number of pretraining images, as in the paper's Figure 1a.

    python experiments/pretraining_data.py --results=runs/table1 --out=figures/data

Draws one panel per column of Table 1: own results as points with their 95 % interval
(OUT of table1.py; rows that were not run are left out), the paper's figures as hollow
marks, both over the number of images the backbone was pretrained on. Without --results
only the paper's are drawn. `--own=NAME=IMAGES=FOLDER` adds another sweep's UltraDINO
rows, pretrained on that many images.

Writes OUT.png, OUT.pdf and OUT.csv.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.figures import new_figure, save_figure, write_rows  # noqa: E402
from experiments.table1_collect import read_cell  # noqa: E402
from experiments.table1_rows import COLUMNS, ROWS  # noqa: E402

DEFAULT = Path("runs/figures/pretraining_data")
HEADER = ("system", "images", "column", "source", "mean", "low", "high")
# Colour by what was pretrained on, mark by size.
FAMILIES = {"ibot": "C1", "dinov2": "C2", "usfm": "C4", "ultradino": "C0"}


def points(results: Path | None, own: dict[str, tuple[int, Path]]) -> list[tuple]:
    """Rows of HEADER: 'paper', 'here' and the names of other sweeps as the source."""
    found = []
    for row in (row for row in ROWS if row.images):
        for column in COLUMNS:
            if column.name in row.paper:
                value = row.paper[column.name]
                line = (row.name, row.images, column.name, "paper", value, None, None)
                found.append(line)
            sweeps = {"here": (row.images, results)} if results else {}
            if row.name.startswith("ultradino"):
                sweeps |= own
            for source, (images, folder) in sweeps.items():
                figure = read_cell(folder, row, column)
                if figure.mean is not None:
                    numbers = (figure.mean, figure.low, figure.high)
                    found.append((row.name, images, column.name, source, *numbers))
    return found


def draw(rows: list[tuple], stem: Path) -> None:
    """A panel per column, images on a logarithmic axis."""
    figure, axes = new_figure(3.1 * len(COLUMNS), 3.2, ncols=len(COLUMNS))
    for panel, column in zip(axes, COLUMNS, strict=True):
        for system, images, _, source, mean, low, high in (
            row for row in rows if row[2] == column.name
        ):
            colour = FAMILIES[system.partition("_")[0]]
            mark = "^" if "_vitb" in system else "o"
            paper = source == "paper"
            spread = None if low is None else [[mean - low], [high - mean]]
            panel.errorbar(
                images, mean, spread, color=colour, marker=mark, capsize=3, ls="",
                mfc="none" if paper else colour,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_title(column.title, fontsize=9)
        panel.set_xlabel("pretraining images")
    axes[0].set_ylabel("Dice or macro F1, %")
    for name, colour in FAMILIES.items():
        axes[0].plot([], [], color=colour, marker="s", ls="", label=name)
    shapes = (("B", "^", "grey"), ("S", "o", "grey"), ("paper", "s", "none"))
    for name, mark, fill in shapes:
        axes[0].plot([], [], color="grey", marker=mark, ls="", mfc=fill, label=name)
    axes[0].legend(fontsize=7)
    save_figure(figure, stem)


def main(argv: list[str] | None = None) -> int:
    """Collect and draw; bad input ends with one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="--out of table1.py")
    parser.add_argument("--own", action="append", default=[], help="NAME=IMAGES=FOLDER")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="without a suffix")
    args = parser.parse_args(argv)
    own = {}
    for word in args.own:
        name, _, rest = word.partition("=")
        images, _, folder = rest.partition("=")
        if not (images.isdigit() and folder):
            parser.error(f"--own={word!r} is not NAME=IMAGES=FOLDER")
        own[name] = (int(images), Path(folder))
    for folder in filter(None, [args.results, *(f for _, f in own.values())]):
        if not (folder / "cells").is_dir():
            parser.error(f"{folder} is not an --out of table1.py: it has no cells")
    try:
        rows = points(args.results, own)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_rows(args.out.with_suffix(".csv"), HEADER, rows)
    draw(rows, args.out)
    print(f"written: {args.out}.png, .pdf and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
