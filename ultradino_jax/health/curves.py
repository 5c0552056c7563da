"""Line charts as SVG text, without any library: small, sharp, no fonts embedded."""

import math
from collections.abc import Sequence
from html import escape

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0e7490")
WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 34, 26
MOST_POINTS = 500

Series = tuple[str, Sequence[float], Sequence[float]]


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS):
    """At most about `most` points: the mean of each run of neighbours."""
    size = -(-len(x) // most)
    if size <= 1:
        return list(x), list(y)
    runs = [slice(i, i + size) for i in range(0, len(x), size)]
    return (
        [sum(x[r]) / len(x[r]) for r in runs],
        [sum(y[r]) / len(y[r]) for r in runs],
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's text: 20000 -> '20k', 0.0005 -> '5e-4'."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        digits, exponent = f"{value:.0e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{value:.6g}"


def _span(values, log):
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = 0.5 if log else max(abs(low) * 0.1, 1e-6)
        return low - pad, high + pad
    pad = 0.04 * (high - low)
    return low - pad, high + pad


def chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """An <svg> of lines (name, steps, values); '' when there is nothing to draw.

    log: the values on a logarithmic axis, those not above 0 left out. level: a dashed
    line with its name, e.g. ('ln K', 11.09).
    """
    lines = []
    for name, x, y in series:
        pairs = [
            (a, math.log10(b) if log else b)
            for a, b in zip(x, y, strict=True)
            if math.isfinite(b) and (b > 0 or not log)
        ]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            lines.append((name, *thin(xs, ys)))
    if not lines:
        return ""
    x0, x1 = _span([v for _, x, _ in lines for v in x], False)
    heights = [v for _, _, y in lines for v in y] + ([level[1]] if level else [])
    y0, y1 = _span(heights, log)

    def px(v):
        return LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(v):
        return HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{LEFT}" y="12" class="title">{escape(title)}</text>',
    ]
    marks = [v for v in ticks(y0, y1) if not log or abs(v - round(v)) < 1e-9]
    if log and len(marks) < 2:  # less than two decades: the values at the ends
        marks = [min(heights), max(heights)]
    for v in marks:
        text = number(float(f"{10**v:.2g}") if log else float(f"{v:.6g}"))
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(v):.1f}" '
            f'y2="{py(v):.1f}" class="grid"/><text x="{LEFT - 6}" '
            f'y="{py(v) + 3:.1f}" class="tick end">{text}</text>'
        )
    for v in ticks(x0, x1, 5):
        if v >= 0:
            parts.append(
                f'<text x="{px(v):.1f}" y="{HEIGHT - 8}" class="tick mid">'
                f"{number(v)}</text>"
            )
    if level:
        y = py(level[1])
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'class="level"/><text x="{WIDTH - RIGHT}" y="{y - 4:.1f}" '
            f'class="tick end">{escape(level[0])}</text>'
        )
    offset = LEFT
    for (name, x, y), ink in zip(lines, COLOURS, strict=False):
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{ink}" '
            'stroke-width="1.6" stroke-linejoin="round"/>'
        )
        if len(x) <= 40:
            parts += [
                f'<circle cx="{px(a):.1f}" cy="{py(b):.1f}" r="2.2" fill="{ink}"/>'
                for a, b in zip(x, y, strict=True)
            ]
        parts.append(
            f'<text x="{offset}" y="27" class="tick" style="fill:{ink}">'
            f"{escape(name)}</text>"
        )
        offset += 14 + 5.6 * len(name)
    return "".join(parts) + "</svg>"
