"""The paper's table and figures: what is run, what is skipped, what is written."""

import ast
import csv
import functools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.upstream_weights import GRID, random_weights
from ultradino_jax.phantom import write_phantoms
from ultradino_jax.weights.files import write_safetensors
from ultradino_jax.weights.load import load_backbone

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@functools.cache
def script(name):
    """What a script defines, run from its file as a user does."""
    return SimpleNamespace(**runpy.run_path(str(EXPERIMENTS / f"{name}.py")))


TABLE = script("table1_rows")
ROWS, COLUMNS = TABLE.ROWS, TABLE.COLUMNS
BY_NAME = {row.name: row for row in ROWS}


def random_file(row, path):
    """Random weights of a row's family, written; returns them."""
    rng = np.random.default_rng(0)
    state = random_weights(row.name, row.channels, row.patch_size, rng)
    write_safetensors(path, state, {})
    return state


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results_of(row, metric, mean, **more):
    summary = {metric: {"mean": mean, "std": 0.01, "interval": [0.7, 0.8]}, **more}
    entry = {"row": row.run, "summary": summary, "runs": [{}, {}]}
    return {"entries": {"x": entry}, "checkpoint": {"digest": "0123456789abcdef"}}


def write_cell(out, row, column, results):
    folder = script("table1_collect").cell_folder(out, row, column)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def test_thirteen_systems_each_with_known_columns_and_notes():
    systems = {row.name.replace("vits16", "").replace("vitb16", "") for row in ROWS}
    assert sum(row.run == "random init" for row in ROWS) == 2  # one system, two sizes
    assert len(ROWS) == 14 and len(systems) < len(ROWS)
    for row in ROWS:
        assert set(row.paper) <= set(row.columns)
        assert set(row.notes) <= set(TABLE.NOTES)
    assert sum(len(row.columns) for row in ROWS) == 60


def test_array_tasks_share_the_cells_without_overlap(monkeypatch):
    def cells(index, number):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index + 3))
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "3")
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(number))
        args = script("table1").parse(["--data=x"])
        assert (args.task_index, args.num_tasks) == (index, number)
        return [
            (row.name, column.name) for row, column in script("table1").planned(args)
        ]

    shares = [cells(i, 7) for i in range(7)]
    together = [cell for share in shares for cell in share]
    assert len(together) == len(set(together)) == 60
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_inputs_everything_is_skipped_by_name(tmp_path, capsys):
    (tmp_path / "data" / "fass").mkdir(parents=True)
    flags = [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}"]
    flags += [f"--weights={tmp_path}", "--rows=nnunet,dinov2_vitb14"]
    flags += ["--columns=fass_n20,jnu_p4", "--num-tasks=2", "--task-index=0"]
    assert script("table1").main(flags) == 0
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "needs the data set jnu_ifm in" in text
    assert script("table1").main([*flags[:-1], "--task-index=1"]) == 0
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "nnU-Net 2-D, FASS n=20: needs --nnunet-bin" in text
    assert "needs weights named dinov2_vitb14_reg4_pretrain or dinov2_vitb14" in text
    with pytest.raises(SystemExit, match="2"):
        script("table1").main(["--data=x", "--rows=unet,resnet"])
    assert "'resnet' is unknown" in capsys.readouterr().err


def test_tables_hold_the_figures_and_the_papers(tmp_path):
    row = BY_NAME["ultradino_vitb16"]
    dice = {"dice": {"mean": 0.8125, "std": None}}
    write_cell(
        tmp_path, row, COLUMNS[0], results_of(row, "foreground_dice", 0.75, **dice)
    )
    write_cell(tmp_path, row, COLUMNS[4], results_of(row, "macro_f1", 0.9))
    text = script("table1_collect").collect(tmp_path, ["made by a test"])
    (line,) = (x for x in text.splitlines() if x.startswith("| UltraDINO B/16 (w)"))
    assert "| 75.00 ± 1.00 [70.0, 80.0] | 86.01 | - | 74.24 |" in line
    assert "| UltraDINO B/16 | 81.25 | - | - |" in text
    cells = {(r["row"], r["column"]): r for r in read_rows(tmp_path / "table1.csv")}
    assert len(cells) == len(ROWS) * len(COLUMNS)
    cell = cells["ultradino_vitb16", "jnu_p4"]
    assert float(cell["difference"]) == pytest.approx(75 - 86.01)
    assert cell["digest"] == "0123456789ab" and cell["runs"] == "2"
    assert cells["unet", "planes_linear"]["reason"] == "does not apply"
    assert cells["unet", "fass_full"]["reason"] == "not run"
    tex = (tmp_path / "table1.tex").read_text()
    assert r"UltraDINO B/16 & 75.00 $\pm$ 1.00 [86.01] & -- [74.24]" in tex
    assert all(x.count("&") == 5 for x in tex.splitlines() if "&" in x)


