"""The paper's Table 1 by command: every system in every column that applies.

    python experiments/table1.py --weights=WEIGHTS --data=DATA --out=runs/table1
    python experiments/table1.py --preset=phantom-smoke --out=runs/table1_smoke

DATA holds the downloads in the folders fetal_planes, fass and jnu_ifm (zip or unpacked;
they are prepared into DATA/prepared on first use). WEIGHTS holds files or folders named
as `--list` says. What lacks an input is skipped, by name and with the reason. The same
command again goes on where it stopped. table1.md, .csv and .tex in OUT are written anew
whenever a cell ends.

In a SLURM array (`sbatch --array=0-14 ...`, one GPU per task) each task takes its share
of the cells; elsewhere give --task-index and --num-tasks. `--collect` only writes the
tables.

`--preset=phantom-smoke` needs no inputs: phantoms in the layout of the real sets and
random weights of tiny networks. It shows that all systems run in one harness; its
figures say nothing about the systems.
"""

import argparse
import contextlib
import fcntl
import importlib
import os
import sys
import time
from pathlib import Path

from absl import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.cells import claim  # noqa: E402
from experiments.table1_collect import REASON, cell_folder, collect  # noqa: E402
from experiments.table1_rows import (  # noqa: E402
    COLUMNS,
    ROWS,
    SUFFIXES,
    Column,
    Row,
)

SIDE = 224  # [P] pixels of every system's input
NNUNET_HINT = "needs --nnunet-bin, the bin folder of an environment with nnunetv2"


def find_weights(folder: Path | None, row: Row) -> Path | None:
    """The row's file or folder below --weights, or None."""
    if folder is None:
        return None
    for name in row.weights:
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.exists():
                return path
    return None


def missing_input(args, row: Row, column: Column) -> str:
    """Why a cell cannot run, or ''."""
    if args.data is None or not (args.data / column.data).is_dir():
        where = "--data" if args.data is None else args.data / column.data
        return f"needs the data set {column.data} in {where}"
    if row.weights and find_weights(args.weights, row) is None:
        return f"needs weights named {' or '.join(row.weights)} in {args.weights}"
    if row.run == "nnunet" and args.nnunet_bin is None:
        return NNUNET_HINT
    return ""


def cell_config(args, row: Row, column: Column):
    """The ConfigDict that eval.py would be given for a cell."""
    module = importlib.import_module(f"configs.{column.config}")
    config = module.get_config(column.argument)
    settings = {"rows": (row.run,), "model.image_size": SIDE, "model.arch": row.arch}
    settings |= row.overrides.get(column.name, {})
    settings |= {
        "data.manual_dir": str(args.data / column.data),
        "data.data_dir": str(args.data / "prepared"),
    }
    if args.preset == "phantom-smoke":
        from experiments.table1_smoke import smoke_settings

        settings |= smoke_settings(row, column)
    config.update_from_flattened_dict(settings)
    return config


@contextlib.contextmanager
def one_at_a_time(folder: Path):
    """Tasks of an array must not write the same data set twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_cell(args, row: Row, column: Column, say) -> None:
    """Evaluate one cell into its folder; nothing to do when it is there already.

    Raises ValueError or OSError with one line, also when the folder holds the cell of
    another config or checkpoint.
    """
    folder = cell_folder(args.out, row, column)
    config = cell_config(args, row, column)
    checkpoint = find_weights(args.weights, row)
    if claim(folder, config, checkpoint) is not None:
        return
    if config.task == "classification":
        from ultradino_jax.data.datasets.open import open_labelled as open_images
    else:
        from ultradino_jax.data.datasets.open import open_segmented as open_images
    from ultradino_jax.evaluators.evaluate import evaluate

    with one_at_a_time(args.data / "prepared"):
        open_images(config.data)
    if row.run == "nnunet":
        run_nnunet(args, config, folder, say)
    else:
        evaluate(config, checkpoint, folder, say=say)


def run_nnunet(args, config, folder: Path, say) -> None:
    """nnU-Net in its own environment on the cell's splits."""
    from ultradino_jax.evaluators.segmentation import nnunet

    options = {}
    if args.preset == "phantom-smoke":
        from experiments.table1_smoke import NNUNET_OPTIONS, NNUNET_VARIABLES

        options = NNUNET_OPTIONS
        for name, value in NNUNET_VARIABLES.items():
            os.environ.setdefault(name, value)
    nnunet.export(config, folder, say=say)
    nnunet.run(folder, args.nnunet_bin, say=say, **options)
    nnunet.collect(folder, say=say)


