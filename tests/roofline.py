"""Predicted time of a compiled program: every kernel of its HLO against a roofline.

A kernel takes max(bytes / bandwidth, operations / their peak) + a launch, as often as
the loops around it say, one after the other. Bytes are what its operands and results
touch: of slices, gathers and updates in place the piece they take, of cuBLAS and cuDNN
not their workspace. Operations are counted per unit that does them: 2MNK for products,
one per element for arithmetic outside of them. Sorts are one pass, collectives hide
behind nothing. It ranks programs; it measures none.
"""

import collections
import dataclasses
import functools
import math
import re

from tests.hlo import Instruction, Program, arrays, collective, shape_bytes

# An H100 SXM, and the share of its data sheet that good kernels reach. To be corrected
# by measurements: every predicted figure follows from these.
BANDWIDTH = 0.85 * 3.35e12  # bytes/s
PEAK = {  # operations/s
    "bf16": 0.75 * 989e12,  # and float16
    "tf32": 0.75 * 495e12,  # float32 products at jax's default precision
    "f32": 0.75 * 67e12,  # float32 products at the highest, and all other arithmetic
    "cudnn": 0.60 * 989e12,  # fused attention
    "triton": 0.35 * 989e12,  # fused attention
}
LAUNCH = 3e-6  # seconds
WIRE = 0.35e12  # bytes/s each way between two GPUs
WIRE_LATENCY = 10e-6  # seconds

