"""One HTML page about a run: python -m ultradino_jax.report WORKDIR.

Written to WORKDIR/report.html. Everything is inside the file; it loads nothing from the
network and runs no script. Works while the run goes on.
"""

import argparse
import base64
import time
from html import escape
from pathlib import Path
from typing import Any

from ultradino_jax.cli import command
from ultradino_jax.errors import damaged
from ultradino_jax.health.curves import chart
from ultradino_jax.jsonl import read_rows
from ultradino_jax.pretraining.terms import terms_in
from ultradino_jax.progress import format_duration
from ultradino_jax.whole import read_json, write_whole

# Charts of metrics.jsonl and so on: title, file, {legend: key}, options.
CHARTS: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
    ("Total loss", "metrics", {"total": "total"}, {}),
    (
        "Entropy, nats",
        "metrics",
        {
            "teacher": "teacher_entropy",
            "of its mean": "marginal_entropy",
            "student": "student_entropy",
        },
        {"level": ("ln K", "ln_k")},
    ),
    ("kNN accuracy", "health", {"teacher": "knn"}, {}),
    (
        "RankMe (effective rank)",
        "health",
        {"CLS": "rankme_cls", "mean patch": "rankme_patch"},
        {},
    ),
    (
        "Feature standard deviation (1: spread out)",
        "health",
        {"CLS": "std_cls", "mean patch": "std_patch"},
        {},
    ),
    (
        "Duplicates and prototypes in use",
        "health",
        {"duplicates": "duplicates", "prototypes": "prototypes_used"},
        {},
    ),
    (
        "Distance to the nearest image in the group",
        "metrics",
        {"student CLS": "neighbour_distance"},
        {"log": True},
    ),
    ("Gradient norm, before clipping", "metrics", "grad_norm/", {"log": True}),
    ("Update norm of a step", "metrics", "update_norm/", {"log": True}),
    ("Distance of teacher and student", "metrics", "ema_distance/", {"log": True}),
    ("Norm of the centers", "metrics", "center_norm/", {}),
    ("Learning rate", "metrics", {"lr": "lr", "last layer": "last_layer_lr"}, {}),
    ("Teacher temperature", "metrics", {"temperature": "teacher_temp"}, {}),
    ("Images per second", "timing", {"images/s": "images_per_second"}, {}),
    ("Share of the time waiting for data", "timing", {"waiting": "data_wait"}, {}),
)

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;color:#1f2937;background:#f3f4f6;margin:0}
main{max-width:1400px;margin:auto;padding:20px}
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:28px 0 10px}
.muted{color:#6b7280}.grid-of{display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(400px,1fr))}
.card{background:#fff;border:1px solid #e5e7eb;border-radius:8px;padding:10px 12px}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.tiles b{display:block;font-size:19px}.alarm{border-left:5px solid #dc2626}
.over{border-left:5px solid #9ca3af}.fine{border-left:5px solid #059669}
svg{width:100%;height:auto;display:block}
svg text{font-family:system-ui,sans-serif!important}
table{border-collapse:collapse;width:100%}td{padding:2px 10px 2px 0;vertical-align:top;
border-bottom:1px solid #f3f4f6;overflow-wrap:anywhere}td:first-child{color:#6b7280}
img{max-width:100%;image-rendering:pixelated;display:block}
details{margin:6px 0}summary{cursor:pointer}
"""


def table(values: dict) -> str:
    """Two columns; nested keys are joined with dots."""
    rows = []

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            rows.append(f"<tr><td>{escape(prefix)}</td><td>{escape(str(value))}</td>")

    walk("", values)
    return f"<table>{''.join(rows)}</table>"


def curves(rows: dict[str, list[dict]], weights) -> str:
    """All charts for which there are numbers; weights: names of the loss weights."""
    cards = []
    keys = dict.fromkeys(key for row in rows["metrics"] for key in row)
    terms = {name: name for name in terms_in(keys, weights)}
    first: tuple[str, str, Any, dict] = (
        "Loss terms, as optimised",
        "metrics",
        terms,
        {},
    )
    for title, source, wanted, options in (first, *CHARTS):
        have, names = rows[source], wanted
        if isinstance(wanted, str):  # all keys that begin with it
            keys = dict.fromkeys(k for row in have for k in row if k.startswith(wanted))
            names = {key.removeprefix(wanted): key for key in keys}
        options = dict(options)
        if "level" in options:
            name, key = options.pop("level")
            values = [row[key] for row in have if key in row]
            options |= {"level": (name, values[-1])} if values else {}
        series = []
        for legend, key in names.items():
            points = [(r["step"] + 1, r[key]) for r in have if r.get(key) is not None]
            shown = any(value for _, value in points) or not isinstance(wanted, str)
            if points and shown:  # no chart of centers that Sinkhorn-Knopp never moves
                series.append((legend, *zip(*points, strict=True)))
        drawn = chart(title, series, **options)
        if drawn:
            cards.append(f'<div class="card">{drawn}</div>')
    return f'<div class="grid-of">{"".join(cards)}</div>'


def alarms(events: list[dict]) -> str:
    """Cards: alarms that are on, then those that were."""
    on, over = {}, []
    for event in events:
        before = on.pop(event["alarm"], None)
        if event["on"]:
            on[event["alarm"]] = event
        elif before:
            over.append((before, event["step"]))
    if not on and not over:
        return '<div class="card fine">No alarm so far.</div>'
    cards = [
        f'<div class="card alarm"><b>{escape(e["alarm"])}</b> since step {e["since"]}: '
        f"{escape(e['seen'])}.<br>Try: {escape(e['advice'])}.</div>"
        for e in on.values()
    ]
    cards += [
        f'<div class="card over"><b>{escape(e["alarm"])}</b>, over: steps {e["since"]} '
        f"to {end}: {escape(e['seen'])}.</div>"
        for e, end in over
    ]
    return "".join(f'<div style="margin-bottom:8px">{card}</div>' for card in cards)


def tiles(workdir: Path, rows: dict, facts: dict) -> str:
    """The numbers one looks for first."""
    metrics, timing, health = rows["metrics"], rows["timing"], rows["health"]
    shown = {}
    if metrics:
        done, total = metrics[-1]["step"] + 1, facts.get("total_steps")
        shown["steps"] = f"{done} of {total}" if total else str(done)
        if timing and total:
            left = (total - done) * timing[-1]["seconds_per_step"]
            shown["time left"] = format_duration(left) if done < total else "done"
        finite = [r for r in metrics if "total" in r]
        if finite:
            shown["total loss"] = f"{finite[-1]['total']:.3f}"
    if health:
        best = max(health, key=lambda r: r["knn"])
        shown["kNN"] = f"{100 * health[-1]['knn']:.1f} %"
        shown["best kNN"] = f"{100 * best['knn']:.1f} % at {best['step'] + 1}"
        last = health[-1]
        shown["RankMe, CLS"] = f"{last['rankme_cls']:.1f} of {last['dimensions']:.0f}"
    if timing:
        last = timing[-1]
        shown["images per second"] = f"{last['images_per_second']:.1f}"
        shown["waiting for data"] = f"{100 * last['data_wait']:.0f} %"
        if "mfu" in last:
            shown["MFU"] = f"{100 * last['mfu']:.1f} %"
    shown["skipped steps"] = str(len(read_rows(workdir / "skipped.jsonl")))
    shown["unreadable images"] = str(len(read_rows(workdir / "bad_images.jsonl")))
    return "".join(
        f'<div class="card"><span class="muted">{k}</span><b>{escape(v)}</b></div>'
        for k, v in shown.items()
    )


def pictures(workdir: Path) -> str:
    """The first crops, the newest attention panel, the earlier ones folded away."""
    parts = []
    crops = sorted((workdir / "panels").glob("crops_*.png"))
    panels = sorted((workdir / "panels").glob("attention_*.png"))

    def figure(path, text):
        data = base64.b64encode(path.read_bytes()).decode()
        step = int(path.stem.split("_")[-1])
        return (
            f'<div class="card"><p class="muted">{text}, step {step}</p>'
            f'<img alt="{text}" src="data:image/png;base64,{data}"></div>'
        )

    if crops:
        parts.append(figure(crops[0], "global crops with masks, local crops"))
    legend = "image, attention of CLS, PCA of patch tokens"
    parts += [figure(path, legend) for path in panels[-1:]]
    if panels[:-1]:
        earlier = "".join(figure(path, legend) for path in panels[-9:-1])
        parts.append(f"<details><summary>Earlier panels</summary>{earlier}</details>")
    return f'<div class="grid-of">{"".join(parts)}</div>' if parts else ""


def report(workdir: str | Path) -> str:
    """The page as text.

    Raises FileNotFoundError when the folder holds no run, UserError when what it holds
    is damaged.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{str(workdir)!r} holds no run (no config.json)")
    with damaged(workdir):
        return _page(workdir)


def _page(workdir: Path) -> str:
    config, facts, versions = (
        read_json(path) if (path := workdir / f"{name}.json").is_file() else {}
        for name in ("config", "run", "versions")
    )
    rows = {
        name: read_rows(workdir / f"{name}.jsonl")
        for name in ("metrics", "timing", "health")
    }
    data = {**facts, **config.get("data", {})}
    if not data.get("root"):
        data["root"] = "(the built-in phantom)"
    sections = {
        "Alarms": alarms(read_rows(workdir / "alarms.jsonl")),
        "Curves": curves(rows, config.get("loss", {})),
        "Panels": pictures(workdir),
        "Data": f'<div class="card">{table(data)}</div>',
        "Environment": f'<div class="card">{table(versions)}</div>',
        "Config": (
            '<div class="card"><details><summary>All values</summary>'
            f"{table(config)}</details></div>"
        ),
    }
    body = "".join(f"<h2>{name}</h2>{html}" for name, html in sections.items() if html)
    written = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(workdir.name)}</title><style>{STYLE}</style></head><body>"
        f"<main><h1>{escape(workdir.name)}</h1>"
        f"<p class='muted'>Written {written}</p>"
        f"<div class='tiles'>{tiles(workdir, rows, facts)}</div>"
        f"{body}</main></body></html>\n"
    )


def write_report(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, also of one that goes on, and return its path.

    workdir: of `main.py`. out: WORKDIR/report.html when left out. Raises
    FileNotFoundError when the folder holds no run.
    """
    out = Path(workdir) / "report.html" if out is None else Path(out)
    write_whole(out, report(workdir))
    return out


def main(argv=None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ultradino_jax.report", description="Write a run's HTML report."
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path, help="default WORKDIR/report.html")
    args = parser.parse_args(argv)
    print(f"report: {write_report(args.workdir, args.out)}")


if __name__ == "__main__":
    command(main)
