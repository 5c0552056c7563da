"""Attention of packed sequences by one Triton kernel (NVIDIA GPUs), and its gradient.

A program makes some rows of one head of one sequence, and reads what it needs straight
from the packed qkv: q, k and v are never copied, logits never written, and a last block
of a few tokens is read as one of 16, 32 or 64. Source: FlashAttention-2
(arXiv:2307.08691), algorithms 1 and 2; no program writes what another one writes, so
nothing is added atomically and a result repeats bit for bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import PartitionSpec

from ultradino_jax.models.packing import Layout


class Tiles(NamedTuple):
    """rows: at most, that a program makes; across: that it reads at a time.

    warps of 32 threads a program, stages of loads in flight; rows and across are powers
    of 2, at least 16.
    """

    rows: int
    across: int
    warps: int
    stages: int


FORWARD = Tiles(rows=64, across=64, warps=4, stages=2)
BACKWARD = Tiles(rows=64, across=64, warps=4, stages=2)
SMALLEST = 16  # what a matrix unit multiplies
Q, K, V = range(3)


def _block(tokens: int, largest: int) -> int:
    return min(largest, max(SMALLEST, pl.next_power_of_2(tokens)))


class _Rows(NamedTuple):
    """Rows start, start+1, .. of a sequence; real [size] says which exist, None all."""

    start: Any
    size: int
    real: Any


class _Head(NamedTuple):
    """One head of one sequence: tokens rows from `row` on of arrays [W,R,..]."""

    group: Any
    index: Any
    row: Any
    tokens: int
    heads: int
    width: int

    def rows(self, block, size: int) -> _Rows:
        """The block'th `size` rows."""
        start = block * size
        whole = self.tokens % size == 0
        return _Rows(
            start, size, None if whole else start + jnp.arange(size) < self.tokens
        )

    def fold(self, step: Callable, carry, size: int):
        """carry = step(rows, carry) over all rows, `size` at a time; the rest last."""
        whole, rest = divmod(self.tokens, size)
        if whole:
            carry = jax.lax.fori_loop(
                0, whole, lambda i, c: step(_Rows(i * size, size, None), c), carry
            )
        if rest:
            last = _block(rest, size)
            real = None if last == rest else jnp.arange(last) < rest
            carry = step(_Rows(whole * size, last, real), carry)
        return carry

    def _at(self, ref, rows: _Rows, part: int | None):
        here = pl.ds(self.row + rows.start, rows.size)
        if part is None:
            return ref.at[self.group, self.index, here]
        column = (part * self.heads + self.index) * self.width
        return ref.at[self.group, here, pl.ds(column, self.width)]

    def _mask(self, rows: _Rows, part: int | None):
        if rows.real is None or part is None:
            return rows.real
        return jnp.broadcast_to(rows.real[:, None], (rows.size, self.width))

    def load(self, ref, rows: _Rows, part: int | None = 0):
        """[size,E] of a part of [W,R,parts D], part None: [size] of [W,A,R].

        Zero where there is no row.
        """
        mask = self._mask(rows, part)
        other = None if mask is None else 0.0
        return plgpu.load(self._at(ref, rows, part), mask=mask, other=other)

    def store(self, ref, rows: _Rows, value, part: int | None = 0):
        """The inverse of `load`; what is no row is not written."""
        at = self._at(ref, rows, part)
        plgpu.store(at, value.astype(ref.dtype), mask=self._mask(rows, part))

    def clear(self, ref, part: int | None):
        """Zeros in all rows."""
        rows = self.rows(0, max(SMALLEST, pl.next_power_of_2(self.tokens)))
        shape = (rows.size,) if part is None else (rows.size, self.width)
        self.store(ref, rows, jnp.zeros(shape), part)


def _forward_rows(head: _Head, block, qkv, out, lse):
    """One block of queries against all keys."""
    own = head.rows(block, _block(head.tokens, FORWARD.rows))
    scale = head.width**-0.5 * np.log2(np.e)
    q = head.load(qkv, own, Q)

    def step(keys, carry):
        top, total, mean = carry
        logits = plgpu.dot(q, head.load(qkv, keys, K), trans_b=True)
        if keys.real is not None:
            logits = jnp.where(keys.real[None], logits, -jnp.inf)
        new = jnp.maximum(top, logits.max(axis=1) * scale)
        p = jnp.exp2(logits * scale - new[:, None])
        shrink = jnp.exp2(top - new)
        v = head.load(qkv, keys, V)
        mean = mean * shrink[:, None] + plgpu.dot(p.astype(v.dtype), v)
        return new, total * shrink + p.sum(axis=1), mean

    start = (
        jnp.full((own.size,), -jnp.inf, jnp.float32),
        jnp.zeros((own.size,), jnp.float32),
        jnp.zeros((own.size, head.width), jnp.float32),
    )
    top, total, mean = head.fold(step, start, FORWARD.across)
    head.store(out, own, mean / total[:, None])
    head.store(lse, own, top + jnp.log2(total), None)