# No kernels of their own.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"partition-id", "replica-id", "add-dependency", "opt-barrier", "domain"}
# They move or choose data and compute nothing of it.
MOVES = {"reshape", "transpose", "copy", "copy-start", "pad", "convert", "slice"}
MOVES |= {"dynamic-slice", "dynamic-update-slice", "concatenate", "broadcast", "iota"}
MOVES |= {"compare", "select", "and", "or", "not", "clamp", "reverse", "gather"}
MOVES |= {"bitcast-convert", "fusion", "custom-call", "dot", "convolution", *FREE}
# What a kernel that only moves data is called by, the first that is in it.
MOVEMENTS = {"dynamic-update-slice": "stack", "pad": "pad", "transpose": "transpose"}
MOVEMENTS |= {"concatenate": "concatenate", "gather": "gather", "slice": "slice"}
MOVEMENTS |= {"dynamic-slice": "slice", "convert": "convert", "copy": "copy"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one launch does and how often a run of the program launches it.

    operations: unit of PEAK -> how many. movement: how it moves data when it does
    nothing else ('pad', 'copy', ...), else ''. wire: bytes sent to other devices.
    source: the operation of the traced program, of a neighbour where the compiler
    has lost it. times: 1 in a loop of unknown length, where known is False.
    """

    name: str
    op: str
    shape: str
    source: str
    times: int
    known: bool
    bytes: float
    operations: dict[str, float]
    movement: str
    wire: float

    @property
    def seconds(self) -> float:
        """Predicted time of all its launches."""
        if self.wire:
            return self.times * (self.wire / WIRE + WIRE_LATENCY)
        work = [n / PEAK[unit] for unit, n in self.operations.items()]
        return self.times * (max(self.bytes / BANDWIDTH, *work, 0) + LAUNCH)


def kernels(text: str, num_devices: int = 1) -> list[Kernel]:
    """The kernels of a program's HLO text, in the order they run."""
    return _Reader(Program(text)).kernels(num_devices)


def _size(shape: str) -> int:
    return sum(math.prod(dims) for _, dims in arrays(shape))


def _bytes(shape: str) -> int:
    return sum(shape_bytes(shape))


def _dims(x: Instruction | None) -> tuple[int, ...]:
    return arrays(x.shape)[0][1] if x else ()


def _unit(operands, attributes: str) -> str:
    """Which unit multiplies arrays of these types."""
    kinds = {kind for x in operands[:2] if x for kind, _ in arrays(x.shape)[:1]}
    if "f32" in kinds and "HIGHEST" not in attributes.upper():
        return "tf32"
    return "bf16" if kinds <= {"bf16", "f16"} else "f32"


def _product(x: Instruction, operands) -> float:
    """2MNK of a dot or a cuBLAS call, whichever way it writes what is contracted."""
    contracted = re.search(
        r'lhs_contracting_dim[a-z"]*[=:][\[{]([\d",]*)', x.attributes
    )
    axes = re.findall(r"\d+", contracted.group(1)) if contracted else []
    return 2 * math.prod(_dims(x)) * math.prod(_dims(operands[0])[int(a)] for a in axes)


def _convolution(x: Instruction, operands) -> float:
    """2 x output x kernel / its output channels; cuDNN's gradients keep these roles."""
    out, kernel = x, operands[1]
    if "convBackwardInput" in x.target:
        out = operands[0]
    elif "convBackwardFilter" in x.target:
        out, kernel = operands[1], x
    labels = re.search(r"dim_labels=\w+_(\w+)->", x.attributes)
    channels = _dims(kernel)[labels.group(1).index("o")] if labels else 1
    return 2 * math.prod(_dims(out)) * math.prod(_dims(kernel)) / channels


def _attention(x: Instruction, operands) -> float:
    """cuDNN's two products of [B,A,T,S] with the head dimension; five backward."""
    table = x.attributes.split("intermediate_tensor_shape")[-1]
    dims = re.search(r'"dimensions":\s*\[([^\]]*)\]', table)
    b, a, t, s = (int(d) for d in re.findall(r"\d+", dims.group(1) if dims else ""))
    width = math.prod(_dims(operands[0])) / (b * a * t)
    return (10 if "Backward" in x.target else 4) * b * a * t * s * width


class _Reader:
    """Bytes, operations and names of the instructions of one program."""

    def __init__(self, program: Program):
        self.program = program

    def kernels(self, num_devices: int) -> list[Kernel]:
        found = []
        for x, times, in_loop in self.program.executed():
            if x.op in FREE:
                continue
            sent = collective(x, 1, in_loop, num_devices)
            if sent and sent.devices == 1:
                continue
            operations = collections.defaultdict(float)
            self.operations(x, operations)
            found.append(
                Kernel(
                    name=x.name,
                    op=x.target or x.op,
                    shape=x.shape,
                    source=self.source(x),
                    times=times or 1,
                    known=times is not None,
                    bytes=self.read(x) + self.written(x),
                    operations=dict(operations),
                    movement="" if sent else self.movement(x, operations),
                    wire=sent.wire_bytes if sent else 0,
                )
            )
        return found

    def fused(self, x: Instruction) -> list[Instruction]:
        """What a fusion computes, in order."""
        if x.op != "fusion":
            return []
        return list(self.program.computations.get(x.called[0], {}).values())

    def operations(self, x: Instruction, found: dict[str, float]) -> None:
        """Adds the operations of an instruction to those found."""
        operands = self.program.operands(x)
        if x.op == "fusion":
            for inner in self.fused(x):
                work = collections.defaultdict(float)
                self.operations(inner, work)
                for unit, operations in work.items():
                    found[unit] += operations * self.wanted(inner)
        elif x.op == "dot" or "cublas" in x.target or "matmul" in x.target:
            found[_unit(operands, x.attributes)] += _product(x, operands)
        elif x.op == "convolution" or "$conv" in x.target:
            found[_unit(operands, x.attributes)] += _convolution(x, operands)
        elif "fmha" in x.target:
            found["cudnn"] += _attention(x, operands)
        elif "triton" in x.target:
            # What pallas_call(metadata={"flops": "1000"}) says; \22 is a quote.
            text = x.attributes.split("serialized_metadata")[-1].replace(r"\22", '"')
            said = re.search(r'"flops": "(\d+)"', text)
            found["triton"] += int(said.group(1)) if said else 0
        elif x.op in ("reduce", "reduce-window"):
            found["f32"] += _size(operands[0].shape) if operands[0] else 0
        elif x.op == "scatter":
            found["f32"] += _size(operands[-1].shape) if operands[-1] else 0
        elif x.op not in MOVES and not x.op.startswith(
            ("all-", "reduce-", "collective-")
        ):
            found["f32"] += _size(x.shape)

    def share(self, x: Instruction, position: int) -> float:
        """The share of the operand at this position that an instruction reads."""
        operand = self.program.operands(x)[position]
        size = _size(operand.shape) if operand else 0
        if not size or x.op in FREE - {"bitcast", "tuple"}:
            return 0
        if x.op in ("slice", "dynamic-slice", "gather") and position == 0:
            return min(1, _size(x.shape) / size) * self.wanted(x)
        if x.op == "dynamic-update-slice" and position == 0:
            return 0  # in place
        if x.op == "scatter" and position == 0:
            updates = self.program.operands(x)[-1]
            return min(1, _size(updates.shape) / size) if updates else 1
        if x.op == "fusion":
            inner = next(
                p
                for p in self.fused(x)
                if p.op == "parameter" and p.operands == (str(position),)
            )
            return self.wanted(inner)
        return self.wanted(x) if _size(x.shape) == size else 1

    @functools.cache  # noqa: B019, lives as long as the reader
    def wanted(self, x: Instruction) -> float:
        """The share of a value in a fused computation that its users read.

        1 for its root and for whatever is not in a fusion.
        """
        users = self.program.users.get((x.computation, x.name), [])
        if x.root or x.computation not in self.fusions:
            return 1
        return min(1, sum(self.share(user, i) for user, i in users))

    @functools.cached_property
    def fusions(self) -> set[str]:
        """The computations that fusions call."""
        tables = self.program.computations.values()
        found = (x for table in tables for x in table.values() if x.op == "fusion")
        return {name for x in found for name in x.called}

    def read(self, x: Instruction) -> float:
        """Bytes of its operands that an instruction reads."""
        return sum(
            self.share(x, i) * _bytes(operand.shape)
            for i, operand in enumerate(self.program.operands(x))
            if operand
        )

    def written(self, x: Instruction) -> float:
        """Bytes an instruction writes."""
        operands = self.program.operands(x)
        if x.op == "fusion":
            return self.written(next(r for r in self.fused(x) if r.root))
        if x.op == "tuple":
            return sum(self.written(r) for r in operands if r)
        if (
            x.op in ("bitcast", "convert")
            and operands[0]
            and x.computation in self.fusions
        ):
            # An update in place, seen through a change of type, stays one.
            share = self.written(operands[0]) / max(_bytes(operands[0].shape), 1)
            return share * _bytes(x.shape)
        if x.op in ("dynamic-update-slice", "scatter"):
            update = operands[1 if x.op.startswith("dynamic") else -1]
            return _bytes(update.shape) if update else 0
        if x.op == "copy-start":  # (result, operand, context)
            return shape_bytes(x.shape)[0]
        results = arrays(x.shape)
        workspace = x.op == "custom-call" and results[1:] and results[-1][0][1:] == "8"
        return sum(shape_bytes(x.shape)[: -1 if workspace else None])

    def movement(self, x: Instruction, operations) -> str:
        """What a kernel is called that does less than an operation on 20 elements."""
        if x.op == "custom-call" or (x.op != "fusion" and x.op not in MOVES):
            return ""
        inner = self.fused(x) or [x]
        inner = [i for i in inner if i.op not in FREE - {"bitcast"}] or inner
        sizes = [_size(i.shape) * self.wanted(i) for i in inner]
        if sum(operations.values()) > max(sizes, default=0) / 20:
            return ""
        if self.read(x) < 0.01 * self.written(x):
            return "fill"
        large = max(sizes) / 20
        found = {i.op for i, size in zip(inner, sizes, strict=True) if size > large}
        return next((name for op, name in MOVEMENTS.items() if op in found), "copy")

    def source(self, x: Instruction) -> str:
        """Where an instruction comes from; if that is unsaid, its nearest neighbour.

        Neighbours are what it reads and what it feeds, up to four steps away.
        """
        near, seen = [x], {x}
        for _ in range(5):
            if name := next(filter(None, map(self.said, near)), ""):
                return name
            around = []
            for n in near:
                users = self.program.users.get((n.computation, n.name), [])
                around += [user for user, _ in users]
                if n.op != "tuple":  # what shares a tuple with it is no neighbour
                    around += filter(None, self.program.operands(n))
            near = list(dict.fromkeys(n for n in around if n not in seen))
            seen.update(near)
        return ""

    def said(self, x: Instruction) -> str:
        """The source of an instruction or of the largest that it fuses.

        The compiler's own names, 'reshape.2' and such, say nothing, nor do arguments'.
        """
        inner = [i for i in self.fused(x) if "/" in i.source]
        if "/" in x.source or not inner:
            return x.source if "/" in x.source else ""
        return max(inner, key=lambda i: _size(i.shape)).source
