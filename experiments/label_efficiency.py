"""Dice against the share of labelled patients, as in the paper's Figure 1b.

    python experiments/label_efficiency.py --data=DATA --out=runs/labels \\
        --systems=UltraDINO=runs/vitb,DINOv2=dinov2_vitb14_reg4_pretrain.pth,scratch=base

Trains UperNet on 10, 25, 50 and 100 % of the FASS training patients (the smaller shares
are parts of the larger) from each system: NAME=CHECKPOINT, or NAME=tiny, small or base
for a ViT from scratch. DATA/fass holds the download. Writes OUT/label_efficiency.png,
.pdf and .csv: mean, standard deviation over seeds and the patient bootstrap's 95 %
interval. The same command goes on where it stopped.

`--smoke` needs no inputs and a few minutes: it trains on a phantom at 64 pixels.
"""

import argparse
import sys
import time
from pathlib import Path

from absl import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.cells import claim  # noqa: E402
from experiments.figures import new_figure, save_figure, write_rows  # noqa: E402

SHARES = {"10pct": 10, "25pct": 25, "50pct": 50, "full": 100}
SIZES = ("tiny", "small", "base", "large")
HEADER = (
    "system", "percent", "images", "dice", "std", "low", "high", "with_background",
)  # fmt: skip
SMOKE = {
    "model.head_channels": 16,
    "model.image_size": 64,
    "seeds": (0,),
    "replicates": 200,
    "train.steps": 240,
    "train.scratch_steps": 240,
    "train.warmup_steps": 20,
    "train.batch_size": 8,
    "train.learning_rate": 1e-3,
    "train.validate_every": 80,
}


def share_config(subset: str, data: Path, system: str, smoke: bool):
    """(config, checkpoint or None) of one point."""
    from configs import fass

    config = fass.get_config(subset)
    config.data.manual_dir = str(data / "fass")
    config.data.data_dir = str(data / "prepared")
    scratch = system in SIZES
    config.rows = ("random init",) if scratch else ("teacher",)
    config.model.arch = system if scratch else ""
    if smoke:
        config.update_from_flattened_dict(SMOKE)
    return config, None if scratch else Path(system)


def point(name: str, percent: int, results: dict) -> tuple:
    """A row of HEADER from results.json."""
    (entry,) = results["entries"].values()
    dice = entry["summary"]["foreground_dice"]
    low, high = dice.get("interval", (None, None))
    values = (dice["mean"], dice["std"], low, high, entry["summary"]["dice"]["mean"])
    images = entry["runs"][0]["splits"]["train"]["images"]
    return (name, percent, images, *(None if v is None else 100 * v for v in values))


def draw(rows: list[tuple], stem: Path, name: str = "FASS") -> None:
    """A line per system with its interval as a band."""
    figure, axes = new_figure(5, 3.6)
    for k, system in enumerate(dict.fromkeys(row[0] for row in rows)):
        mine = sorted(row[1:] for row in rows if row[0] == system)
        x, y = [r[0] for r in mine], [r[2] for r in mine]
        axes.plot(x, y, marker="o", color=f"C{k}", label=system)
        if all(r[4] is not None for r in mine):
            low, high = [r[4] for r in mine], [r[5] for r in mine]
            axes.fill_between(x, low, high, color=f"C{k}", alpha=0.15, lw=0)
    axes.set_xticks(list(SHARES.values()))
    axes.set_xlabel("labelled training patients, %")
    axes.set_ylabel("Dice of the structures, %")
    axes.set_title(f"{name}, band: 95 % of resampled test patients", fontsize=9)
    axes.legend(fontsize=8)
    save_figure(figure, stem)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; systems as {name: checkpoint or size}."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default="", help="NAME=CHECKPOINT,NAME=base")
    parser.add_argument("--data", type=Path, help="folder with fass/")
    parser.add_argument("--out", type=Path, default=Path("runs/label_efficiency"))
    parser.add_argument("--smoke", action="store_true", help="phantom, 64 px, minutes")
    args = parser.parse_args(argv)
    if args.smoke and not args.systems:
        args.systems = "scratch=tiny"
    pairs = [word.partition("=") for word in args.systems.split(",") if word]
    if not pairs or any(not name or not value for name, _, value in pairs):
        parser.error(
            "--systems needs NAME=CHECKPOINT or NAME=base, separated by commas"
        )
    args.systems = {name: value for name, _, value in pairs}
    if args.data is None and not args.smoke:
        parser.error("--data is missing: the folder that holds fass/")
    return args


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, draw; bad input ends with one line and status 1."""
    args = parse(argv)
    logging.set_verbosity(logging.WARNING)
    from ultradino_jax.evaluators.evaluate import evaluate

    if args.smoke:
        from ultradino_jax.phantom import LAYOUTS

        args.data = args.out / "data"
        if not (args.data / "fass").is_dir():
            LAYOUTS["fass"](args.data / "fass", 20, 0, 128)
    rows, start = [], time.monotonic()
    total = len(args.systems) * len(SHARES)
    try:
        for name, system in args.systems.items():
            for subset, percent in SHARES.items():
                config, checkpoint = share_config(subset, args.data, system, args.smoke)
                folder = args.out / name / subset
                results = claim(folder, config, checkpoint)
                if results is None:
                    results = evaluate(config, checkpoint, folder, say=lambda _: None)
                rows.append(point(name, percent, results))
                left = (time.monotonic() - start) / len(rows) * (total - len(rows))
                print(
                    f"[{len(rows)}/{total}] {name}, {percent} %: Dice "
                    f"{rows[-1][3]:.2f}; about {left / 60:.0f} min left",
                    flush=True,
                )
                write_rows(args.out / "label_efficiency.csv", HEADER, rows)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = "phantom of FASS" if args.smoke else "FASS"
    draw(rows, args.out / "label_efficiency", shown)
    print(f"written to {args.out}: label_efficiency.png, .pdf and .csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
