"""Line charts as inline SVG, drawn by matplotlib without display or pyplot."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0e7490")
MOST_POINTS = 500

# Text stays text, in the page's font; the same chart is the same bytes every time.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 7.5,
    "text.color": "#111827",
    "axes.edgecolor": "#9ca3af",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

Series = tuple[str, Sequence[float], Sequence[float]]


def thin(x: ArrayLike, y: ArrayLike, most: int = MOST_POINTS):
    """At most `most` points: the mean of each run of neighbours."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    runs = range(0, len(x), max(1, math.ceil(len(x) / most)))
    if len(runs) == len(x):
        return x, y
    counts = np.diff([*runs, len(x)])
    return np.add.reduceat(x, runs) / counts, np.add.reduceat(y, runs) / counts


def _drawable(series: Sequence[Series], log: bool) -> list[tuple]:
    lines = []
    for name, x, y in series:
        at, value = np.asarray(x, float), np.asarray(y, float)
        kept = np.isfinite(value) & ((value > 0) | (not log))
        if kept.any():
            at, value = thin(at[kept], np.log10(value[kept]) if log else value[kept])
            lines.append((name, at, 10**value if log else value))
    return lines


def chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """An <svg> of lines (name, steps, values); '' when there is nothing to draw.

    title: also makes the chart's ids its own, so no two of a page may share it. log:
    the values on a logarithmic axis, those not above 0 left out. level: a dashed line
    with its name, e.g. ('ln K', 11.09).
    """
    lines = _drawable(series, log)
    if not lines:
        return ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.4, 2.3))
        axes = figure.add_axes((0.12, 0.11, 0.86, 0.72))
        for (name, x, y), ink in zip(lines, COLOURS, strict=False):
            dots = "o" if len(x) <= 40 else None
            axes.plot(x, y, color=ink, label=name, marker=dots, clip_on=False)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            within = high < 20 * low  # hardly a decade: powers of ten are too few
            locator = MaxNLocator(4) if within else LogLocator(numticks=5)
            axes.yaxis.set_major_locator(locator)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.ticklabel_format(axis="y", useOffset=False)
        if level:
            name, value = level
            axes.axhline(value, color="#6b7280", ls="--", lw=0.8, clip_on=False)
            axes.annotate(
                name, (1, value), xycoords=("axes fraction", "data"),
                xytext=(0, 2), textcoords="offset points", ha="right", color="#6b7280",
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.text(0.12, 0.945, title, weight="bold", size=8.5)
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=len(lines),
            frameon=False, labelcolor="linecolor", handlelength=0, handletextpad=0,
            columnspacing=1.2, borderpad=0.1,
        )  # fmt: skip
        for handle in legend.legend_handles:  # the names' colours say it
            if handle is not None:
                handle.set_visible(False)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata=NO_METADATA)
    return _inline(out.getvalue(), title)


def _inline(text: str, title: str) -> str:
    """The <svg> element alone, for a page that holds several: its ids made its own."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    own = re.sub(r"\W+", "-", title.lower()).strip("-")
    text = re.sub(r'\bid="', f'id="{own}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{own}-', text)
    text = re.sub(r"url\(#", f"url(#{own}-", text)
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