def _backward_rows(head: _Head, block, qkv, lse, dout, delta, dqkv):
    """The gradients of one block of keys and values, then that of the same queries.

    Rows beyond the sequence are read as zeros. Those of queries then add nothing; those
    of keys have to be masked, since exp2(0 - lse) may overflow.
    """
    size = _block(head.tokens, BACKWARD.rows)
    own = head.rows(block, size)
    alone = size >= head.tokens
    scale = head.width**-0.5
    k, v = head.load(qkv, own, K), head.load(qkv, own, V)
    zero = jnp.zeros((size, head.width), jnp.float32)

    def keys_first(queries, carry):
        dk, dv, _ = carry
        q, do = head.load(qkv, queries, Q), head.load(dout, queries)
        logits = plgpu.dot(k, q, trans_b=True) * (scale * np.log2(np.e))
        p = jnp.exp2(logits - head.load(lse, queries, None)[None])
        if alone and own.real is not None:
            p = jnp.where(own.real[:, None], p, 0.0)
        dp = plgpu.dot(v, do, trans_b=True) - head.load(delta, queries, None)[None]
        dlogits = (p * dp).astype(q.dtype)
        dv = dv + plgpu.dot(p.astype(q.dtype), do)
        dk = dk + plgpu.dot(dlogits, q)
        return dk, dv, dlogits if alone else None

    if alone:
        dk, dv, dlogits = keys_first(own, (zero, zero, None))
        dq = plgpu.dot(dlogits, k, trans_a=True)
    else:
        dk, dv, _ = head.fold(keys_first, (zero, zero, None), BACKWARD.across)
        dq = None
    head.store(dqkv, own, dk * scale, K)
    head.store(dqkv, own, dv, V)

    if dq is None:
        q, do = head.load(qkv, own, Q), head.load(dout, own)
        own_lse = head.load(lse, own, None)[:, None]
        own_delta = head.load(delta, own, None)[:, None]

        def queries_first(keys, dq):
            k = head.load(qkv, keys, K)
            logits = plgpu.dot(q, k, trans_b=True) * (scale * np.log2(np.e))
            p = jnp.exp2(logits - own_lse)
            if keys.real is not None:
                p = jnp.where(keys.real[None], p, 0.0)
            dp = plgpu.dot(do, head.load(qkv, keys, V), trans_b=True) - own_delta
            return dq + plgpu.dot((p * dp).astype(k.dtype), k)

        dq = head.fold(queries_first, zero, BACKWARD.across)
    head.store(dqkv, own, dq * scale, Q)


