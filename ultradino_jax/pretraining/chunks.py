"""Losses against prototypes whose logits exist a chunk at a time."""

import functools

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_over_chunks(losses_of, kernel, rows, targets):
    """Losses of rows against prototypes, the [rows,K] logits alive a chunk at a time.

    losses_of: functions, one for each entry of rows and targets (tuples of trees):
    loss(kernel, rows [c,..], targets) -> (loss, aux) of one chunk of one group.
    rows: arrays [n,W,c,..], differentiable; targets: (arrays [n,W,c,..], constants),
    not differentiated. kernel [E,K] is shared by all.

    Returns (total, aux): the sum of all losses, and a tuple with the aux of each
    function, summed over chunks; both are means over groups. aux has no gradient.

    The forward pass takes the gradient of each chunk while its logits exist, so that
    nothing of the size [rows,K] is kept or computed twice. The kernel's gradient is
    summed with the group axis still on it: summed over groups inside the loop it
    would be sent between devices once per chunk.
    """
    return _chunks_forward(losses_of, kernel, rows, targets)[0]


def _chunks_forward(losses_of, kernel, rows, targets):
    num_groups = jax.tree.leaves(rows)[0].shape[1]
    sums = []  # of each function: (loss [W], aux with [W,..])
    row_grads = []
    kernel_grad = jnp.zeros((num_groups, *kernel.shape), jnp.float32)
    for loss_of, r, (data, constants) in zip(losses_of, rows, targets, strict=True):

        def one_group(kernel, r, data, loss_of=loss_of, constants=constants):
            grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
            return grad(kernel, r, (data, constants))

        def body(carry, chunk, one_group=one_group):
            step = jax.vmap(one_group, in_axes=(None, 0, 0))
            value, (for_kernel, for_rows) = step(kernel, *chunk)
            return jax.tree.map(jnp.add, carry, (value, for_kernel)), for_rows

        shapes = jax.eval_shape(
            jax.vmap(one_group, in_axes=(None, 0, 0)),
            kernel,
            *jax.tree.map(lambda x: x[0], (r, data)),
        )[0]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (value, kernel_grad), for_rows = jax.lax.scan(
            body, (zeros, kernel_grad), (r, data)
        )
        sums.append(value)
        row_grads.append(jax.tree.map(lambda x: x / num_groups, for_rows))
    total = sum(loss for loss, _ in sums).mean()
    aux = jax.tree.map(lambda x: x.mean(axis=0), tuple(a for _, a in sums))
    return (total, aux), (tuple(row_grads), kernel_grad)


def _chunks_backward(losses_of, kept, cotangents):
    row_grads, kernel_grad = kept
    scale, _ = cotangents
    row_grads = jax.tree.map(lambda x: x * scale, row_grads)
    return kernel_grad.mean(axis=0) * scale, row_grads, None


summed_over_chunks.defvjp(_chunks_forward, _chunks_backward)
