"""Where does self-supervision on own data pay? Pretraining-set size on the phantom.

    python experiments/data_scaling.py --sizes=500,2000,8000 --steps=3000 --out=runs/ds

For each size the smoke model is pretrained on that many phantom images, with the same
number of steps, and judged on patients it never saw, beside the same network untrained,
raw pixels and training from scratch:

- kNN with all labels of half of the patients;
- 10 labels per class: linear probe of frozen features, and fine-tuning of all weights,
  whose 'random init' is supervised training from scratch on the same labels;
- Dice after training on 20 images (FASS layout, another look than the pretraining
  images: it is a transfer).

Results go to OUT/data_scaling.csv, .md, .png and .pdf. The same command goes on where
it stopped. The default takes about two hours on 2 cores, minutes on a GPU; --steps,
--draws, --finetune-epochs and --segmentation-steps shrink it.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
from absl import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.cells import claim  # noqa: E402
from experiments.figures import new_figure, save_figure, write_rows  # noqa: E402

SHOTS = 10
HEADER = ("images", "task", "row", "metric", "mean", "std", "low", "high", "runs")
TASKS = {
    "knn": "kNN, all labels",
    "linear": "linear probe, 10 labels per class",
    "finetune": "all weights, 10 labels per class",
    "fass": "segmentation from 20 images",
}


def pretraining_config(images: int, steps: int):
    """The smoke recipe with a set size and a number of steps."""
    from configs import pretrain_smoke

    config = pretrain_smoke.get_config()
    config.data.phantom_images = images
    config.steps_per_epoch = max(steps // config.epochs, 1)
    config.checkpoint_every = max(steps // 3, 1)
    config.knn.enabled = False
    return config


def write_label_sets(run: Path, out: Path, patients: int, draws: int) -> None:
    """OUT/images, all.csv and few0.csv, few1.csv, ..: 10 labels per class each.

    Of the unseen patients one half is tested on, a fifth of the rest validates. Each
    few*.csv has the same test images.
    """
    from experiments.phantom_csv import write_phantoms

    if (out / f"few{draws - 1}.csv").is_file():
        return
    write_phantoms(run, out, patients)
    with open(out / "phantom.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["patient"] for row in rows}, key=int)
    order = np.random.default_rng(0).permutation(len(names))
    half, fifth = len(names) // 2, len(names) // 10
    part = {names[j]: "test" for j in order[:half]}
    part |= {names[j]: "val" for j in order[half : half + fifth]}
    for row in rows:
        row["split"] = part.get(row["patient"], "train")
    header = ("path", "label", "patient", "split")
    write_rows(out / "all.csv", header, [[r[k] for k in header] for r in rows])
    for draw in range(draws):
        rng = np.random.default_rng([1, draw])
        kept = [r for r in rows if r["split"] == "test"]
        for split in ("train", "val"):
            for label in sorted({r["label"] for r in rows}):
                pool = [r for r in rows if (r["split"], r["label"]) == (split, label)]
                chosen = rng.choice(len(pool), min(SHOTS, len(pool)), replace=False)
                kept += [pool[j] for j in sorted(chosen)]
        write_rows(
            out / f"few{draw}.csv", header, [[r[k] for k in header] for r in kept]
        )


def planes_config(mode: str, table: Path, args):
    """The classification config of one csv."""
    from configs import fetal_planes

    config = fetal_planes.get_config(mode)
    config.data.name, config.data.path = "csv", str(table)
    config.model.antialias = True
    config.allow_overlap = True  # other patients; there is no manifest to compare
    if mode != "knn":
        config.seeds = (0,)
    config.linear.recipe = "cached"
    config.linear.batch_size, config.linear.epochs = 60, 450
    config.linear.warmup_epochs = 225
    config.finetune.batch_size = 60
    config.finetune.epochs = args.finetune_epochs
    config.finetune.warmup_epochs = max(args.finetune_epochs // 20, 1)
    config.finetune.learning_rate = 5e-4
    config.finetune.checkpoint_every = args.finetune_epochs
    return config


def fass_config(data: Path, args):
    """The segmentation config: 20 images, a narrow head, equal steps for both rows."""
    from configs import fass

    config = fass.get_config("n20")
    config.data.manual_dir, config.data.data_dir = str(data / "fass"), str(data)
    config.allow_overlap = True
    config.model.image_size, config.model.head_channels = 64, 32
    config.seeds = tuple(range(args.draws))
    config.train.steps = args.segmentation_steps
    config.train.budget = "equal"
    config.train.warmup_steps = 20
    config.train.batch_size = 16
    config.train.learning_rate = 1e-3
    config.train.validate_every = max(args.segmentation_steps // 4, 1)
    config.train.drop_path = 0.1
    return config


def evaluated(config, run: Path, folder: Path) -> dict:
    """results.json of an evaluation, run if it is not there."""
    if (known := claim(folder, config, run)) is not None:
        return known
    from ultradino_jax.evaluators.evaluate import evaluate

    return evaluate(config, run, folder, say=lambda text: None)


def figures_of(size: int, run: Path, out: Path, args, say) -> list[tuple]:
    """Rows of HEADER for one pretrained network."""
    found, labels = [], out / "labels"

    def add(task, metric, records):
        """records: one {row: summary} per draw; with one draw its interval is kept."""
        for row in records[0]:
            values = [100 * r[row][metric]["mean"] for r in records]
            known = records[0][row][metric].get("interval", (None, None))
            low, high = known if len(records) == 1 else (None, None)
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            ends = [None if x is None else 100 * x for x in (low, high)]
            found.append(
                (size, task, row, metric, float(np.mean(values)), std, *ends,
                 len(values))
            )  # fmt: skip

    def by_row(results):
        return {e["row"]: e["summary"] for e in results["entries"].values()}

    for mode in ("knn", "linear", "finetune"):
        tables = ["all"] if mode == "knn" else [f"few{d}" for d in range(args.draws)]
        records = []
        for table in tables:
            start = time.monotonic()
            folder = out / f"eval_{size}" / f"{mode}_{table}"
            config = planes_config(mode, labels / f"{table}.csv", args)
            records.append(by_row(evaluated(config, run, folder)))
            say(f"{size} images, {mode}, {table}: {time.monotonic() - start:.0f} s")
        add(mode, "macro_f1", records)
    start = time.monotonic()
    config = fass_config(out / "fass_data", args)
    results = evaluated(config, run, out / f"eval_{size}" / "fass")
    say(f"{size} images, segmentation: {time.monotonic() - start:.0f} s")
    for row, summary in by_row(results).items():
        s = summary["foreground_dice"]
        ends = [100 * x for x in s.get("interval", ())] or [None, None]
        std = None if s["std"] is None else 100 * s["std"]
        found.append(
            (size, "fass", row, "foreground_dice", 100 * s["mean"], std, *ends,
             args.draws)
        )  # fmt: skip
    return found


def draw(rows: list[tuple], stem: Path, steps: int) -> None:
    """A panel per task: teacher over the set size, the others as level lines."""
    figure, axes = new_figure(11, 3, ncols=len(TASKS), squeeze=False)
    sizes = sorted({row[0] for row in rows})
    for panel, (task, title) in zip(axes[0], TASKS.items(), strict=True):
        mine = [r for r in rows if r[1] == task]
        for name, colour in (
            ("teacher", "C0"),
            ("random init", "C1"),
            ("raw pixels", "C2"),
        ):
            points = sorted((r[0], r[4], r[5] or 0) for r in mine if r[2] == name)
            if not points:
                continue
            x, y, spread = np.array(points, float).T
            label = {"teacher": "pretrained"}.get(name, name)
            if name == "random init" and task in ("finetune", "fass"):
                label = "supervised from scratch"
            if name == "teacher":
                panel.errorbar(
                    x, y, spread, color=colour, marker="o", capsize=3, label=label
                )
            else:
                panel.axhline(y.mean(), color=colour, ls="--", label=label)
        panel.set_xscale("log")
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.margins(y=0.35)  # room for the legend
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("pretraining images")
        panel.set_ylabel("mean Dice, %" if task == "fass" else "macro F1, %")
        panel.legend(fontsize=7)
    figure.suptitle(f"phantom, {steps} pretraining steps each", fontsize=9)
    save_figure(figure, stem)


def markdown(rows: list[tuple]) -> str:
    """A line per task and row, a column per size."""
    sizes = sorted({r[0] for r in rows})
    lines = ["| task | row | " + " | ".join(f"{s} images" for s in sizes) + " |"]
    lines.append("|" + "---|" * (2 + len(sizes)))
    for task, title in TASKS.items():
        for name in ("teacher", "random init", "raw pixels"):
            cells = []
            for size in sizes:
                hit = [r for r in rows if r[:3] == (size, task, name)]
                text = "-" if not hit else f"{hit[0][4]:.1f}"
                if hit and hit[0][5] is not None:
                    text += f" ± {hit[0][5]:.1f}"
                if hit and hit[0][6] is not None:
                    text += f" [{hit[0][6]:.1f}, {hit[0][7]:.1f}]"
                cells.append(text)
            if set(cells) != {"-"}:
                lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Pretrain, evaluate and draw; finished parts are taken as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/data_scaling"))
    parser.add_argument("--sizes", default="500,2000,8000", help="images, by comma")
    parser.add_argument("--steps", type=int, default=3000, help="of each pretraining")
    parser.add_argument("--patients", type=int, default=120, help="of the labelled set")
    parser.add_argument("--draws", type=int, default=5, help="of labels and images")
    parser.add_argument("--finetune-epochs", type=int, default=100)
    parser.add_argument("--segmentation-steps", type=int, default=1000)
    args = parser.parse_args(argv)
    try:
        sizes = [int(word) for word in args.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes={args.sizes!r} is not a list of numbers")
    logging.set_verbosity(logging.WARNING)
    from ultradino_jax.phantom import LAYOUTS
    from ultradino_jax.run.train import train

    start = time.monotonic()

    def say(text):
        print(f"[{time.monotonic() - start:.0f} s] {text}", flush=True)

    if not (args.out / "fass_data" / "fass").is_dir():
        LAYOUTS["fass"](args.out / "fass_data" / "fass", 30, 0, 128)
    rows = []
    try:
        for size in sizes:
            run = train(
                pretraining_config(size, args.steps), args.out / f"pretrain_{size}"
            )
            say(f"{size} images: pretrained for {args.steps} steps")
            write_label_sets(run, args.out / "labels", args.patients, args.draws)
            rows += figures_of(size, run, args.out, args, say)
            write_rows(args.out / "data_scaling.csv", HEADER, rows)
            (args.out / "data_scaling.md").write_text(markdown(rows))
            draw(rows, args.out / "data_scaling", args.steps)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(markdown(rows))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    main()