class _Call(NamedTuple):
    """What is known when a call is traced."""

    layout: Layout
    heads: int
    mesh: jax.sharding.AbstractMesh
    interpret: bool

    def shared(self, function, *arrays):
        """function(call, arrays [W,..]), on every device for its own groups."""
        function = functools.partial(function, self)
        if not self.mesh.empty and self.mesh.size > 1:
            groups = PartitionSpec(self.mesh.axis_names)
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=groups,
                out_specs=groups,
                check_vma=False,
            )
        return function(*arrays)

    def launch(self, name, body, tiles: Tiles, products, arrays, makes):
        """body(head, block, *refs) in a program for every block of every head.

        products(t): how many products of t x t x E a head of t tokens takes, said in
        the compiled program. arrays: what is read, qkv first. makes: (shape, parts) of
        each output; its rows of padding are set to zero.
        """
        layout, heads = self.layout, self.heads
        w, _, d = arrays[0].shape
        blocks = [pl.cdiv(t, _block(t, tiles.rows)) for _, t in layout.views]
        counts = [r * n for (r, _), n in zip(layout.views, blocks, strict=True)]
        padding = layout.rows - layout.used
        flops = sum(2 * r * products(t) * t * t * d // 3 for r, t in layout.views) * w

        def kernel(*refs):
            # Heads of a row lie side by side in memory, so they run side by side.
            here, group = pl.program_id(0), pl.program_id(1)
            place, index = jax.lax.div(here, heads), jax.lax.rem(here, heads)

            def head(row, t):
                return _Head(group, index, row, t, heads, d // 3 // heads)

            def blocks_of_view(start, t, n, first):
                number = jax.lax.div(place - first, n)
                # Its range is then known: 167 registers, by subtraction 219.
                block = jax.lax.rem(place - first, n)
                body(head(start + number * t, t), block, *refs)

            def clear():
                # A row that is traced: constants are checked for bounds.
                end = head(layout.used + place, padding)
                for ref, (_, parts) in zip(refs[len(arrays) :], makes, strict=True):
                    for part in parts:
                        end.clear(ref, part)

            first = 0
            for start, (_, t), n, count in zip(
                layout.starts, layout.views, blocks, counts, strict=True
            ):
                pl.when((place >= first) & (place < first + count))(
                    functools.partial(blocks_of_view, start, t, n, first)
                )
                first += count
            if padding:
                pl.when(place == 0)(clear)

        return pl.pallas_call(
            kernel,
            out_shape=[shape for shape, _ in makes],
            grid=(sum(counts) * heads, w),
            compiler_params=plgpu.CompilerParams(
                num_warps=tiles.warps, num_stages=tiles.stages
            ),
            interpret=self.interpret,
            name=name,
            metadata={"flops": str(flops)},
        )(*arrays)


def _forward(call: _Call, qkv):
    """[W,R,3D] -> out [W,R,D], lse [W,A,R] float32."""
    w, r, d = qkv.shape
    out = jax.ShapeDtypeStruct((w, r, d // 3), qkv.dtype)
    lse = jax.ShapeDtypeStruct((w, call.heads, r), jnp.float32)
    makes = (out, (0,)), (lse, (None,))
    name = "attention_forward"
    return call.launch(name, _forward_rows, FORWARD, lambda t: 2, (qkv,), makes)


def _backward(call: _Call, qkv, out, lse, dout):
    """The gradient of `_forward`'s out: that of qkv, [W,R,3D]."""
    w, r, d = out.shape
    product = out.astype(jnp.float32) * dout.astype(jnp.float32)
    delta = product.reshape(w, r, call.heads, d // call.heads).sum(-1).swapaxes(1, 2)
    makes = ((jax.ShapeDtypeStruct(qkv.shape, qkv.dtype), (Q, K, V)),)
    arrays = qkv, lse, dout, delta

    def products(t):  # logits and their gradient twice where queries lie elsewhere
        return 5 if t <= _block(t, BACKWARD.rows) else 7

    name = "attention_backward"
    return call.launch(name, _backward_rows, BACKWARD, products, arrays, makes)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, qkv):
    return call.shared(_forward, qkv)[0]


def _attention_forward(call, qkv):
    out, lse = call.shared(_forward, qkv)
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "lse")
    return out, (qkv, out, lse)


def _attention_backward(call, kept, dout):
    return (call.shared(_backward, *kept, dout),)


_attention.defvjp(_attention_forward, _attention_backward)


def triton_attention(qkv, layout: Layout, num_heads: int, *, interpret: bool = False):
    """softmax(q k^T E^-0.5) v in every sequence and head: [W,R,3D] -> [W,R,D].

    qkv: the layout's packed rows, their last axis ordered (three, A, E), bfloat16 (as
    meant), float16 or float32, whose products a GPU may round to TF32. Padding rows
    give zeros, and a zero gradient. Softmax and sums are float32; its weights are cast
    to the dtype before they meet v. Under a mesh of several devices
    (`jax.sharding.use_abstract_mesh`) the groups lie over all its axes; without one XLA
    would run the whole on every device. interpret: by XLA, on any platform, slowly.
    What the gradient needs is named "attention" [W,R,D] and "lse" [W,A,R] (to base 2),
    so that a rematerialisation policy can keep it.

    Raises ValueError when the rows are not the layout's, E is no power of 2 from 16 on,
    or the mesh cannot share the groups.
    """
    w, r, d = qkv.shape
    if (w, r) != (layout.groups, layout.rows):
        raise ValueError(f"rows {(w, r)} are not those of {layout}")
    e, rest = divmod(d, 3 * num_heads)
    if rest or e < SMALLEST or e & (e - 1):
        raise ValueError(f"{d} columns are not 3 x {num_heads} heads of 16, 32, 64 ..")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and w % mesh.size:
        raise ValueError(f"{w} groups cannot be shared by {mesh.size} devices")
    return _attention(_Call(layout, num_heads, mesh, interpret), qkv)
