"""results.json files of a sweep -> one table as Markdown, CSV and LaTeX."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from experiments.table1_rows import COLUMNS, NOTES, ROWS, Column, Row, note_text

RESULTS, REASON = "results.json", "not_run.txt"


@dataclass(frozen=True)
class Figure:
    """A cell's figures in percent; mean is None where there is none, `reason` why.

    background: mean Dice with the background in it, of segmentation only.
    """

    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    background: float | None = None
    runs: int = 0
    digest: str = ""
    reason: str = ""


def cell_folder(out: Path, row: Row, column: Column) -> Path:
    """Where a cell's evaluation writes."""
    return out / "cells" / row.name / column.name


def read_cell(out: Path, row: Row, column: Column) -> Figure:
    """The figures of a cell, or why there are none.

    Raises ValueError naming the file when its results are not of this row.
    """
    if column.name not in row.columns:
        return Figure(reason="does not apply")
    folder = cell_folder(out, row, column)
    path = folder / RESULTS
    if not path.is_file():
        note = folder / REASON
        return Figure(reason=note.read_text().strip() if note.is_file() else "not run")
    try:
        results = json.loads(path.read_text())
        entry = next(e for e in results["entries"].values() if e["row"] == row.run)
        summary = entry["summary"]
        figure = summary[column.metric]
    except (KeyError, StopIteration, ValueError) as error:
        raise ValueError(f"{path}: holds no {column.metric} of {row.run!r}") from error
    low, high = figure.get("interval", (None, None))
    return Figure(
        mean=_percent(figure["mean"]),
        std=_percent(figure["std"]),
        low=_percent(low),
        high=_percent(high),
        background=_percent(summary.get("dice", {}).get("mean")),
        runs=len(entry["runs"]),
        digest=results.get("checkpoint", {}).get("digest", "")[:12],
    )


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def collect(out: Path, facts: list[str]) -> str:
    """Write table1.md, .csv and .tex into `out`; returns the Markdown.

    facts: lines that say how the table was made.
    """
    figures = {
        (row.name, column.name): read_cell(out, row, column)
        for row in ROWS
        for column in COLUMNS
    }
    text = markdown(figures, facts)
    write_csv(out / "table1.csv", figures)
    (out / "table1.tex").write_text(latex(figures), encoding="utf-8")
    (out / "table1.md").write_text(text, encoding="utf-8")
    return text


def _shown(figure: Figure) -> str:
    """'74.24 ± 0.51 [73.10, 75.02]'."""
    text = f"{figure.mean:.2f}"
    if figure.std is not None:
        text += f" ± {figure.std:.2f}"
    if figure.low is not None:
        text += f" [{figure.low:.1f}, {figure.high:.1f}]"
    return text


def markdown(figures: dict, facts: list[str]) -> str:
    """The table, what each mark means, and what was not run."""
    head, missing = ["system"], {}
    for column in COLUMNS:
        head += [column.title, "paper"]
    lines = ["# Table 1", "", *facts, ""]
    lines += [_line(head), _line(["---"] * len(head))]
    for row in ROWS:
        cells = [f"{row.title} ({', '.join(row.notes)})" if row.notes else row.title]
        for column in COLUMNS:
            figure = figures[row.name, column.name]
            paper = row.paper.get(column.name)
            applies = column.name in row.columns
            if applies and figure.mean is None:
                missing.setdefault((row.title, figure.reason), []).append(column.title)
            cells.append("-" if figure.mean is None else _shown(figure))
            cells.append("" if paper is None else f"{paper:.2f}")
        lines.append(_line(cells))
    lines += ["", "Percent: mean ± standard deviation over seeds or draws, and the"]
    lines += ["95 % interval of resampled test patients. Dice of the structures for"]
    lines += ["JNU-IFM and FASS, macro F1 for FETAL_PLANES_DB. Empty: not applicable"]
    lines += ["or not known.", "", "Mean Dice with the background:", ""]
    segmentation = [c for c in COLUMNS if c.metric != "macro_f1"]
    lines += [_line(["system", *(c.title for c in segmentation)])]
    lines += [_line(["---"] * (1 + len(segmentation)))]
    for row in ROWS:
        values = [figures[row.name, c.name].background for c in segmentation]
        if any(v is not None for v in values):
            shown = ["-" if v is None else f"{v:.2f}" for v in values]
            lines.append(_line([row.title, *shown]))
    if missing:
        lines += ["", "Not run:", ""]
        lines += [
            f"- {title}, {', '.join(columns)}: {reason}"
            for (title, reason), columns in missing.items()
        ]
    used = [k for k in NOTES if k == "*" or any(k in row.notes for row in ROWS)]
    lines += ["", "Known deviations:", ""]
    lines += [f"- ({key}) {NOTES[key]}" for key in used]
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def write_csv(path: Path, figures: dict) -> None:
    """One line per row and column, empty where there is no figure."""
    header = "row,column,metric,mean,std,low,high,runs,paper,difference,"
    header += "with_background,digest,reason,deviations"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        for row in ROWS:
            for column in COLUMNS:
                f = figures[row.name, column.name]
                paper = row.paper.get(column.name)
                difference = None if f.mean is None or paper is None else f.mean - paper
                numbers = [f.mean, f.std, f.low, f.high]
                line = [row.name, column.name, column.metric]
                line += [_number(x) for x in numbers]
                line += [f.runs or "", _number(paper)]
                line += [_number(difference)]
                line += [_number(f.background), f.digest, f.reason]
                writer.writerow([*line, " ".join(note_text(row))])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def latex(figures: dict) -> str:
    """A tabular of mean and standard deviation, the paper's value in brackets."""
    lines = [
        "% Written by experiments/table1.py; the paper's figures in brackets.",
        r"\begin{tabular}{l" + "c" * len(COLUMNS) + "}",
        r"\hline",
        _tex(["System", *(column.title for column in COLUMNS)]),
        r"\hline",
    ]
    for row in ROWS:
        cells = [row.title]
        for column in COLUMNS:
            f, paper = figures[row.name, column.name], row.paper.get(column.name)
            text = "--" if f.mean is None else f"{f.mean:.2f}"
            if f.std is not None:
                text += rf" $\pm$ {f.std:.2f}"
            cells.append(text if paper is None else f"{text} [{paper:.2f}]")
        lines.append(_tex(cells))
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def _tex(cells) -> str:
    return " & ".join(c.replace("_", r"\_").replace("%", r"\%") for c in cells) + r" \\"
