"""Right and fast on this machine's GPUs? One command, under ten minutes.

    python -m experiments.benchmarks.gpu [--cells='vitb remat=norms batch=256; vits ..']

Correctness first: the golden train step of the tests in float32 and bfloat16 and the
attention variants against float64. Then training steps, one process each, over the
cells: a model (vitb, vits) and what differs from its config, by the short names remat,
attention, unroll, dtype, drop_path, batch and groups (both per GPU), accum, or any key
in full (loss.chunk_rows=512). A bare word does more: 'profile' lists the kernels by
time, with CUDA graphs off, so that every kernel carries its instruction's name;
'pipeline' also trains from a prepared cache of phantoms, with the share of time spent
waiting for it; 'repeat' runs three steps twice and compares every bit of the state.

The part 'repeat' starts one cell three times: with a fresh compilation cache, with the
cache the first one left, with a fresh cache again. It gives the compile times, cold and
warm, and says whether processes agree to the last bit.

--peer=torch-reference times torch_step.py's statement of DINOv2's step under bfloat16
autocast on the same noise, --peer=lightly-train lightly-train's own step, each in a
Python that has it.

Results are kept after every row (--json, and a table beside it as .md); what fails is a
row with the first line of its error. A second call runs what is missing or failed,
--again everything. What does not fit --minutes is left for it.

A cell waits for every timed step; 'flowing' does not wait between steps, as training
does. Peak memory is the allocator's; XLA's own count of the program is beside it.
Compile times are those of a cold cache only where the cell says so: cells share one
folder of compiled programs and autotuning results (--cache).
"""

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from experiments.benchmarks.gpu_table import markdown, print_row

CELLS = """
vitb remat=matmuls batch=256; vitb remat=norms batch=256;
vits remat=matmuls batch=256; vitb remat=matmuls unroll=12 batch=256;
vitb remat=matmuls attention=xla batch=256; vits remat=none batch=256;
vitb remat=norms batch=1024 groups=4 accum=4; vitb remat=matmuls batch=256 profile;
vits remat=matmuls batch=256 pipeline data.workers=8;
vits remat=matmuls batch=256 pipeline data.workers=8 data.render=device
"""
REPEAT = "vits remat=matmuls batch=64 repeat"
PARTS = ("golden", "attention", "steps", "repeat", "extraction")
PEERS = ("torch-reference", "lightly-train")
PEER_CELLS = "vitb batch=256; vits batch=256; vitb batch=128"
# Seconds without which a row is not begun.
LEAST = 45


def cells_of(text: str, profile: bool) -> list[str]:
    """'a; b' -> their texts, in one spelling, each once."""
    cells = [" ".join(cell.split()) for cell in text.split(";")]
    if profile:
        cells = [
            c if not c or c.endswith(" profile") else f"{c} profile" for c in cells
        ]
    return list(dict.fromkeys(filter(None, cells)))


class Runs:
    """Rows by name, written after each; a row is a process of its own."""

    def __init__(self, path: Path, minutes: float, row_minutes: float, again: bool):
        self.path, self.again = path, again
        self.end = time.monotonic() + 60 * minutes
        self.row_seconds = 60 * row_minutes
        self.guard = threading.Lock()
        self.rows: dict[str, dict] = {}
        if path.exists():
            self.rows = json.loads(path.read_text())["rows"]

    def keep(self, name: str, row: dict) -> None:
        """Add the row to both files."""
        with self.guard:
            self.rows[name] = row
            text = json.dumps({"rows": self.rows}, indent=1) + "\n"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside = self.path.with_suffix(".part")
            beside.write_text(text)
            beside.replace(self.path)
            self.path.with_suffix(".md").write_text(markdown(self.rows))
            print_row(name, row)

    def run(self, name: str, module: str, spec: dict, environment: dict) -> None:
        """The row of `python -m module spec`, unless there is one already."""
        done = self.rows.get(name)
        if done and not self.again and not {"error", "not_run"} & set(done):
            print(f"{name}: done on {done['date']}", flush=True)
            return
        left = self.end - time.monotonic()
        if left < LEAST:
            if not done:
                self.keep(name, {"not_run": "no time left"})
            return
        self.keep(name, process(module, spec, environment, min(left, self.row_seconds)))


