"""Bytes on the wire per training step, read from the compiled program.

    python -m experiments.benchmarks.collectives [--platform cuda] [--json FILE]

The real step (configs/pretrain_vits.py: ViT-S, drop path 0.3, float32, the recipe's
losses) is compiled for 2, 8 and 32 devices that share no work but what the program
says, with small crops and few prototypes, since neither changes which collectives
there are; images per device stay the same. Data parallel with both centerings, then
FSDP over all devices. For each kind of collective: how many instructions, executions
per step (loops counted by their trip count) and megabytes a device sends (ring
algorithms). Bar for data parallel: gradients once, 2 (n-1)/n times the bytes of the
parameters, and no gathered activations. `--platform cuda` asks XLA's GPU compiler
instead, for H100s that need not be there (see ahead.py for the wheels).
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import jax

from configs import pretrain_vits
from experiments.benchmarks.ahead import devices_of, lower_step, prepare_environment
from tests.hlo import collectives

COUNTS = (2, 8, 32)
PER_DEVICE = 8  # images
CASES = {
    "data parallel, centering": {},
    "data parallel, sinkhorn_knopp": {"loss.centering": "sinkhorn_knopp"},
    "fsdp, centering": {"mesh.fsdp": 0},  # 0: as many as there are devices
}


def small_config(num_devices: int, overrides: dict):
    """The ViT-S recipe with small crops and heads for `num_devices` devices."""
    config = pretrain_vits.get_config()
    config.groups, config.batch_size = num_devices, num_devices * PER_DEVICE
    config.steps_per_epoch = 100
    config.model.dtype = "float32"
    config.head.hidden_dim, config.head.num_prototypes = 256, 8192
    config.crops.global_size, config.crops.local_size = 64, 32
    config.data.phantom_images, config.data.phantom_size = 64, (80, 96)
    config.update_from_flattened_dict(overrides)
    config.mesh.fsdp = config.mesh.fsdp or num_devices
    return config


def measure(config, devices) -> dict:
    """Compile and add up; parameter_bytes are the student's."""
    start = time.perf_counter()
    lowered, _, state = lower_step(config, devices)
    found = collectives(lowered.compile().as_text() or "", len(devices))
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.student))
    kinds = defaultdict(lambda: {"instructions": 0, "executions": 0, "wire_bytes": 0.0})
    largest = sorted(found, key=lambda c: -c.wire_bytes)
    for c in found:
        kinds[c.kind]["instructions"] += 1
        kinds[c.kind]["executions"] += c.times or 1
        kinds[c.kind]["wire_bytes"] += c.wire_bytes
    n = len(devices)
    total = sum(c.wire_bytes for c in found)
    return {
        "devices": n,
        "parameter_bytes": parameters,
        "wire_bytes": total,
        "bytes_over_ring": total / (2 * (n - 1) / n * parameters),
        "unknown_loops": sum(c.times is None for c in found),
        "kinds": dict(kinds),
        "largest": [
            {
                "kind": c.kind,
                "times": c.times,
                "in_loop": c.in_loop,
                "bytes": c.size,
                "wire_bytes": c.wire_bytes,
                "source": c.source,
            }
            for c in largest[:12]
        ],
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def print_row(name: str, row: dict) -> None:
    """One case on one number of devices."""
    n, mega = row["devices"], 1e-6
    print(
        f"{name}, {n} devices: {mega * row['wire_bytes']:.1f} MB sent per device and "
        f"step, {row['bytes_over_ring']:.2f} x one all-reduce of the "
        f"{mega * row['parameter_bytes']:.1f} MB of parameters "
        f"(compiled in {row['compile_seconds']} s)"
    )
    for kind, k in sorted(row["kinds"].items()):
        print(
            f"    {kind:20} {k['instructions']:4} instructions "
            f"{k['executions']:6} executions {mega * k['wire_bytes']:10.3f} MB"
        )
    if row["unknown_loops"]:
        print(f"    {row['unknown_loops']} sit in loops of unknown length: once each")
    for c in row["largest"][:6]:
        loop = f" x {c['times']} in a loop" if c["in_loop"] else ""
        source = c["source"][-90:]
        print(f"      {mega * c['bytes']:9.3f} MB{loop} {c['kind']} of {source}")


def main() -> None:
    """Prints every case and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--devices", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/collectives.json")
    )
    options = parser.parse_args()
    prepare_environment(options.platform, max(options.devices))
    rows = {}
    for name in options.cases:
        for n in options.devices:
            config = small_config(n, CASES[name])
            row = measure(config, devices_of(options.platform, n))
            rows[f"{name}, {n} devices"] = row
            print_row(name, row)
            result = {"platform": options.platform, "per_device": PER_DEVICE}
            result |= {"jax": jax.__version__, "rows": rows}
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
