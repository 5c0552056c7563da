"""Writes NAME.ipynb from NAME.py (jupytext's percent format), outputs stripped.

    python notebooks/pair.py          write all that differ
    python notebooks/pair.py --check  only say which differ, exit status 1 if any

`jupytext --sync` gives the same cells; this one needs nothing installed. Lines that
start with '# !' or '# %' are shell and notebook commands, comments to Python.
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells(text: str) -> list[tuple[str, list[str]]]:
    """[('code' or 'markdown', lines)] of a percent script; its header is left out."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            found[-1][1].append(line)
    return [(kind, _body(kind, lines)) for kind, lines in found]


def _body(kind: str, lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    if kind == "markdown":
        return [line.removeprefix("#").removeprefix(" ") for line in lines]
    return [line[2:] if line.startswith(("# !", "# %")) else line for line in lines]


def notebook(text: str) -> dict:
    """The notebook (format 4.4) of a percent script."""
    made = []
    for kind, lines in cells(text):
        source = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cell = {"cell_type": kind, "metadata": {}, "source": source}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def main() -> int:
    """Write or check every pair."""
    different = []
    for path in sorted(FOLDER.glob("[0-9]*.py")):
        wanted = json.dumps(notebook(path.read_text()), indent=1) + "\n"
        paired = path.with_suffix(".ipynb")
        if not paired.is_file() or paired.read_text() != wanted:
            different.append(paired.name)
            if "--check" not in sys.argv:
                paired.write_text(wanted)
    print(f"different: {', '.join(different) or 'none'}")
    return int("--check" in sys.argv and bool(different))


if __name__ == "__main__":
    sys.exit(main())