def test_a_cell_of_another_row_is_refused(tmp_path):
    unet = BY_NAME["unet"]
    wrong = results_of(BY_NAME["unetr"], "foreground_dice", 0.5)
    write_cell(tmp_path, unet, COLUMNS[0], wrong)
    with pytest.raises(ValueError, match=r"results\.json: holds no foreground_dice"):
        script("table1_collect").collect(tmp_path, [])


@pytest.mark.parametrize("row", [r for r in ROWS if r.weights], ids=lambda r: r.name)
def test_smoke_weights_are_read_as_their_family(row, tmp_path):
    path = tmp_path / "weights.safetensors"
    state = random_file(row, path)
    backbone = load_backbone(path)
    assert backbone.name.startswith(row.name.partition("_")[0])
    assert backbone.channels == row.channels
    assert backbone.image_size == GRID * row.patch_size
    incomplete = {k: x for k, x in state.items() if "blocks.3.norm2.bias" not in k}
    write_safetensors(path, incomplete, {})
    with pytest.raises(ValueError, match=r"missing: blocks\.3\.norm2\.bias"):
        load_backbone(path)


def test_one_smoke_cell_from_nothing_and_its_resume(
    tmp_path, one_device, monkeypatch, capsys
):
    # Smaller than the preset's, which keeps what is there; the other columns' are not
    # opened.
    write_phantoms("fetal_planes", tmp_path / "data/fetal_planes", patients=8, size=64)
    for name in ("fass", "jnu_ifm"):
        (tmp_path / "data" / name).mkdir()
    # What the command sets for its own process must not reach the other tests.
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    flags = ["--preset=phantom-smoke", f"--out={tmp_path}", "--columns=planes_linear"]
    assert script("table1").main([*flags, "--rows=ultradino_vits16"]) == 0
    assert "ultradino_vits16, planes_linear: done" in capsys.readouterr().out
    cells = {(r["row"], r["column"]): r for r in read_rows(tmp_path / "table1.csv")}
    cell = cells["ultradino_vits16", "planes_linear"]
    assert 0 <= float(cell["low"]) <= float(cell["high"]) <= 100
    path = tmp_path / "cells/ultradino_vits16/planes_linear/results.json"
    before = path.stat().st_mtime_ns
    assert script("table1").main([*flags, "--rows=ultradino_vits16"]) == 0
    assert path.stat().st_mtime_ns == before
    # Other weights under the same name are not answered with the old figures.
    (weights,) = tmp_path.rglob("ultradino_vits16*.safetensors")
    kept = weights.read_bytes()
    half = len(kept) // 2
    weights.write_bytes(kept[:half] + bytes(4000) + kept[half + 4000 :])
    assert script("table1").main([*flags, "--rows=ultradino_vits16"]) == 1
    assert "holds this cell with other settings (weights: " in capsys.readouterr().out
    weights.write_bytes(kept)
    # Nor is another checkpoint mixed in.
    record = path.with_name("cell.json")
    record.write_text(record.read_text().replace("ultradino_vits16", "another"))
    assert script("table1").main([*flags, "--rows=ultradino_vits16"]) == 1
    assert (
        "holds this cell with other settings (checkpoint: " in capsys.readouterr().out
    )


def test_the_smoke_names_a_trainer_that_nnunet_will_find():
    smoke = script("table1_smoke")
    options, variables = smoke.NNUNET_OPTIONS, smoke.NNUNET_VARIABLES
    (path,) = Path(variables["nnUNet_extTrainer"]).glob("*.py")
    classes = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)
    ]
    assert [c.name for c in classes] == [options["trainer"]]
    assert int(variables["nnUNet_n_proc_DA"]) > 0  # its planner takes it for threads


