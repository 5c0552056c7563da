"""The report: one file, no network, what it says; and its charts' arithmetic."""

import re
import shutil
import subprocess
import sys
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

    VOID = ("meta", "img", "br")

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
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100  # also between charts
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset"):
            target = attributes.get(key, "#")
            assert target.startswith("data:image/png;base64,") or (
                target == "#" or target.removeprefix("#") in ids
            )
        clip = re.fullmatch(r"url\(#(.*)\)", attributes.get("clip-path", ""))
        assert not clip or clip[1] in ids
    assert not re.search(r"https?:|url\([^#]|@import", text)
    assert len(text) < 500_000
    # 16 charts less two of timing.jsonl, which the sample lacks, and the centers, which
    # Sinkhorn-Knopp never moves.
    assert names.count("img") == 3 and names.count("svg") == 13
    words = " ".join(page.text)
    for shown in ("160 of 160", "a <run>", "dead prototypes", "few <b>", "0.10.2"):
        assert shown in words
    assert "over: steps 5 to 14" in words and "(the built-in phantom)" in words


def test_a_run_that_just_began_and_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        main([str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    assert "No alarm so far" in report(tmp_path)


def points(svg, style=f"stroke: {curves.COLOURS[0]}"):
    """[n, 2] of the first line drawn in a style, in units of the viewBox."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*fill: none; {style}', svg)
    return np.array(re.findall(r"[ML] (\S+) (\S+)", paths[0]), float)


def test_chart_points_lie_where_the_numbers_say():
    svg = curves.chart("t", [("a", [0, 50, 100], [1.0, 10.0, 100.0])], log=True)
    xy = points(svg)
    assert xy[1] == pytest.approx((xy[0] + xy[2]) / 2, abs=0.1)
    assert (np.diff(xy[:, 0]) > 0).all() and (np.diff(xy[:, 1]) < 0).all()
    assert ">10</text>" in svg and ">100</text>" in svg
    assert curves.chart("t", [("a", [1], [0.0])], log=True) == ""
    assert curves.chart("t", []) == ""
    assert "nan" not in curves.chart("t", [("a", [1, 2], [float("nan"), 3.0])])


def test_a_level_line_and_names_that_need_escaping():
    lines = [("a <b>", [1, 2], [0.0, 1.0]), ("c", [1, 2], [3.0, 2.0])]
    svg = curves.chart("t & u", lines, level=("ln K", 5.0))
    assert 'aria-label="t &amp; u"' in svg and ">t &amp; u</text>" in svg
    assert ">a &lt;b&gt;</text>" in svg and ">ln K</text>" in svg
    level = points(svg, "stroke-dasharray")
    assert np.ptp(level[:, 1]) == 0 and level[0, 1] < points(svg).min()
    assert curves.chart("t & u", lines, level=("ln K", 5.0)) == svg  # same bytes


def test_charts_need_no_display_and_leave_matplotlib_as_it_was():
    code = """if True:
        import sys
        import matplotlib
        from ultradino_jax.health import curves

        def settings():  # to ask for the backend would choose one
            names = set(matplotlib.rcParams) - {"backend"}
            return {name: matplotlib.rcParams[name] for name in names}

        before = settings()
        assert curves.chart("t", [("a", [1, 2], [3.0, 4.0])])
        assert settings() == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HEALTHY.parent.parent)


def test_thinning_keeps_the_mean():
    y = np.random.default_rng(0).normal(size=5000)
    x, thin = curves.thin(range(5000), y)
    assert len(x) == len(thin) == 500 and np.mean(thin) == pytest.approx(np.mean(y))
    x, thin = curves.thin(range(3), [1.0, 2.0, 4.0])
    assert x.tolist() == [0, 1, 2] and thin.tolist() == [1, 2, 4]
