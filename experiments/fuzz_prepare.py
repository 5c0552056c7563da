"""Damages files of every kind at random and sends them through prepare.

    python -m experiments.fuzz_prepare --count 2000 --seed 0

Prints what became of them; fails if prepare crashes, hangs past the time limit or loses
track of an input.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.data.prepare.fuzz import fuzz


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=30.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        fates = fuzz(Path(folder), args.count, args.seed, args.workers, args.timeout)
        seconds = time.perf_counter() - start
    for what, number in fates.items():
        print(f"{number:6d}  {what}")
    print(f"{args.count} inputs in {seconds:.0f} s, every one accounted for")


if __name__ == "__main__":
    main()