def test_pretraining_data_shows_the_papers_points(tmp_path):
    assert script("pretraining_data").main([f"--out={tmp_path / 'figure'}"]) == 0
    rows = read_rows(tmp_path / "figure.csv")
    assert {r["source"] for r in rows} == {"paper"}
    assert len(rows) == 8 * 5  # eight pretrained backbones, five columns
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"figure{suffix}").stat().st_size > 2000


@pytest.mark.parametrize("name", ["ultradino_vits16", "usfm_vitb16"])
def test_attention_maps_of_any_backbone(name, tmp_path, one_device):
    row = BY_NAME[name]
    path = tmp_path / "weights.safetensors"
    random_file(row, path)
    out = tmp_path / "attention"
    flags = [f"--checkpoint={path}", f"--out={out}", "--count=2", "--image-size=64"]
    assert script("attention_maps").main(flags) == 0
    rows = read_rows(f"{out}.csv")
    kinds = {"4 registers", "registers cut out"} if name[:1] == "u" else set()
    kinds = {"0 registers"} if name.startswith("usfm") else kinds
    assert {r["registers"] for r in rows} == kinds
    assert len(rows) == 2 * len(kinds) * (64 // 16) ** 2
    heads = np.array([[float(r[f"head{h}"]) for h in range(1, 5)] for r in rows])
    paid = heads.reshape(-1, 16, 4).sum(axis=1)  # the rest goes to CLS and registers
    assert (heads > 0).all() and (paid < 1).all() and (paid > 0.5).all()
    assert script("attention_maps").main([*flags[1:], "--checkpoint=nowhere"]) == 1


def test_few_labels_share_the_test_images_and_no_patient(tmp_path):
    phantom = {"phantom_seed": 0, "phantom_size": [40, 48], "phantom_settings": 3}
    (tmp_path / "config.json").write_text(json.dumps({"data": phantom}))
    out = tmp_path / "labels"
    script("data_scaling").write_label_sets(tmp_path, out, patients=14, draws=2)
    whole, *few = (read_rows(out / f"{name}.csv") for name in ("all", "few0", "few1"))
    assert len(whole) == 14 * 12

    def of(rows, split):
        return [r for r in rows if r["split"] == split]

    for rows in (whole, *few):
        patients = {s: {r["patient"] for r in of(rows, s)} for s in ("train", "test")}
        assert not patients["train"] & patients["test"]
    assert of(few[0], "test") == of(few[1], "test") == of(whole, "test")
    assert of(few[0], "train") != of(few[1], "train")
    for rows in few:
        labels = [r["label"] for r in of(rows, "train")]
        assert sorted(labels) == sorted(10 * list(set(labels))) and len(labels) == 60
        assert all((out / r["path"]).is_file() for r in of(rows, "train"))


def test_scaling_figure_and_table(tmp_path):
    rows = [
        (size, task, row, "macro_f1", value, 1.0, None, None, 2)
        for size, value in ((500, 40.0), (2000, 45.5))
        for task in script("data_scaling").TASKS
        for row in ("teacher", "random init")
    ]
    script("data_scaling").draw(rows, tmp_path / "scaling", 10)
    assert (tmp_path / "scaling.pdf").stat().st_size > 2000
    text = script("data_scaling").markdown(rows)
    assert "| kNN, all labels | teacher | 40.0 ± 1.0 | 45.5 ± 1.0 |" in text
    assert "raw pixels" not in text


def test_a_point_of_label_efficiency(tmp_path, capsys):
    dice = {"mean": 0.5, "std": None, "interval": [0.4, 0.6]}
    entry = {
        "summary": {"foreground_dice": dice, "dice": {"mean": 0.625}},
        "runs": [{"splits": {"train": {"images": 12}}}],
    }
    point = script("label_efficiency").point("x", 25, {"entries": {"teacher": entry}})
    assert point == ("x", 25, 12, 50.0, None, 40.0, 60.0, 62.5)
    script("label_efficiency").draw([point], tmp_path / "labels")
    assert (tmp_path / "labels.png").stat().st_size > 2000
    config, checkpoint = script("label_efficiency").share_config(
        "25pct", tmp_path, "base", smoke=False
    )
    assert (config.rows, config.model.arch) == (("random init",), "base")
    assert checkpoint is None and config.subset == "25pct"
    with pytest.raises(SystemExit, match="2"):
        script("label_efficiency").main(["--systems=base", "--data=x"])
    assert "NAME=CHECKPOINT" in capsys.readouterr().err
