"""Losses against prototypes whose logits exist a chunk at a time."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def chunk_size(rows: int, wanted: int) -> int:
    """The largest divisor of `rows` that is at most `wanted`, at least 1."""
    return max(c for c in range(1, max(min(rows, wanted), 1) + 1) if rows % c == 0)


def in_chunks(tree, size: int):
    """[W,R,..] -> [R/size,W,size,..] for every array; W stays where it is sharded."""

    def cut(x):
        x = x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(cut, tree)


class Part(NamedTuple):
    """A loss of rows against prototypes.

    loss(kernel, rows, targets, constants) -> (loss, aux), of one chunk of one group.
    rows, targets: trees of arrays [n,W,c,..], n chunks of c rows; `loss` sees [c,..].
    constants: a tree that all chunks see whole.
    """

    loss: Callable
    rows: Any
    targets: Any
    constants: Any


def summed(kernel, *parts: Part) -> tuple[jax.Array, tuple]:
    """Losses against the prototypes [E,K], the [rows,K] logits alive chunk by chunk.

    Returns (total, aux): the sum of all losses, and a tuple with the aux of each loss,
    summed over chunks; both are means over groups. Only kernel and rows are
    differentiated; aux has no gradient.

    The forward pass takes the gradient of each chunk while its logits exist, so that
    nothing of the size [rows,K] is kept or computed twice. The kernel's gradient is
    summed with the group axis still on it: summed over groups inside the loop it
    would be sent between devices once per chunk.
    """
    return _summed(kernel, *zip(*parts, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(kernel, losses_of, rows, targets, constants) -> Any:
    return _forward(kernel, losses_of, rows, targets, constants)[0]


def _forward(kernel, losses_of, rows, targets, constants):
    num_groups = jax.tree.leaves(rows)[0].shape[1]
    kernel_grad = jnp.zeros((num_groups, *kernel.shape), jnp.float32)
    sums, row_grads = [], []
    for parts in zip(losses_of, rows, targets, constants, strict=True):
        value, kernel_grad, for_rows = _one_loss(kernel, kernel_grad, *parts)
        sums.append(value)
        row_grads.append(jax.tree.map(lambda x: x / num_groups, for_rows))
    total = functools.reduce(jnp.add, [loss for loss, _ in sums]).mean()
    aux = jax.tree.map(lambda x: x.mean(axis=0), tuple(a for _, a in sums))
    return (total, aux), (tuple(row_grads), kernel_grad)


def _one_loss(kernel, kernel_grad, loss_of, rows, targets, constants):
    """((loss [W], aux [W,..]), kernel_grad + its own, gradient of the rows)."""

    def one_group(kernel, rows, targets):
        grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        return grad(kernel, rows, targets, constants)

    groups = jax.vmap(one_group, in_axes=(None, 0, 0))

    def body(carry, chunk):
        value, (for_kernel, for_rows) = groups(kernel, *chunk)
        return jax.tree.map(jnp.add, carry, (value, for_kernel)), for_rows

    first = jax.tree.map(lambda x: x[0], (rows, targets))
    value, _ = jax.eval_shape(groups, kernel, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), value)
    start = (zeros, kernel_grad)
    (value, kernel_grad), for_rows = jax.lax.scan(body, start, (rows, targets))
    return value, kernel_grad, for_rows


def _backward(losses_of, kept, cotangents):
    del losses_of
    row_grads, kernel_grad = kept
    scale, _ = cotangents
    row_grads = jax.tree.map(lambda x: x * scale, row_grads)
    return kernel_grad.mean(axis=0) * scale, row_grads, None, None


_summed.defvjp(_forward, _backward)
