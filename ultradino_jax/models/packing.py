"""Token sequences of several lengths laid one after the other in rows: [W,R,D].

Crops of two sizes then share every matrix product: half the launches, and one gradient
of each weight to send between devices. A group's rows are padded: matrix units read
whole tiles, and XLA pads operands of other sizes itself, every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def padded_rows(used: int) -> int:
    """`used` rounded up to a multiple of 128 where that is little, else of 8."""
    multiple = 128 if used >= 4096 else 8
    return -(-used // multiple) * multiple


class Layout(NamedTuple):
    """Where the sequences of a group lie: those of each view follow one another.

    views: (r, t) for each, r sequences of t tokens. groups: W, all alike.
    """

    groups: int
    views: tuple[tuple[int, int], ...]

    @property
    def used(self) -> int:
        """Rows of a group that hold tokens."""
        return sum(r * t for r, t in self.views)

    @property
    def rows(self) -> int:
        """R, `used` rounded up; the rest is padding.

        One view in one group, as evaluation has it, is not padded: its rows could then
        not lie over several devices without being sent around in every block.
        """
        alone = self.groups == len(self.views) == 1
        return self.used if alone else padded_rows(self.used)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each view."""
        ends = np.cumsum([r * t for r, t in self.views])
        return (0, *map(int, ends[:-1]))


def layout_of(shapes: Sequence[tuple[int, int]], groups: int) -> Layout:
    """The layout of views of these (B,T), each cut into `groups`.

    Raises ValueError when a B is no multiple of `groups`.
    """
    for b, _ in shapes:
        if b % groups:
            raise ValueError(f"{b} sequences cannot be cut into {groups} groups")
    return Layout(groups, tuple((b // groups, t) for b, t in shapes))


def pack(views, layout: Layout):
    """Arrays [B,T,D] of W groups -> [W,R,D]; padding is zero."""
    w = layout.groups
    parts = [rearrange(x, "(w r) t d -> w (r t) d", w=w) for x in views]
    if padding := layout.rows - layout.used:
        first = parts[0]
        parts.append(jnp.zeros((w, padding, first.shape[-1]), first.dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def unpack(x, layout: Layout):
    """The inverse of `pack`: [W,R,F] -> arrays [B,T,F]."""
    return tuple(
        rearrange(x[:, start : start + r * t], "w (r t) f -> (w r) t f", t=t)
        for start, (r, t) in zip(layout.starts, layout.views, strict=True)
    )


def unpack_last(x, layout: Layout):
    """`unpack` of a stack of them: [n,W,R,F] of one view -> [n,B,T,F]."""
    [(_, t)] = layout.views
    return rearrange(x[:, :, : layout.used], "n w (r t) f -> n (w r) t f", t=t)


def _gather(x, index):
    return jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(x, index)


@jax.custom_vjp
def take(x, index, inverse):
    """Rows `index` [W,m] of x [W,n,D] -> [W,m,D]; zero where an index is n or more.

    inverse [W,n] says where each row of x went, m or more where it went nowhere: with
    it the gradient is a gather too. A scatter would add in an order that changes from
    run to run on a GPU. Of a row that is taken twice only that place has a gradient.
    """
    del inverse
    return _gather(x, index)


take.defvjp(
    lambda x, index, inverse: (_gather(x, index), (index, inverse)),
    lambda kept, g: (_gather(g, kept[1]), None, None),
)


class Subset(NamedTuple):
    """Some sequences of every group, as rows.

    rows [W,R'] of the full layout, inverse [W,R] in the subset's `layout` (both out of
    bounds where there is none), scale [W or 1,R,1]: r/m of the view that a row is in.
    """

    layout: Layout
    rows: jax.Array
    inverse: jax.Array
    scale: jax.Array

    def of(self, x):
        """The subset's rows: [W,R,D] -> [W,R',D]."""
        return take(x, self.rows, self.inverse)

    def back(self, x):
        """[W,R',D] -> [W,R,D] in their places, times `scale`; zero elsewhere."""
        return take(x, self.inverse, self.rows) * self.scale.astype(x.dtype)


def random_subset(keys, layout: Layout, rate: float) -> Subset:
    """Exactly m = max(int(r(1-rate)),1) of the r sequences of each view and group.

    keys: one for each view. Indices never leave a group, so a group that lives on one
    device needs no communication.
    Source: DINOv2 `drop_add_residual_stochastic_depth`, where a group is a GPU.
    """
    w, nowhere = layout.groups, np.iinfo(np.int32).max
    kept = tuple((max(int(r * (1 - rate)), 1), t) for r, t in layout.views)
    smaller = Layout(w, kept)
    rows, inverse, scale = [], [], []
    for key, (r, t), (m, _), start, new_start in zip(
        keys, layout.views, kept, layout.starts, smaller.starts, strict=True
    ):
        order = jnp.argsort(jax.random.uniform(key, (w, r)), axis=1)
        place = jnp.argsort(order, axis=1)  # below m: kept
        token = jnp.arange(t)
        taken = start + order[:, :m, None] * t + token
        put = jnp.where(place < m, new_start + place * t, nowhere)[..., None]
        put = jnp.where(put < nowhere, put + token, nowhere)
        rows.append(taken.reshape(w, m * t))
        inverse.append(put.reshape(w, r * t))
        scale.append(np.full((1, r * t, 1), r / m, np.float32))

    def padded(parts, of: Layout, fill):
        parts = [*parts, np.full((parts[0].shape[0], of.rows - of.used), fill)]
        return jnp.concatenate(parts, axis=1).astype(jnp.int32)

    scale.append(np.ones((1, layout.rows - layout.used, 1), np.float32))
    return Subset(
        smaller,
        padded(rows, smaller, nowhere),
        padded(inverse, layout, nowhere),
        jnp.asarray(np.concatenate(scale, axis=1)),
    )
