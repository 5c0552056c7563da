"""nnU-Net v2 as a row of the segmentation results, run in an environment of its own.

    NNUNET="python -m ultradino_jax.evaluators.segmentation.nnunet"
    $NNUNET export --config=configs/fass.py:n20 --workdir=W --config.data.data_dir=DATA
    $NNUNET run --workdir=W --bin=ENV/bin
    $NNUNET collect --workdir=W

`export` writes the split of every seed as a raw dataset of nnU-Net (grey PNGs at their
own size), `run` calls its three commands (plan, train, predict; 2d, fold 0) and goes on
after an interruption, `collect` scores what was predicted, by the code and at the image
size of every other row, into results.json. nnunetv2 is never imported.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ultradino_jax import cli
from ultradino_jax.data.datasets.open import open_segmented
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.baselines import IMAGE_SIZE
from ultradino_jax.evaluators.evaluation import Call, Entry, versions
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.segmentation import metrics, results
from ultradino_jax.evaluators.segmentation.evaluate import (
    PACKAGES,
    parts_of,
    read_pairs,
    rows_of,
    tested,
)
from ultradino_jax.evaluators.segmentation.nnunet_data import export_split, read_masks
from ultradino_jax.evaluators.segmentation.settings import read_settings
from ultradino_jax.progress import Progress
from ultradino_jax.whole import check_same, flat, read_json, write_json

FORMAT = "ultradino_nnunet"
RECORD = "nnunet.json"
INSTALL = "python -m venv nnunet && nnunet/bin/pip install 'nnunetv2>=2.5,<3'"
FIRST_ID = 500  # lower ones are taken by public data sets, says nnU-Net
CONFIGURATION, FOLD = "2d", "0"
FOLDERS = {
    "nnUNet_raw": "raw",
    "nnUNet_preprocessed": "preprocessed",
    "nnUNet_results": "trained",
}


def export(config: ConfigDict, workdir: str | Path, say=print) -> dict:
    """Write the datasets of all seeds and the record of the work; returns the record.

    Raises UserError when the folder holds another export, and what reading the data
    raises.
    """
    workdir = Path(workdir)
    kept = json.loads(config.to_json_best_effort())
    if (workdir / RECORD).is_file():
        before = read_record(workdir)["config"]
        check_same(before, kept, workdir, "an export", "choose another folder")
    settings = read_settings(config)
    data = open_segmented(config.data)
    seeds = {}
    for k, seed in enumerate(settings.seeds):
        split = settings.split(data, seed)
        stem = re.sub(r"\W", "_", f"{data.name}_{settings.subset}_seed{seed}")
        name = f"Dataset{FIRST_ID + k}_{stem}"
        results.write_split(workdir / "splits" / f"seed{seed}.csv", split)
        cases = export_split(workdir / FOLDERS["nnUNet_raw"] / name, data, split)
        hashed = split.split_hash()
        seeds[str(seed)] = {"dataset": name, "split_hash": hashed, "cases": cases}
        say(f"{name}: {results.split_record(split)}")
    record = {"format": FORMAT, "config": kept, "seeds": seeds}
    write_json(workdir / RECORD, record)
    return record


def read_record(workdir: str | Path) -> dict:
    """nnunet.json of an export.

    Raises FileNotFoundError when there is none, UserError when it is damaged.
    """
    path = Path(workdir) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"no {RECORD} in {str(workdir)!r}; export first")
    record = read_json(path)
    with damaged(path):
        flat(record["config"])
        facts = [*record["seeds"].values()]
        if not facts or not all({"dataset", "split_hash"} <= {*seed} for seed in facts):
            raise UserError(f"{path}: it lacks the seeds of the export")
    return record


def find_commands(folder: str | Path) -> Path:
    """Absolute folder with nnU-Net's commands. Raises FileNotFoundError without them.

    folder: the bin folder of its environment, the environment, or its python.
    """
    start = Path(folder)
    for place in (start, start / "bin", start.parent):
        if (place / "nnUNetv2_train").is_file():
            return place.absolute()
    raise FileNotFoundError(
        f"no nnUNetv2_train in {str(folder)!r}; to install it: {INSTALL}, then "
        "--bin=nnunet/bin"
    )


def epochs_of(trainer: str) -> int | None:
    """Epochs that a trainer's name promises; None for one of unknown length."""
    found = re.search(r"_(\d+)epochs?$", trainer)
    if found:
        return int(found[1])
    return 1000 if trainer == "nnUNetTrainer" else None


