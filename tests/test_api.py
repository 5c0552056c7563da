"""The public face: what it names, what it loads.

test_notebooks.py runs the examples of docs/api.md, on the runs of the notebooks.
"""

import ast
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import ultradino_jax

ROOT = Path(__file__).parent.parent
FACE = ROOT / "ultradino_jax" / "__init__.py"


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, ultradino_jax; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "ultradino_jax" in loaded
    heavy = {"jax", "jaxlib", "flax", "numpy", "matplotlib", "cv2", "tensorflow"}
    assert not loaded & (heavy | {"absl", "ml_collections", "tensorflow_datasets"})
    ours = [n for n in done.stdout.split() if n.startswith("ultradino_jax.")]
    assert not ours


def test_every_name_is_there_with_a_docstring_of_its_own():
    assert 12 <= len(ultradino_jax.__all__) <= 15
    assert set(ultradino_jax.__all__) <= set(dir(ultradino_jax))
    for name in ultradino_jax.__all__:
        thing = getattr(ultradino_jax, name)
        assert len(inspect.getdoc(thing) or "") > 60 or issubclass(thing, Exception)
        assert thing.__module__.startswith("ultradino_jax.")
        assert ultradino_jax.__dict__[name] is thing  # looked up once
    assert not hasattr(ultradino_jax, "embed_everything")


def test_editors_see_what_python_finds():
    """The imports for type checkers name the same objects as the table does."""
    tree = ast.parse(FACE.read_text())
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "ultradino_jax" in (node.module or "")
        for alias in node.names
    }
    table = {
        k: (f"ultradino_jax.{m}", n) for k, (m, n) in ultradino_jax._PLACES.items()
    }
    assert seen == table and sorted(seen) == ultradino_jax.__all__


def test_no_name_is_that_of_a_submodule():
    """`import ultradino_jax.embed` must not change what a public name means."""
    modules = {m.name for m in pkgutil.iter_modules(ultradino_jax.__path__)}
    assert "embed" in modules and not modules & set(ultradino_jax.__all__)


def test_every_name_is_documented():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in ultradino_jax.__all__:
        assert f">>> us.{name}(" in text or f"us.{name}" in text
