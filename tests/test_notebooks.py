"""The notebooks run, at smoke size, and their two files hold the same cells.

The examples of docs/api.md run last: they use what the notebooks left behind.
"""

import doctest
import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
# What each leaves behind, and a property of it.
MADE = {
    "1_quickstart": "runs/notebook/knn.json",
    "2_your_data": "runs/notebook_own/backbone/backbone.json",
    "3_classification": "runs/notebook_finetune/confusion.png",
    "4_segmentation": "runs/notebook_segmentation/overlays.png",
    "5_attention_export": "runs/notebook_hf/model.safetensors",
}


def as_script(notebook):
    """The percent script of a notebook, without jupytext's header."""
    parts = []
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown":
            parts.append(["# %% [markdown]", *(f"# {x}".rstrip() for x in lines)])
        else:
            parts.append(
                ["# %%", *(f"# {x}" if x[:1] in ("!", "%") else x for x in lines)]
            )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def test_every_notebook_is_expected():
    assert [path.stem for path in SCRIPTS] == list(MADE)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_pairs_hold_the_same_cells_and_no_output(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    header, _, body = path.read_text().partition("\n# ---\n")
    assert "formats: ipynb,py:percent" in header
    squeezed = [line for line in as_script(notebook).splitlines() if line]
    assert squeezed == [line for line in body.splitlines() if line]
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert "pip install" in "".join(code[0]["source"])  # it opens with the install


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """One folder for all: later notebooks use the run of the first."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs(path, workplace, one_device, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ULTRADINO_SMOKE", "1")
    runpy.run_path(str(path), run_name="notebook")
    from matplotlib import pyplot

    pyplot.close("all")
    assert (workplace / MADE[path.stem]).stat().st_size > 50


def test_the_examples_of_the_documentation(workplace, one_device, monkeypatch):
    """Example by example, in the folder where the notebooks ran."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("ULTRADINO_SMOKE", "1")
    if not (workplace / MADE["4_segmentation"]).exists():  # this test alone
        runpy.run_path(str(FOLDER / "4_segmentation.py"), run_name="notebook")
    text = (FOLDER.parent / "docs" / "api.md").read_text()
    example = doctest.DocTestParser().get_doctest(text, {}, "api.md", "api.md", 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
        example, out=said.append
    )
    assert result.attempted > 20 and not result.failed, "".join(said)
