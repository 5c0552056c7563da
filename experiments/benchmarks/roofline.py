"""Predicted speed and memory of the real step on H100s, without a GPU.

    python -m experiments.benchmarks.roofline --config=configs/pretrain_vitb.py \
        --remat=none,norms,matmuls --per_gpu=256,512 --gpus=2 --top=20

Needs the CUDA plugin's wheels beside jax, but neither card nor driver (ahead.py says
which). Every combination of the lists is compiled at the recipe's full shapes.

- ms, MFU: every kernel of the optimised HLO against a roofline (tests/roofline.py has
  the model and its constants), one after the other; by part of the step, with what each
  part spends on kernels that only move data. Good for ranking programs: no figure of it
  is a measurement. XLA takes cuBLAS where on a real card it might pick Triton.
- GB per GPU: XLA's buffer assignment. arguments (train state and batch), outputs (the
  new state, most of it in the arguments' place: alias) and temporaries; total =
  arguments + temporaries + outputs - alias. cuBLAS and cuDNN take some hundred MB more.
- Beside it the PyTorch reference's step, counted by hand (torch_by_hand.py).

Any config value can be overridden (`--config.model.drop_path=0.0`); `--note` names the
variant in the table and in the JSON, to which rows are added.
"""

import collections
import itertools
import json
import re
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.benchmarks.ahead import devices_of, lower_step, prepare_environment
from experiments.benchmarks.torch_by_hand import torch_step
from tests.hlo import collectives
from tests.roofline import Kernel, kernels
from ultradino_jax.run.meter import PEAK_FLOPS
from ultradino_jax.run.plan import vit_name

CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain_vitb.py")
REMAT = flags.DEFINE_list(
    "remat", ["none", "norms", "matmuls"], "settings of model.remat"
)
PER_GPU = flags.DEFINE_list("per_gpu", ["256"], "images per GPU")
UNROLL = flags.DEFINE_list("unroll", ["12"], "settings of model.unroll")
GPUS = flags.DEFINE_list("gpus", ["2"], "numbers of GPUs")
TOP = flags.DEFINE_integer("top", 0, "how many kernels to list")
NOTE = flags.DEFINE_string("note", "", "what is special about this run")
JSON = flags.DEFINE_string("json", "experiments/results/roofline.json", "added to")

# Part of the step -> what the names of its operations contain; the first that fits.
PARTS = {
    "attention": r"attn/(?!(qkv|proj)/)|dot_product_attention",
    "blocks": r"blocks/|ViT\)*/(?!ViT\._tokens|norm/)",
    "embedding, final norm": r"ViT\)*/",
    "head MLP": r"DINOHead\.features",
    "prototypes and losses": r"DINOHead\.kernel|jvp\(|/while/",
}
REST = "optimiser, EMA, rest"


def part_of(kernel: Kernel) -> str:
    """The part of the step that a kernel belongs to."""
    if kernel.wire:
        return "collectives"
    if kernel.operations.keys() & {"cudnn", "triton"}:
        return "attention"
    found = (name for name, names in PARTS.items() if re.search(names, kernel.source))
    part = next(found, REST)
    if part != "blocks":
        return part
    products = kernel.operations.keys() & {"bf16", "tf32"}
    return "block gemms" if products else "LayerNorm, residual, elementwise"


def predict(text: str, gpus: int) -> tuple[dict, list[Kernel]]:
    """(milliseconds by part and by movement, the kernels, slowest first)."""
    found = sorted(kernels(text, gpus), key=lambda k: -k.seconds)
    tables = [collections.defaultdict(float) for _ in range(4)]
    parts, moving, movement, work = tables
    for k in found:
        ms = 1e3 * k.seconds
        parts[part_of(k)] += ms
        if k.movement:
            moving[part_of(k)] += ms
            movement[k.movement] += ms
        for unit, operations in k.operations.items():
            work[unit] += k.times * operations / 1e12
    row = {
        "ms": 1e3 * sum(k.seconds for k in found),
        "launches": sum(k.times for k in found),
        "unknown_loops": sum(not k.known for k in found),
        "silent": sum(k.operations == {"triton": 0} for k in found),
        "gb_moved": sum(k.times * k.bytes for k in found) / 1e9,
        "tflop": dict(work),
        "parts": dict(sorted(parts.items(), key=lambda x: -x[1])),
        "moving": dict(sorted(moving.items(), key=lambda x: -x[1])),
        "movement": dict(sorted(movement.items(), key=lambda x: -x[1])),
        "top": [line(k) for k in found[:12]],
    }
    return row, found


