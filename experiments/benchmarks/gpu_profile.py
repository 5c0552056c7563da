"""Kernels of a profiled program by time, with the operations they come from."""

import re
from collections import defaultdict
from pathlib import Path

from jax.profiler import ProfileData

TOP = 40
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name=\"([^\"]*)\"")


def op_names(hlo_text: str) -> dict[str, str]:
    """Instruction name -> jax's name of the operation it was made from.

    Names stand there as the text has them and as a kernel is called after them, with
    underscores for dots and dashes.
    """
    names = {}
    for line in hlo_text.splitlines():
        if found := _INSTRUCTION.match(line):
            name, op = found.groups()
            names.setdefault(name, op)
            names.setdefault(re.sub(r"[.-]", "_", name), op)
    return names


def kernel_events(folder: Path):
    """Yields (kernel, HLO instruction or '', nanoseconds) of every trace in `folder`.

    On a GPU the kernels of its streams; on a CPU the instructions XLA ran.
    """
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in ProfileData.from_file(str(path)).planes:
            on_device = plane.name.startswith("/device:")
            for line in plane.lines:
                if on_device and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = {k: v for k, v in event.stats if k == "hlo_op"}
                    if on_device or stats:
                        op = str(stats.get("hlo_op", ""))
                        yield event.name, op, event.duration_ns


def kernel_table(folder: Path, hlo_text: str, steps: int) -> dict:
    """The top kernels and operations of `steps` steps, milliseconds per step.

    folder: what jax.profiler.trace wrote. hlo_text: the compiled program's.
    """
    names = op_names(hlo_text)
    kernels = defaultdict(lambda: [0.0, 0])
    operations = defaultdict(float)
    for kernel, instruction, nanoseconds in kernel_events(folder):
        op = names.get(instruction) or names.get(kernel, "")
        entry = kernels[kernel, instruction, op]
        entry[0] += nanoseconds
        entry[1] += 1
        operations[op or kernel] += nanoseconds
    scale = 1e-6 / steps
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    by_operation = sorted(operations.items(), key=lambda item: -item[1])[:TOP]
    return {
        "ms": scale * sum(operations.values()),
        "kernels_per_step": sum(n for _, n in kernels.values()) / steps,
        "kernels": [
            {
                "ms": round(scale * total, 4),
                "count": count / steps,
                "kernel": kernel[:160],
                "hlo": instruction,
                "op_name": op,
            }
            for (kernel, instruction, op), (total, count) in largest
        ],
        "operations": [
            {"ms": round(scale * total, 4), "op_name": op[:160]}
            for op, total in by_operation
        ],
    }


def print_kernels(table: dict) -> None:
    """One line per kernel."""
    print(f"  {table['ms']:.1f} ms in {table['kernels_per_step']:.0f} kernels a step")
    for row in table["kernels"]:
        print(
            f"  {row['ms']:9.3f} ms {row['count']:7.1f} x {row['kernel'][:48]:48} "
            f"{row['hlo'][:32]:32} {row['op_name'][-90:]}"
        )
