"""The report: one file, no network, what it says; and its charts' arithmetic."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ultradino_jax.health import curves
from ultradino_jax.health.panels import png
from ultradino_jax.report import main, report

HEALTHY = Path(__file__).parent / "healthy_run"


class Page(HTMLParser):
    """Tags with their attributes, and whether every one is closed."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID or tag in ("tr",):
            return
        while self.open and self.open[-1] == "tr":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path):
    workdir = tmp_path / "a <run>"
    shutil.copytree(HEALTHY, workdir)
    (workdir / "config.json").write_text(
        '{"data": {"root": ""}, "loss": {"koleo_weight": 0.1}, "seed": 0}'
    )
    (workdir / "run.json").write_text('{"images": 1920, "total_steps": 160}')
    (workdir / "versions.json").write_text('{"jax": "0.10.2"}')
    (workdir / "alarms.jsonl").write_text(
        '{"step": 9, "alarm": "data starvation", "on": true, "since": 5, "seen": "s", '
        '"advice": "a"}\n{"step": 14, "alarm": "data starvation", "on": false, '
        '"since": 5, "seen": "s", "advice": "a"}\n{"step": 20, "alarm": "dead '
        'prototypes", "on": true, "since": 20, "seen": "few <b>", "advice": "more"}\n'
    )
    (workdir / "panels").mkdir()
    picture = png(np.zeros((8, 8, 3), np.uint8))
    for name in ("crops_00000001", "attention_00000040", "attention_00000080"):
        (workdir / "panels" / f"{name}.png").write_bytes(picture)
    return workdir


def test_the_page_is_whole_and_loads_nothing(run, capsys):
    main([str(run)])
    assert "report.html" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names and "iframe" not in names
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(key, "data:").startswith(
                "data:image/png;base64,"
            ) or (key not in attributes)
    assert not re.search(r"https?:|url\(|@import", text)
    # 16 charts less two of timing.jsonl, which the sample lacks, and the centers, which
    # Sinkhorn-Knopp never moves.
    assert names.count("img") == 3 and names.count("svg") == 13
    words = " ".join(page.text)
    for shown in ("160 of 160", "a <run>", "dead prototypes", "few <b>", "0.10.2"):
        assert shown in words
    assert "over: steps 5 to 14" in words and "(the built-in phantom)" in words


def test_a_run_that_just_began_and_a_folder_that_is_none(tmp_path):
    with pytest.raises(SystemExit, match="error: .* holds no run"):
        main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    assert "No alarm so far" in report(tmp_path)


def test_chart_points_lie_where_the_numbers_say():
    svg = curves.chart("t", [("a", [0, 50, 100], [1.0, 10.0, 100.0])], log=True)
    points = re.search(r'points="([^"]*)"', svg)
    xy = np.array([p.split(",") for p in points[1].split()], float)
    assert xy[1] == pytest.approx((xy[0] + xy[2]) / 2, abs=0.1)
    assert (np.diff(xy[:, 0]) > 0).all() and (np.diff(xy[:, 1]) < 0).all()
    assert curves.chart("t", [("a", [1], [0.0])], log=True) == ""
    assert curves.chart("t", []) == ""
    assert "nan" not in curves.chart("t", [("a", [1, 2], [float("nan"), 3.0])])


def test_ticks_are_round_and_thinning_keeps_the_mean():
    assert curves.ticks(0, 1) == pytest.approx([0, 0.5, 1])
    assert curves.ticks(0.13, 0.9) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    y = np.random.default_rng(0).normal(size=5000).tolist()
    x, thin = curves.thin(list(range(5000)), y)
    assert len(x) == 500 and np.mean(thin) == pytest.approx(np.mean(y))
    assert curves.number(20000) == "20k" and curves.number(0.0005) == "5e-4"
