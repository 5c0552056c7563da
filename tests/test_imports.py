"""Who may import whom: read from the source text, nothing is imported."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ultradino_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Full names of everything a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def offences(files, forbidden):
    found = []
    for path in files:
        for name in imported(path):
            if any(name == f or name.startswith(f + ".") for f in forbidden):
                found.append(f"{module(path)} imports {name}")
    return found


def under(folder):
    return [p for p in FILES if (PACKAGE / folder) in p.parents]


def named(*names):
    return [PACKAGE / f"{name}.py" for name in names]


P = "ultradino_jax"
RULES = {
    "data never imports jax: its workers are spawned": (
        under("data"),
        ["jax", "flax", "optax", f"{P}.models", f"{P}.run", f"{P}.evaluators"],
    ),
    "evaluators know nothing of training": (
        under("evaluators"),
        [f"{P}.{m}" for m in ("run", "pretraining")],
    ),
    "models own parameters and nothing else": (
        under("models"),
        [f"{P}.{m}" for m in ("data", "run", "pretraining", "evaluators", "weights")],
    ),
    "pure functions import no project module": (
        named("pretraining/losses", "schedules", "tree"),
        [P],
    ),
    "the science does not see files, configs or loops": (
        [*under("pretraining"), *named("optimizer", "schedules", "sharding")],
        ["ml_collections", f"{P}.run", f"{P}.checkpoint"],
    ),
    "no telemetry, no network": (
        FILES,
        ["requests", "urllib.request", "http.client", "socket", "wandb", "mlflow"],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_import_direction(rule):
    files, forbidden = RULES[rule]
    assert files
    assert not offences(files, forbidden)


def test_configs_import_only_ml_collections_and_each_other():
    for path in (ROOT / "configs").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= {"ml_collections", "configs"}, path


def test_torch_is_imported_only_where_weights_are_converted():
    allowed = [*under("weights"), *under("exports"), *named("export")]
    others = [p for p in FILES if p not in allowed]
    assert not offences(others, ["torch", "transformers"])
