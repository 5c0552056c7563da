"""Paired comparison of two evaluations on the same test images.

    python -m ultradino_jax.evaluators.classification.compare A B

A and B are results.json files. Prints the difference b - a of macro F1 and
accuracy with its 95 % interval from a patient-level bootstrap, and the p-value of a
patient-level permutation test.
"""

import argparse
from pathlib import Path

import numpy as np

from ultradino_jax.cli import command
from ultradino_jax.data.formats.tables import read_table
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.evaluators.bootstrap import (
    interval,
    resampled_weights,
    weighted,
)
from ultradino_jax.evaluators.classification.metrics import (
    accuracy,
    macro_f1,
    patient_confusions,
)
from ultradino_jax.evaluators.classification.results import FORMAT
from ultradino_jax.whole import read_json

STATISTICS = {"macro F1": macro_f1, "accuracy": accuracy}


def read_entry(path: str | Path, entry: str = "") -> dict:
    """{'name', 'classes', 'split_hash', 'ids', 'patients', 'labels', 'predictions'}.

    path: a results.json with its predictions.csv beside it. entry: label of an entry;
    by default the teacher's, if there is one only. labels [n] and predictions [runs,n]
    are class indices, images sorted by id.
    Raises UserError naming the entries when the choice is not clear, and when the
    files are damaged or not of one evaluation.
    """
    path = Path(path)
    with damaged(path):
        return _read_entry(path, entry)


def _read_entry(path: Path, entry: str) -> dict:
    results = read_json(path)
    if results.get("format") != FORMAT:
        raise UserError(f"{path}: not the results of a classification evaluation")
    labels = list(results["entries"])
    chosen = [x for x in labels if x == (entry or x)]
    if not entry:
        chosen = [x for x in chosen if x.startswith("teacher/")]
    if len(chosen) != 1:
        raise UserError(f"{path}: choose one entry of {', '.join(labels)}")
    classes = results["dataset"]["classes"]
    runs: dict[str, dict] = {}
    table = path.parent / "predictions.csv"
    wanted = ("entry", "set", "seed", "id")
    for line in read_table(table.read_bytes(), wanted, str(table)):
        if line["entry"] == chosen[0] and line["set"] == "test":
            runs.setdefault(line["seed"], {})[line["id"]] = line
    if not runs:
        raise UserError(f"{table}: there is no test image of {chosen[0]}")
    first = next(iter(runs.values()))
    ids = sorted(first)
    return {
        "name": chosen[0],
        "classes": classes,
        "split_hash": results["dataset"]["split_hash"],
        "ids": ids,
        "patients": [first[i]["patient"] for i in ids],
        "labels": np.array([classes.index(first[i]["label"]) for i in ids]),
        "predictions": np.array(
            [
                [classes.index(run[i]["prediction"]) for i in ids]
                for run in runs.values()
            ]
        ),
    }


def compare(a: dict, b: dict, *, replicates: int = 10_000, seed: int = 0) -> dict:
    """{statistic: {'a', 'b', 'difference', 'interval', 'p'}} of two entries.

    Runs are paired in order; the figures are means over runs. The interval resamples
    patients. The permutation test swaps the predictions of a and b for random patients:
    under the hypothesis that they are exchangeable every swap is equally likely, and
    p = (1 + swaps at least as far apart) / (1 + swaps), two-sided.
    Raises UserError when the test images or labels differ.
    """
    same = a["ids"] == b["ids"] and a["classes"] == b["classes"]
    if not same or (a["labels"] != b["labels"]).any():
        common = len(set(a["ids"]) & set(b["ids"]))
        raise UserError(
            f"the test sets differ: {len(a['ids'])} and {len(b['ids'])} images, "
            f"{common} in both"
        )
    runs = min(len(a["predictions"]), len(b["predictions"]))
    num_classes = len(a["classes"])
    parts = [
        [
            patient_confusions(a["labels"], x, a["patients"], num_classes)
            for x in side["predictions"][:runs]
        ]
        for side in (a, b)
    ]
    patients = len(parts[0][0])
    weights = resampled_weights(patients, replicates, seed)
    swap = np.random.default_rng([seed, 1]).integers(0, 2, (replicates, patients))
    results = {}
    for name, statistic in STATISTICS.items():

        def mean_of(side, weights, statistic=statistic):
            values = [statistic(weighted(weights, p)) for p in parts[side]]
            return np.mean(values, axis=0)

        def swapped(first, second, statistic=statistic):
            values = [
                statistic(weighted(1 - swap, p) + weighted(swap, q))
                for p, q in zip(parts[first], parts[second], strict=True)
            ]
            return np.mean(values, axis=0)

        once = np.ones((1, patients))
        value_a, value_b = (float(mean_of(side, once)[0]) for side in (0, 1))
        difference = value_b - value_a
        resampled = mean_of(1, weights) - mean_of(0, weights)
        exchanged = np.abs(swapped(1, 0) - swapped(0, 1))
        # Ties with the observed value count, so a rounding error must not hide them.
        as_far = (exchanged >= abs(difference) - 1e-12).sum()
        results[name] = {
            "a": value_a,
            "b": value_b,
            "difference": difference,
            "interval": list(interval(resampled)),
            "p": float((1 + as_far) / (1 + replicates)),
        }
    return results


def main(argv=None) -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(
        description="Paired test between two evaluations on the same test images."
    )
    parser.add_argument("a", help="results.json")
    parser.add_argument("b", help="results.json")
    parser.add_argument("--entry-a", default="", help="e.g. 'raw pixels/knn'")
    parser.add_argument("--entry-b", default="", help="default: the teacher's")
    args = parser.parse_args(argv)
    a, b = read_entry(args.a, args.entry_a), read_entry(args.b, args.entry_b)
    results = compare(a, b)
    patients = len(set(a["patients"]))
    print(f"a: {a['name']} in {args.a}\nb: {b['name']} in {args.b}")
    print(f"{len(a['ids'])} test images of {patients} patients")
    if len(a["predictions"]) != len(b["predictions"]):
        print("the sides have different numbers of runs: the first of each are used")
    for name, r in results.items():
        low, high = r["interval"]
        print(
            f"{name:9} a {100 * r['a']:.2f}  b {100 * r['b']:.2f}  b - a "
            f"{100 * r['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]  "
            f"p {r['p']:.4f}"
        )


if __name__ == "__main__":
    command(main)