def planned(args) -> list[tuple[Row, Column]]:
    """The cells of this task, in the order of the table."""
    cells = [
        (row, column)
        for row in ROWS
        for column in COLUMNS
        if column.name in row.columns
        and row.name in args.rows
        and column.name in args.columns
    ]
    return cells[args.task_index :: args.num_tasks]


def run(args, say=print) -> int:
    """All cells of this task; returns how many failed."""
    start, failed = time.monotonic(), 0
    cells = planned(args)
    for done, (row, column) in enumerate(cells):
        folder = cell_folder(args.out, row, column)
        reason = missing_input(args, row, column)
        began = time.monotonic()
        if not reason:
            try:
                run_cell(args, row, column, lambda text: None)
            except (ValueError, OSError, ImportError) as error:
                reason, failed = f"failed: {error}", failed + 1
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / REASON
        if reason:
            note.write_text(reason + "\n")
        else:
            note.unlink(missing_ok=True)
        now = time.monotonic()
        left = (now - start) / (done + 1) * (len(cells) - done - 1)
        what = reason or f"done in {now - began:.0f} s"
        say(
            f"[{done + 1}/{len(cells)}] {row.name}, {column.name}: {what}; "
            f"about {left / 60:.0f} min left"
        )
        collect(args.out, facts(args))
    return failed


def facts(args) -> list[str]:
    """How the table was made, for its head."""
    lines = [f"`{args.command}`, {time.strftime('%Y-%m-%d')}."]
    if args.preset == "phantom-smoke":
        lines.append(
            "Rendered images, tiny networks with random weights, seconds of training: "
            "it shows that every system runs in one harness and says nothing about any "
            "of them."
        )
    return lines


def array_share() -> tuple[int, int]:
    """(index, number of tasks) of a SLURM array, (0, 1) outside of one."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" not in env:
        return 0, 1
    first = int(env.get("SLURM_ARRAY_TASK_MIN", 0))
    index = int(env["SLURM_ARRAY_TASK_ID"]) - first
    return index, int(env.get("SLURM_ARRAY_TASK_COUNT", index + 1))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags, with the names of rows and columns checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    index, number = array_share()
    names = {"rows": [r.name for r in ROWS], "columns": [c.name for c in COLUMNS]}
    parser.add_argument("--preset", choices=("paper", "phantom-smoke"), default="paper")
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    parser.add_argument("--weights", type=Path, help="folder, see --list")
    parser.add_argument("--data", type=Path, help="folder with the downloads")
    parser.add_argument("--nnunet-bin", type=Path, help="bin folder with nnunetv2")
    for kind, known in names.items():
        parser.add_argument(f"--{kind}", default=",".join(known), help="some, by comma")
    parser.add_argument("--task-index", type=int, default=index)
    parser.add_argument("--num-tasks", type=int, default=number)
    parser.add_argument("--collect", action="store_true", help="only write the tables")
    parser.add_argument("--list", action="store_true", help="name rows and weights")
    args = parser.parse_args(argv)
    for kind, known in names.items():
        chosen = getattr(args, kind).split(",")
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(
                f"--{kind}: {unknown[0]!r} is unknown; known: {', '.join(known)}"
            )
        setattr(args, kind, chosen)
    if not 0 <= args.task_index < args.num_tasks:
        parser.error(f"--task-index {args.task_index} of --num-tasks {args.num_tasks}")
    if args.preset == "paper" and not (args.data or args.collect or args.list):
        parser.error("--data is missing: the folder with the downloads")
    words = sys.argv[1:] if argv is None else argv
    words = [word for word in words if word != "--collect"]
    args.command = " ".join(["python experiments/table1.py", *words])
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a cell failed; skipped ones are no failure."""
    args = parse(argv)
    if args.list:
        for row in ROWS:
            named = ", ".join(row.weights) or "no weights needed"
            print(f"{row.name:20s} {named:60s} {', '.join(row.columns)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every file at INFO
    failed = 0
    if not args.collect:
        if args.preset == "phantom-smoke":
            prepare_smoke(args)
        failed = run(args)
    print(collect(args.out, facts(args)))
    print(f"written to {args.out}: table1.md, table1.csv, table1.tex")
    return int(failed > 0)


def prepare_smoke(args) -> None:
    """Inputs of the smoke preset, and a compiler that does not optimise minutes away.

    Set before jax is imported: the networks run for seconds, so XLA's optimiser costs
    more than it saves, and rows of one architecture share what was compiled.
    """
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    from experiments.table1_smoke import write_smoke_inputs

    with one_at_a_time(args.out):
        args.data, args.weights = write_smoke_inputs(args.out)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    sys.exit(main())
