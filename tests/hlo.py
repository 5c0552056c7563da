"""Collectives of a compiled program, read from its HLO text."""

import dataclasses
import math
import re
from collections import defaultdict

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS}|collective-broadcast)(-start)?\((.*)")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction and how often a run of the program meets it.

    size: bytes of its result on one device. devices: that take part together. times:
    executions, None inside a loop of unknown length. in_loop: under a while. source:
    the operation of the traced program that it came from.
    """

    kind: str
    size: int
    devices: int
    times: int | None
    in_loop: bool
    source: str

    @property
    def wire_bytes(self) -> float:
        """Bytes a device sends over all executions (unknown loops count once).

        Ring algorithms: 2 (n-1)/n of the array for an all-reduce, (n-1)/n for a gather,
        n-1 times the shard a reduce-scatter leaves.
        """
        n = self.devices
        factor = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
        }.get(self.kind, (n - 1) / n)
        return (self.times or 1) * factor * self.size


def shape_bytes(text: str) -> list[int]:
    """Bytes of each array in an HLO shape: 'f32[2,3]{1,0}' or a tuple of them."""
    return [
        BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in SHAPE.findall(text)
        if kind in BYTES
    ]


def group_size(line: str, num_devices: int) -> int:
    """Devices per replica group, in either notation; all of them when none is given."""
    pairs = re.search(r"source_target_pairs=\{\{", line)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if iota:
        return int(iota.group(1))
    if listed and not pairs:
        return listed.group(1).count(",") + 1
    return num_devices


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Every collective that can run, with executions multiplied through the loops.

    Asynchronous pairs are counted at their start. Collectives over one device are left
    out: they move nothing.
    """
    name, lines, entry = "", defaultdict(list), ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line.strip()):
            name = head.group(1)
            entry = name if line.startswith("ENTRY") else entry
        elif " = " in line:
            lines[name].append(line)

    found = []

    def visit(computation, times, in_loop):
        for line in lines[computation]:
            if match := COLLECTIVE.search(line):
                shape, kind, start, _ = match.groups()
                sizes = shape_bytes(shape)
                # A start's result is (operands, results); the results count.
                size = sum(sizes[len(sizes) // 2 :] if start and sizes[1:] else sizes)
                if start and kind == "all-reduce":  # ... but this one's is plain
                    size = sum(sizes)
                devices = group_size(line, num_devices)
                source = re.search(r'op_name="([^"]*)"', line)
                source = source.group(1) if source else ""
                if devices > 1:
                    found.append(
                        Collective(kind, size, devices, times, in_loop, source)
                    )
                continue
            called = CALLED.findall(line)
            for branches in BRANCHES.findall(line):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            loop = " while(" in line
            trips = TRIPS.search(line) if loop else None
            inner = times
            if loop:
                inner = times and trips and times * int(trips.group(1))
            for callee in called:
                visit(callee, inner, in_loop or loop)

    visit(entry, 1, False)
    return found
