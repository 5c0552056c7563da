"""Every config, fully resolved, is a committed file: a changed default shows there.

    python tests/test_configs.py

writes the files anew. Read the difference before you commit it.
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
# Each file of configs/ and the arguments that choose other values.
VARIANTS = {
    "continue_pretrain": [None],
    "fass": ["full", "n20", "10pct", "p4"],
    "fetal_planes": ["linear", "finetune", "knn", "logreg", "fewshot"],
    "jnu_ifm": ["p4", "full", "n20"],
    "pretrain_smoke": ["minutes", "seconds"],
    "pretrain_vitb": [None],
    "pretrain_vits": [None],
}
NAMES = [(name, argument) for name in VARIANTS for argument in VARIANTS[name]]


def get_config(name, argument):
    build = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    return build() if argument is None else build(argument)


def flat(config, prefix=""):
    """[(dotted key, value)] of all leaves."""
    found = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def resolved(name, argument):
    pairs = sorted(flat(get_config(name, argument)))
    return [f"{key} = {value!r}" for key, value in pairs]


def golden(name, argument):
    return GOLDEN / (f"{name}.txt" if argument is None else f"{name}-{argument}.txt")


def test_every_config_and_nothing_else_has_its_file():
    files = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert files == set(VARIANTS)
    assert set(GOLDEN.glob("*")) == {golden(*which) for which in NAMES}


@pytest.mark.parametrize(("name", "argument"), NAMES)
def test_a_changed_value_shows(name, argument):
    path = golden(name, argument)
    committed = path.read_text().splitlines()
    now = resolved(name, argument)
    lines = difflib.unified_diff(committed, now, path.name, "now", n=0, lineterm="")
    difference = "\n".join(lines)
    hint = "if it is meant: python tests/test_configs.py"
    assert not difference, f"\n{difference}\n{hint}"


@pytest.mark.parametrize("name", VARIANTS)
def test_the_default_argument_is_the_first(name):
    if VARIANTS[name] != [None]:
        assert flat(get_config(name, None)) == flat(get_config(name, VARIANTS[name][0]))


def test_no_key_is_dead():
    """Its last part is an attribute, argument or string somewhere in the program.

    A key that shares its name with something else is not seen to be dead; one that
    nobody could read is. Tables of dotted keys, as of limits, do not read them.
    """
    words = set()
    for path in [*(ROOT / "ultradino_jax").rglob("*.py"), ROOT / "main.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.arg | ast.keyword):
                words.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
    keys = {key for which in NAMES for key, _ in flat(get_config(*which))}
    dead = {key for key in keys if key.split(".")[-1].removesuffix("_end") not in words}
    assert len(keys) > 100 and not dead


def main():
    """Write all files."""
    sys.path.insert(0, str(ROOT))
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for which in NAMES:
        golden(*which).write_text("\n".join(resolved(*which)) + "\n")


if __name__ == "__main__":
    main()
