"""Compiled programs, read from their HLO text: instructions, loops, collectives."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    r"collective-broadcast)(-start)?$"
)
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(type, dimensions) of each array in 'f32[2,3]{1,0}' or in a tuple of such."""
    return [
        (kind, tuple(int(d) for d in dims.split(",") if d))
        for kind, dims in SHAPE.findall(shape)
        if kind in BYTES
    ]


def shape_bytes(shape: str) -> list[int]:
    """Bytes of each array in an HLO shape."""
    return [BYTES[kind] * math.prod(dims) for kind, dims in arrays(shape)]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape op(operands), attributes`.

    operands: names; for a parameter, its number. computation: where it stands.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    computation: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations it runs: bodies of loops, branches, fused computations."""
        found = CALLED.findall(self.attributes)
        for branches in BRANCHES.findall(self.attributes):
            found += [b.strip().lstrip("%") for b in branches.split(",")]
        return found

    @property
    def source(self) -> str:
        """The operation of the traced program it came from, '' where unsaid."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _instruction(line: str, computation: str) -> Instruction | None:
    match = INSTRUCTION.match(line)
    if not match:
        return None
    root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    end = _closing(rest, start)
    op, inside = rest[:start], rest[start + 1 : end]
    operands = (inside,) if op == "parameter" else re.findall(r"%([\w.\-]+)", inside)
    attributes = rest[end + 1 :]
    return Instruction(
        name, shape, op, tuple(operands), attributes, computation, bool(root)
    )


class Program:
    """The computations of a compiled program by name, and which of them is the entry.

    Each is a dict of its instructions by name, in the order of the text, which is the
    order they run in.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = name = ""
        for line in map(str.strip, text.splitlines()):
            if head := COMPUTATION.match(line):
                name = head.group(2)
                self.entry = name if head.group(1) else self.entry
                self.computations[name] = {}
            elif found := _instruction(line, name):
                self.computations[name][found.name] = found

    def operands(self, instruction: Instruction) -> list[Instruction | None]:
        """The instructions it reads, None for what the text does not show."""
        table = self.computations[instruction.computation]
        return [table.get(name) for name in instruction.operands]

    @functools.cached_property
    def users(self) -> dict[tuple[str, str], list[tuple[Instruction, int]]]:
        """(computation, name) -> [(an instruction that reads it, at which position)]"""
        found = collections.defaultdict(list)
        for computation, table in self.computations.items():
            for user in table.values():
                for i, name in enumerate(user.operands):
                    found[computation, name].append((user, i))
        return found

    def executed(self) -> Iterator[tuple[Instruction, int | None, bool]]:
        """(instruction, how often a run meets it, whether that is under a while).

        How often: None inside a loop of unknown length. Fusions are one instruction, so
        are the asynchronous pairs of which the start is given; of a conditional every
        branch is.
        """

        def visit(computation, times, in_loop):
            for x in self.computations.get(computation, {}).values():
                if x.op.endswith(("-done", "-update")):
                    continue
                if x.op == "while":
                    trips = TRIPS.search(x.attributes)
                    inner = times and trips and times * int(trips.group(1))
                    for body in x.called:
                        yield from visit(body, inner, True)
                elif x.op in ("call", "conditional", "async-start"):
                    for callee in x.called:
                        yield from visit(callee, times, in_loop)
                else:
                    yield x, times, in_loop

        return visit(self.entry, 1, False)


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


def collective(
    instruction: Instruction, times: int | None, in_loop: bool, num_devices: int
) -> Collective | None:
    """The instruction as a collective, None when it is none."""
    match = COLLECTIVES.match(instruction.op)
    if not match:
        return None
    kind, start = match.groups()
    sizes = shape_bytes(instruction.shape)
    # A start's result is (operands, results); the results count.
    size = sum(sizes[len(sizes) // 2 :] if start and sizes[1:] else sizes)
    if start and kind == "all-reduce":  # ... but this one's is plain
        size = sum(sizes)
    devices = group_size(instruction.attributes, num_devices)
    return Collective(kind, size, devices, times, in_loop, instruction.source)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Every collective that can run, with executions multiplied through the loops.

    Asynchronous pairs are counted at their start. Collectives over one device are left
    out: they move nothing.
    """
    executed = Program(text).executed()
    found = [collective(x, *rest, num_devices) for x, *rest in executed]
    return [c for c in found if c and c.devices > 1]