def call(command: list[str], log: Path, env: dict, progress: Progress) -> None:
    """Run a command, its output into `log`, its epochs reported.

    Raises UserError naming the log and the last line when it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last, epochs = "", 0
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        print("$", *command, file=file, flush=True)
        assert process.stdout is not None  # a pipe was asked for
        for line in process.stdout:
            file.write(line)
            file.flush()
            last = line.strip() or last
            if "Epoch time:" in line:
                epochs += 1
                progress.update(epochs)
        code = process.wait()
    progress.close()
    if code:
        raise UserError(
            f"{Path(command[0]).name} ended with {code}: {last}; its output is in {log}"
        )


def versions_in(folder: Path, env: dict) -> dict[str, str]:
    """Versions of nnunetv2 and torch in its environment.

    Raises UserError when its python does not start or lacks one.
    """
    names = ("nnunetv2", "torch")
    ask = f"import importlib.metadata as m; print(*map(m.version, {names}))"
    asked = subprocess.run(
        [folder / "python", "-c", ask], env=env, capture_output=True, text=True
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{str(folder / 'python')!r} cannot name {names}: {last}")
    return dict(zip(names, asked.stdout.split(), strict=True))


def trained_folder(workdir: Path, dataset: str, trainer: str) -> Path:
    """Where nnU-Net keeps the fold's checkpoints and validation masks."""
    plan = f"{trainer}__nnUNetPlans__{CONFIGURATION}"
    return workdir / FOLDERS["nnUNet_results"] / dataset / plan / f"fold_{FOLD}"


def masks_folder(workdir: Path, trainer: str, seed: str) -> Path:
    """Where the test images' masks are predicted to."""
    return workdir / "masks" / trainer / f"seed{seed}"


def run(
    workdir: str | Path,
    commands: str | Path,
    *,
    trainer: str = "nnUNetTrainer",
    device: str = "cuda",
    processes: int = 4,
    say=print,
) -> None:
    """Plan, train and predict every seed with nnU-Net; what is done is not repeated.

    commands: see `find_commands`. Variables like nnUNet_n_proc_DA, nnUNet_compile or
    nnUNet_extTrainer reach it from the environment. Raises UserError when a command
    fails, FileNotFoundError when there is none or nothing was exported.
    """
    workdir = Path(workdir).absolute()
    record = read_record(workdir)
    folder = find_commands(commands)
    env = {"nnUNet_def_n_proc": str(processes), **os.environ}
    env |= {key: str(workdir / name) for key, name in FOLDERS.items()}
    record["versions"] = versions_in(folder, env)
    record["trainer"] = trainer
    write_json(workdir / RECORD, record)
    for seed, facts in record["seeds"].items():
        dataset, number = facts["dataset"], facts["dataset"][7:10]
        raw, ready = (workdir / FOLDERS[k] / dataset for k in list(FOLDERS)[:2])
        fold = trained_folder(workdir, dataset, trainer)
        masks = masks_folder(workdir, trainer, seed)

        def step(name, words, *paths, epochs=None, dataset=dataset, seed=seed):
            say(f"{dataset}: {name}")
            progress = Progress(f"{dataset}, {name}", epochs, unit="epoch")
            log = workdir / "logs" / f"seed{seed}.log"
            call([str(folder / name), *words.split(), *paths], log, env, progress)

        if not facts.get("planned"):
            step(
                "nnUNetv2_plan_and_preprocess",
                f"-d {number} -c {CONFIGURATION} --verify_dataset_integrity --clean "
                f"-npfp {processes} -np {processes}",
            )
            # Where it stands, nnU-Net draws no folds; not every version puts it there.
            shutil.copy(raw / "splits_final.json", ready)
            facts["planned"] = True
            write_json(workdir / RECORD, record)
        how = f"-tr {trainer} -device {device}"
        if not (fold / "validation" / "summary.json").is_file():
            again = " --c" if any(fold.glob("checkpoint_*.pth")) else ""
            words = f"{number} {CONFIGURATION} {FOLD} {how}{again}"
            step("nnUNetv2_train", words, epochs=epochs_of(trainer))
        tests = raw / "imagesTs"
        if len(list(masks.glob("*.png"))) < len(list(tests.iterdir())):
            words = (
                f"-d {number} -c {CONFIGURATION} -f {FOLD} {how} "
                f"-npp {processes} -nps {processes}"
            )
            step("nnUNetv2_predict", words, "-i", str(tests), "-o", str(masks))


