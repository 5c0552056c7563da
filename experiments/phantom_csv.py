"""Phantom patients that a run on the built-in phantom never saw, as a csv set.

    python experiments/phantom_csv.py --run=runs/smoke --out=phantom_csv

Draws them as the run's config.json draws its training images (same scanner settings,
other patients) and writes OUT/images/*.png and OUT/phantom.csv (path, label, patient).
"""

import argparse
import csv
import json
from pathlib import Path

from PIL import Image

from ultradino_jax.data.phantom.render import render_phantom
from ultradino_jax.health.phantom_knn import FIRST_PATIENT, IMAGES_PER_PATIENT


def write_phantoms(run: Path, out: Path, patients: int) -> None:
    """Write `patients` times IMAGES_PER_PATIENT images below `out`."""
    data = json.loads((run / "config.json").read_text())["data"]
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = [["path", "label", "patient"]]
    first = FIRST_PATIENT * IMAGES_PER_PATIENT
    for index in range(first, first + patients * IMAGES_PER_PATIENT):
        phantom = render_phantom(
            index,
            seed=data["phantom_seed"],
            size=tuple(data["phantom_size"]),
            images_per_patient=IMAGES_PER_PATIENT,
            settings=data["phantom_settings"] or None,
        )
        name = f"images/{index}.png"
        Image.fromarray(phantom.image).save(out / name)
        rows.append([name, phantom.plane, str(phantom.patient)])
    with open(out / "phantom.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=120)
    write_phantoms(**vars(parser.parse_args()))
