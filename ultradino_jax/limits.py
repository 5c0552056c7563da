"""What the values of a config may be: a table per kind of run, checked in one place.

A table names every key of a config with its limit. A value beyond its limit, a key
that is missing and one that nobody would read are refused before anything is built.
What depends on two values or on the data is checked where they meet.
"""

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from ultradino_jax.errors import UserError

# Steps and sizes become int32 on the devices.
MOST = 2**31 - 1


class Limit(NamedTuple):
    """allows(value) says whether it may be; words end the sentence 'it must be ..'."""

    allows: Callable[[Any], bool]
    words: str


def _finite(value) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _range(low, high) -> str:
    return f"of at least {low}" if high in (MOST, math.inf) else f"{low} to {high}"


def integer(low: int = 0, high: int = MOST) -> Limit:
    """A whole number from `low` to `high`, both included."""

    def allows(value):
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        return is_whole and low <= int(value) <= high

    return Limit(allows, f"a whole number {_range(low, high)}")


def number(low: float = 0, high: float = math.inf) -> Limit:
    """A finite number from `low` to `high`, both included."""
    allows = lambda v: _finite(v) and low <= v <= high  # noqa: E731
    return Limit(allows, f"a number {_range(low, high)}")


def positive(high: float = math.inf) -> Limit:
    """A finite number above 0, at most `high`."""
    most = "" if high == math.inf else f" and at most {high}"
    return Limit(lambda v: _finite(v) and 0 < v <= high, f"a number above 0{most}")


def below(high: float) -> Limit:
    """A number from 0 on, below `high`."""
    allows = lambda v: _finite(v) and 0 <= v < high  # noqa: E731
    return Limit(allows, f"a number from 0 to below {high}")


def choice(values: Collection) -> Limit:
    """One of some words or numbers."""

    def allows(value):
        return any(type(value) is type(v) and value == v for v in values)

    return Limit(allows, f"one of {', '.join(map(repr, values))}")


TEXT = Limit(lambda value: isinstance(value, str), "text")
FLAG = Limit(lambda value: isinstance(value, bool), "True or False")
# numpy's and JAX's generators take 32 bits.
SEED = integer(0, 2**32 - 1)


def optional(limit: Limit) -> Limit:
    """The same, or None."""
    return Limit(lambda v: v is None or limit.allows(v), f"None or {limit.words}")


def several(limit: Limit, *, least: int = 0) -> Limit:
    """A sequence of at least so many different values, each within the limit."""

    def allows(value):
        listed = isinstance(value, tuple | list)
        if not listed or len(value) < least or not all(map(limit.allows, value)):
            return False
        return len(set(value)) == len(value)

    return Limit(
        allows, f"{least} or more different values, each of them {limit.words}"
    )


def pair(limit: Limit, *, ascending: bool = False) -> Limit:
    """Two values within the limit, the second not below the first if `ascending`."""

    def allows(value):
        listed = isinstance(value, tuple | list) and len(value) == 2
        if not listed or not all(map(limit.allows, value)):
            return False
        return not ascending or value[0] <= value[1]

    order = ", in ascending order" if ascending else ""
    return Limit(allows, f"two values{order}, each of them {limit.words}")


def check(
    config: Any,
    limits: Mapping[str, Limit],
    optional_keys: Collection[str] = (),
) -> None:
    """Raises UserError naming the first key that is beyond its limit, and the limit.

    config: a ConfigDict or dict of dicts. limits: {dotted key: limit}; all but
    `optional_keys` must be there, and no other key may be.
    """
    values = dict(_leaves(config))
    for key in (*limits, *values):
        if key not in limits:
            raise UserError(f"the config has no key {key!r}: nothing would read it")
        if key not in values:
            if key not in optional_keys:
                raise UserError(f"the config lacks the key {key!r}")
        elif not limits[key].allows(values[key]):
            raise UserError(
                f"config.{key}={values[key]!r}: it must be {limits[key].words}"
            )


def _leaves(section: Mapping[str, Any], prefix: str = ""):
    for key, value in section.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