def collect(workdir: str | Path, say=print) -> dict:
    """Score the predictions as every row is scored; writes and returns results.json.

    Raises UserError when a prediction is missing or the data are not those exported.
    """
    workdir = Path(workdir)
    record = read_record(workdir)
    config = ConfigDict(record["config"])
    settings = read_settings(config)
    data = open_segmented(config.data)
    side = settings.wanted.image_size or IMAGE_SIZE
    preprocess = Preprocess(side, 1, (0.0,), (1.0,), letterbox=settings.letterbox)
    pairs = read_pairs(data, preprocess)
    trainer, y = record.get("trainer", ""), len(data.classes)
    entry, shown, test = Entry("nnunet", "nnunet"), None, None
    for seed, facts in record["seeds"].items():
        split = settings.split(data, int(seed))
        if split.split_hash() != facts["split_hash"]:
            raise UserError(f"{data.name}, seed {seed}: not the split of the export")
        parts = parts_of(pairs, data, split)
        fold = trained_folder(workdir, facts["dataset"], trainer) / "validation"
        masks = masks_folder(workdir, trainer, seed)
        validated, found = (
            read_masks(folder, rows_of(data, split.split(name)), data, preprocess)
            for folder, name in ((fold, "val"), (masks, "test"))
        )
        on_val, _ = results.scored(validated, parts["val"].masks, y)
        val = float(metrics.mean_dice(on_val.sum(axis=0)))
        choice = {"trainer": trainer, "fold": int(FOLD)}
        run = tested(int(seed), choice, val, split, parts, found)
        folder = workdir / "nnunet" / f"seed{seed}" / "predictions"
        results.write_masks(folder, run.ids, found)
        entry.runs.append(run)
        if shown is None:
            shown, test = found, parts["test"]
    assert shown is not None and test is not None  # an export has a seed
    sheet = workdir / "overlays.png"
    results.contact_sheet(test.images[..., 0], test.masks, {"nnunet": shown}, sheet)
    facts = {
        "config": record["config"],
        "checkpoint": {"path": None, "name": "nnU-Net 2d", "image_size": side},
        "overlap": {"checked": False, "reason": "nothing was pretrained"},
        "nnunet": {"trainer": trainer, **record.get("versions", {})},
        "versions": versions(PACKAGES),
    }
    figures = results.results_of([entry], data, settings.replicates)
    call = Call(workdir, facts, say)
    files = ("predictions", "overlays.png")
    return call.finish(results.FORMAT, figures, table=results.table, files=files)


def main(argv) -> None:
    """Command line: export, run or collect."""
    f = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # tensorflow-datasets narrates at INFO
    if argv[1:] == ["export"] and f.config is not None:
        export(f.config, f.workdir)
    elif argv[1:] == ["run"]:
        if not f.bin:
            raise UserError(
                f"--bin names the environment of nnU-Net; to install it: {INSTALL}"
            )
        options = dict(trainer=f.trainer, device=f.device, processes=f.processes)
        run(f.workdir, f.bin, **options)
    elif argv[1:] == ["collect"]:
        collect(f.workdir)
    else:
        raise app.UsageError("say export (with --config), run or collect")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    config_flags.DEFINE_config_file("config", help_string="configs/fass.py[:subset]")
    flags.DEFINE_string("workdir", None, "folder for data, training and results")
    flags.DEFINE_string("bin", None, "bin folder of the environment with nnunetv2")
    flags.DEFINE_string("trainer", "nnUNetTrainer", "class of nnU-Net")
    flags.DEFINE_enum("device", "cuda", ["cuda", "cpu", "mps"], "of nnU-Net")
    flags.DEFINE_integer("processes", 4, "workers of nnU-Net's steps", lower_bound=1)
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
