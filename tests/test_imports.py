"""Who may import whom: read from the source text, also inside functions."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = runpy.run_path(str(ROOT / "docs" / "imports.py"), run_name="imports")
P = HOUSE["PACKAGE"]
FILES = {n: p for n, p in HOUSE["files"]().items() if n.startswith(P)}
GRAPH = HOUSE["file_graph"]()


def under(*places):
    """Files in packages, or the root modules of these names."""
    roots = tuple(f"{P}.{place}" for place in places)
    return [
        n for n in FILES if n in roots or n.startswith(tuple(r + "." for r in roots))
    ]


def offences(names, forbidden):
    found = []
    for name in names:
        for other in HOUSE["imported"](FILES[name]):
            if any(other == f or other.startswith(f + ".") for f in forbidden):
                found.append(f"{name} imports {other}")
    return found


def project(*places):
    return [f"{P}.{place}" for place in places]


ROOMS = HOUSE["room_graph"](GRAPH)
ALL_ROOMS = project(*(p.name for p in (ROOT / P).iterdir() if p.is_dir()))
RULES = {
    "data never imports jax: its workers are spawned": (
        under("data"),
        ["jax", "flax", "optax", "orbax", *(r for r in ALL_ROOMS if r != f"{P}.data")],
    ),
    "models import nothing of the project": (
        under("models"),
        [f"{P}.{room}" for room in ROOMS if room != "models"],
    ),
    "pure functions import no project module": (
        under("pretraining.losses", "schedules", "tree", "jsonl"),
        [P],
    ),
    "evaluators know nothing of training and of exports": (
        under("evaluators"),
        project("run", "pretraining", "exports", "health"),
    ),
    "weights come in without evaluators or exports": (
        under("weights"),
        project("evaluators", "exports", "run", "pretraining", "health"),
    ),
    "health looks at a run from outside": (under("health"), project("run")),
    "exports know nothing of training": (
        under("exports"),
        project("run", "pretraining", "health"),
    ),
    "the science does not see files, configs or loops": (
        under("pretraining", "optimizer", "schedules", "sharding"),
        ["ml_collections", *project("run", "checkpoint", "health")],
    ),
    "no telemetry, no network": (
        FILES,
        ["requests", "urllib.request", "http.client", "socket", "wandb", "mlflow"],
    ),
    "torch only where weights are converted": (
        [n for n in FILES if n not in under("weights", "exports", "export")],
        ["torch", "transformers"],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_import_direction(rule):
    names, forbidden = RULES[rule]
    assert names and forbidden
    assert not offences(names, forbidden)


def test_configs_import_only_ml_collections_and_each_other():
    for path in (ROOT / "configs").glob("*.py"):
        roots = {name.split(".")[0] for name in HOUSE["imported"](path)}
        assert roots <= {"ml_collections", "configs"}, path


def test_no_circle_of_files_or_rooms():
    assert not HOUSE["circle"](GRAPH)
    assert not HOUSE["circle"](ROOMS)


def test_every_root_module_is_a_room_of_its_own():
    there = {path.stem for path in (ROOT / P).iterdir() if path.name[0].isalpha()}
    assert set(ROOMS) == there | {"main", "eval", P}


def test_seven_floors_as_drawn():
    assert max(HOUSE["floors"](ROOMS).values()) <= 7
    drawn = (ROOT / "docs" / "house.md").read_text()
    assert drawn == HOUSE["page"](), "python docs/imports.py draws it anew"


def test_the_graph_sees_what_python_loads():
    """Top-level imports found here are the modules a fresh process has loaded."""
    code = f"import sys, {P}.data.prepare.build; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    loaded = {name for name in done.stdout.split() if name in FILES}
    seen = HOUSE["reachable"](GRAPH, f"{P}.data.prepare.build") | {
        f"{P}.data.prepare.build"
    }
    packages = {name for name in FILES if FILES[name].stem == "__init__"}
    assert len(loaded) > 5 and loaded - packages <= seen


def test_circles_and_floors_of_written_graphs(tmp_path):
    chain = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert HOUSE["floors"](chain) == {"a": 3, "b": 2, "c": 1}
    assert not HOUSE["circle"](chain)
    assert set(HOUSE["circle"]({**chain, "c": {"a"}})) >= {"a", "c"}
    hidden = tmp_path / "hidden.py"
    hidden.write_text("def f():\n    from x.y import z\n    import w.v\n")
    assert HOUSE["imported"](hidden) == {"x.y", "x.y.z", "w.v"}