def process(module: str, spec: dict, environment: dict, seconds: float) -> dict:
    """What the worker wrote, or a row that says why it wrote nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log"
        command = [sys.executable, "-m", f"experiments.benchmarks.{module}"]
        start = time.monotonic()
        with log.open("w") as file:
            worker = subprocess.Popen(
                [*command, json.dumps(spec), str(out)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
            try:
                code = worker.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also when this process is interrupted
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                    worker.wait()
        row = json.loads(out.read_text()) if out.exists() else {}
        if code is None:
            row["error"] = f"stopped after {seconds:.0f} s"
        elif code and "error" not in row:
            lines = log.read_text(errors="replace").strip().splitlines() or [""]
            row["error"] = f"ended with {code}: {lines[-1]}"[:300]
        if "error" in row:
            print(log.read_text(errors="replace")[-3000:], flush=True)
        row.setdefault("date", time.strftime("%Y-%m-%d %H:%M"))
        return row | {"wall_seconds": round(time.monotonic() - start, 1)}


def environment_of(cache: str, profile: bool = False) -> dict:
    """What a worker's environment has besides this one's."""
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if cache:
        found["JAX_COMPILATION_CACHE_DIR"] = str(Path(cache).expanduser())
        found["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"
    if profile:
        flags = os.environ.get("XLA_FLAGS", "")
        found["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    return found


def run_cells(args, runs: Runs) -> None:
    """The step cells, --parallel compiling at once, one timed at a time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(args.parallel) as pool,
    ):
        waiting = []
        for cell in cells_of(args.cells, args.profile):
            profile = "profile" in cell.split()
            spec = {"cell": cell, "gpus": args.gpus, "lock": f"{folder}/lock"}
            if profile:
                slug = re.sub(r"[^\w=.]+", "_", cell)
                spec["hlo"] = str(
                    args.json.with_name(f"{args.json.stem}_{slug}.hlo.gz")
                )
            environment = environment_of(args.cache, profile)
            job = (f"step {cell}", "gpu_cell", spec, environment)
            waiting.append(pool.submit(runs.run, *job))
        for future in waiting:
            future.result()


def run_repeat(args, runs: Runs) -> None:
    """One cell in three processes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (("cold", "a"), ("warm", "a"), ("cold again", "b")):
            spec = {"cell": args.repeat_cell, "gpus": args.gpus}
            environment = environment_of(f"{folder}/{cache}")
            runs.run(f"repeat, {name}", "gpu_cell", spec, environment)


def run_peers(args, runs: Runs) -> None:
    """The PyTorch peers that were asked for."""
    pythons = {
        "torch-reference": args.torch_python,
        "lightly-train": args.lightly_python,
    }
    for peer in args.peer:
        for cell in cells_of(args.peer_cells, False):
            spec = {"cell": cell, "peer": peer, "python": pythons[peer]}
            spec["threads"] = os.cpu_count()
            environment = {"JAX_PLATFORMS": "cpu"}
            runs.run(f"peer {peer} {cell}", "gpu_peer", spec, environment)


def main() -> None:
    """Run what is missing, print each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path("experiments/results/gpu.json")
    parser.add_argument("--json", type=Path, default=default, help="written to")
    parser.add_argument("--cells", default=CELLS, help="training steps, ';' between")
    parser.add_argument("--repeat_cell", default=REPEAT, help="of the part 'repeat'")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--row_minutes", type=float, default=4.0, help="for a row")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--profile", action="store_true", help="every cell")
    parser.add_argument("--gpus", type=int, default=0, help="devices to use; 0 is all")
    parser.add_argument("--parallel", type=int, default=1, help="cells compiling")
    parser.add_argument(
        "--cache", default="~/.cache/ultradino_jax/xla", help="of programs; '' for none"
    )
    parser.add_argument("--peer", action="append", choices=PEERS, default=[])
    parser.add_argument("--peer_cells", default=PEER_CELLS, help="one group each")
    parser.add_argument("--torch_python", default=sys.executable, help="with torch")
    parser.add_argument("--lightly_python", default=sys.executable)
    parser.add_argument("--tiny", action="store_true", help="shapes of the tests")
    args = parser.parse_args()
    runs = Runs(args.json, args.minutes, args.row_minutes, args.again)
    for part in args.parts:
        if part == "steps":
            run_cells(args, runs)
        elif part == "repeat":
            run_repeat(args, runs)
        else:
            spec = {"check": part, "tiny": args.tiny}
            runs.run(part, "gpu_checks", spec, environment_of(args.cache))
    run_peers(args, runs)
    print(f"kept in {args.json} and {args.json.with_suffix('.md')}")


if __name__ == "__main__":
    main()