def line(k: Kernel) -> str:
    """One kernel of a table."""
    work = sum(k.operations.values()) / 1e9
    source = re.sub(r"jit\(train_step\)/|closed_call/|checkpoint/", "", k.source)
    what = k.movement or re.sub(r"__|\$", " ", k.op).strip()
    return (
        f"{1e3 * k.seconds:6.2f} ms = {k.times:3} x ({k.bytes / 1e6:7.1f} MB, "
        f"{work:6.1f} GFLOP) {what[:16]:16} {k.shape.split('{')[0]:28} {source[-80:]}"
    )


def measure(config, gpus: int) -> tuple[dict, list[Kernel]]:
    """Compile the config's step for that many H100s; GB are 1e9 bytes per GPU."""
    start = time.perf_counter()
    lowered, plan, state = lower_step(config, devices_of("cuda", gpus))
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    row, found = predict(text, gpus)
    tflop = plan.flops_per_step / gpus / 1e12
    gb = {
        name: getattr(memory, f"{name}_size_in_bytes") / 1e9
        for name in ("argument", "output", "temp", "alias")
    }
    gb["total"] = gb["argument"] + gb["temp"] + gb["output"] - gb["alias"]
    sent = collectives(text, gpus)
    parameters = sum(x.size for x in jax.tree.leaves(state.student))
    head = {"mfu": 1e15 * tflop / row["ms"] / PEAK_FLOPS["H100"], "tflop_model": tflop}
    row = {"ms": row["ms"], **head, "gb": gb, **row}
    row["gb_sent"] = sum(c.wire_bytes for c in sent) / 1e9
    row["collectives"] = len(sent)
    row["torch"] = torch_step(plan, parameters, config.batch_size // gpus)
    return row | {"compile_seconds": round(time.perf_counter() - start, 1)}, found


def print_row(name: str, row: dict) -> None:
    """One combination: the total, its parts and the reference's beside them."""
    gb, torch = row["gb"], row["torch"]
    print(
        f"{name}: {row['ms']:.0f} ms, MFU {100 * row['mfu']:.1f} %, {gb['total']:.2f} "
        f"GB (arguments {gb['argument']:.2f}, temporaries {gb['temp']:.2f}); PyTorch "
        f"by hand {torch['ms']:.0f} ms, {torch['gb']:.0f} GB; compiled in "
        f"{row['compile_seconds']:.0f} s"
    )
    print(f"    {'ms':34}{'here':>8}{'share':>8}{'moving':>8}{'PyTorch':>9}")
    for part in dict.fromkeys([*row["parts"], *torch["parts"]]):
        ours, moving = row["parts"].get(part, 0), row["moving"].get(part, 0)
        theirs = f"{torch['parts'][part]:9.1f}" if part in torch["parts"] else ""
        share = 100 * ours / row["ms"]
        print(f"    {part:34}{ours:8.1f}{share:7.1f}%{moving:8.1f}{theirs}")
    moved = ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["movement"].items())
    print(
        f"    moving data alone {sum(row['movement'].values()):.1f} ms: {moved}\n"
        f"    {row['launches']} launches, {row['gb_moved']:.0f} GB moved, "
        f"{sum(row['tflop'].values()):.1f} TFLOP done, {row['tflop_model']:.1f} by "
        f"formula; {row['gb_sent']:.2f} GB sent to other GPUs",
        flush=True,
    )
    if row["unknown_loops"]:
        print(f"    {row['unknown_loops']} kernels in loops of unknown length: once")
    if row["silent"]:
        print(
            f"    {row['silent']} Triton kernels without metadata 'flops': bytes alone"
        )


def as_json(result: dict) -> str:
    """The text of a file, with three decimals."""
    text = json.dumps(result)
    result = json.loads(text, parse_float=lambda number: round(float(number), 3))
    return json.dumps(result, indent=1) + "\n"


def main(argv):
    """A table per combination; failures are lines."""
    del argv
    prepare_environment("cuda")
    path = Path(JSON.value)
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for gpus, per_gpu, remat, unroll in itertools.product(
        map(int, GPUS.value),
        map(int, PER_GPU.value),
        REMAT.value,
        map(int, UNROLL.value),
    ):
        config = CONFIG.value.copy_and_resolve_references()
        config.batch_size = gpus * per_gpu
        config.groups = gpus * config.accum_steps
        config.model.remat, config.model.unroll = remat, unroll
        name = f"{vit_name(config)}, remat {remat}, {gpus} x {per_gpu} images"
        if config.accum_steps > 1:
            name += f" in {config.accum_steps} steps"
        name += f", attention {config.model.attention}, unroll {unroll}"
        name += f", {NOTE.value}" if NOTE.value else ""
        try:
            rows[name], found = measure(config, gpus)
        except jax.errors.JaxRuntimeError as error:
            rows[name] = {"error": str(error).splitlines()[0][:200]}
            print(f"{name}: {rows[name]['error']}", flush=True)
        else:
            print_row(name, rows[name])
            for kernel in found[: TOP.value]:
                print(f"    {line(kernel)}")
        path.write_text(as_json({"jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    app.run(main)
