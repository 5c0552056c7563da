"""Device memory of the real step, compiled for H100s without a GPU.

    python -m experiments.benchmarks.memory_h100 --config=configs/pretrain_vitb.py \
        --remat=none,dots,full --per_gpu=256,512 --gpus=2

Needs the CUDA plugin's wheels beside jax, but neither card nor driver (ahead.py says
which). Every combination of the three lists is compiled at the recipe's full shapes,
and XLA's buffer assignment says how many bytes of a GPU it takes: arguments (train
state and batch), outputs (the new state, most of it in the arguments' place: alias) and
temporaries. total = arguments + temporaries + outputs - alias is what a GPU must hold;
cuBLAS and cuDNN take some hundred MB on top. Any config value can be overridden
(`--config.model.drop_path=0.0`); `--note` names the variant in the table and in the
JSON, to which rows are added.
"""

import json
import time
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from experiments.benchmarks.ahead import devices_of, lower_step, prepare_environment
from tests.hlo import collectives
from ultradino_jax.run.plan import vit_name

CONFIG = config_flags.DEFINE_config_file("config", "configs/pretrain_vitb.py")
REMAT = flags.DEFINE_list("remat", ["none", "dots", "full"], "settings of model.remat")
PER_GPU = flags.DEFINE_list("per_gpu", ["256", "512"], "images per GPU")
GPUS = flags.DEFINE_list("gpus", ["2"], "numbers of GPUs")
NOTE = flags.DEFINE_string("note", "", "what is special about this run")
JSON = flags.DEFINE_string("json", "experiments/results/memory_h100.json", "added to")


def measure(config, gpus: int) -> dict:
    """Compile the config's step for that many H100s; GB (1e9 bytes) per GPU."""
    start = time.perf_counter()
    lowered, plan, _ = lower_step(config, devices_of("cuda", gpus))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    row = {
        name: getattr(memory, f"{name}_size_in_bytes") / 1e9
        for name in ("argument", "output", "temp", "alias")
    }
    row["total"] = row["argument"] + row["temp"] + row["output"] - row["alias"]
    found = collectives(compiled.as_text() or "", gpus)
    return row | {
        "collective_gb_sent": sum(c.wire_bytes for c in found) / 1e9,
        "collectives": len(found),
        "tflop_per_gpu": plan.flops_per_step / gpus / 1e12,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def main(argv):
    """One line per combination; failures are lines too."""
    del argv
    prepare_environment("cuda")
    path = Path(JSON.value)
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    columns = ("argument", "temp", "output", "alias", "total")
    print(f"{'GB per GPU':52}", *(f"{c:>9}" for c in columns), "  compiled", flush=True)
    for gpus in map(int, GPUS.value):
        for per_gpu in map(int, PER_GPU.value):
            for remat in REMAT.value:
                config = CONFIG.value.copy_and_resolve_references()
                config.groups, config.batch_size = gpus, gpus * per_gpu
                config.model.remat = remat
                name = f"{vit_name(config)}, remat {remat}, {gpus} x {per_gpu} images"
                name += f", {NOTE.value}" if NOTE.value else ""
                try:
                    row = measure(config, gpus)
                except jax.errors.JaxRuntimeError as error:
                    row = {"error": str(error).splitlines()[0][:200]}
                    print(f"{name:52} {row['error']}", flush=True)
                else:
                    figures = (f"{row[c]:9.2f}" for c in columns)
                    seconds = row["compile_seconds"]
                    print(f"{name:52}", *figures, f"{seconds:8.0f} s", flush=True)
                rows[name] = row
                result = {"jax": jax.__version__, "rows": rows}
                path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
