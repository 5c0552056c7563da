"""What to look at before training: a contact sheet and a page of numbers."""

import html
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from ultradino_jax.data.cache import Shards, record_name
from ultradino_jax.data.formats.unreadable import REASONS
from ultradino_jax.whole import write_whole

_TILE, _COLUMNS, _TILES = 128, 10, 80


def contact_sheet(pictures: list[np.ndarray], columns: int = _COLUMNS) -> np.ndarray:
    """Grey pictures [H,W] -> one grey sheet [rows*128, columns*128], left to right."""
    rows = max(1, -(-len(pictures) // columns))
    sheet = np.zeros((rows * _TILE, columns * _TILE), np.uint8)
    for i, picture in enumerate(pictures):
        scale = (_TILE - 4) / max(picture.shape)
        height, width = (max(1, round(n * scale)) for n in picture.shape)
        small = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        top, left = i // columns * _TILE + 2, i % columns * _TILE + 2
        sheet[top : top + height, left : left + width] = small
    return sheet


def write_report(root: Path, manifest: dict) -> None:
    """Writes contact_sheet.png, text_like.jsonl and report.html into a cache.

    They hold pixels that the cache holds anyway, keyed ids and counts. The sheet shows
    records at even distances.
    """
    shards = Shards(root, manifest["shards"])
    picks = np.unique(np.linspace(0, max(len(shards) - 1, 0), _TILES).astype(int))
    pictures = [shards.pixels(int(i)) for i in picks] if len(shards) else []
    sheet = cv2.imencode(".png", contact_sheet(pictures))[1].tobytes()
    write_whole(root / "contact_sheet.png", sheet)
    sizes, patients, text_like = Counter(), set(), []
    for i in range(len(shards)):
        entry = shards.entry(i)
        sizes[f"{entry['width']}x{entry['height']}"] += 1
        patients.add(entry["patient"].tobytes())
        if entry["text_lines"]:
            lines = int(entry["text_lines"])
            text_like.append(json.dumps({"id": record_name(entry), "lines": lines}))
    write_whole(root / "text_like.jsonl", "".join(t + "\n" for t in text_like))
    page = _page(manifest, sizes, len(patients), len(text_like))
    write_whole(root / "report.html", page)


def _table(title: str, rows) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<h2>{title}</h2><table>{cells}</table>"


def _page(manifest: dict, sizes: Counter, patients: int, text_like: int) -> str:
    counts = manifest["counts"]
    dropped = [
        (what, reason, number, REASONS[reason])
        for what in ("skipped_inputs", "dropped_frames")
        for reason, number in counts[what].items()
    ]
    facts = [
        ("pictures kept", manifest["records"]),
        ("patients (or folders)", patients),
        ("inputs read", counts["inputs"].get("read", 0)),
        ("frames in them", counts["frames"].get("in_files", 0)),
        (
            "frames passed over by stride and cap",
            counts["frames"].get("not_sampled", 0),
        ),
        ("mean, standard deviation", f"{manifest['mean']}, {manifest['std']}"),
        ("bytes", sum(shard["bytes"] for shard in manifest["shards"])),
    ]
    warning = (
        f"<p><b>{text_like} pictures hold text-like marks</b> inside the ultrasound "
        "region: see text_like.jsonl. The detector misses small, faint and slanted "
        "text: none found does not mean none there. Look at the pictures.</p>"
    )
    return (
        "<!doctype html><meta charset=utf-8><title>prepared cache</title>"
        "<style>body{font:15px sans-serif;margin:2em}td{padding:.1em 1em .1em 0}"
        "img{max-width:100%}</style><h1>Prepared cache</h1>"
        + warning
        + _table("Counts", facts)
        + _table("Left out", dropped)
        + _table("Options", manifest["plan"]["options"].items())
        + _table("Most frequent sizes", sizes.most_common(20))
        + "<h2>Pictures at even distances</h2><img src=contact_sheet.png>\n"
    )
