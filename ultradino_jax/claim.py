"""This folder belongs to this job: noted by the first run, checked by every later one.

A job is told by named settings. Another job in its folder is refused with a line that
names each setting that differs, so that nothing is mixed and nothing is overwritten.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ultradino_jax.errors import UserError
from ultradino_jax.whole import read_json, write_json


def flat(settings: Mapping, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, values as JSON gives them back."""
    values = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return values


def differing(
    there: Mapping,
    now: Mapping,
    *,
    free: Collection[str] = (),
    missing: Mapping[str, Any] | None = None,
) -> list[str]:
    """One text for each setting that differs, by name.

    free: names that may differ. missing: what a setting stands for in a record that
    was written before it existed.
    """
    old, new = flat(missing or {}) | flat(there), flat(now)
    return [
        f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in free
    ]


def _short(value) -> str:
    text = repr(value)
    is_digest = isinstance(value, str) and len(value) == 64
    return f"{text[:13]}.." if is_digest else text


def check_same(
    there: Mapping, now: Mapping, place: str | Path, what: str, advice: str, **options
) -> None:
    """Raises UserError naming what differs when a place holds the work of another job.

    what: 'a run', 'parts', ..; advice: what to do instead; options: of `differing`.
    """
    found = differing(there, now, **options)
    if found:
        raise UserError(
            f"{str(place)!r} holds {what} with other settings ({'; '.join(found)}); "
            f"{advice}"
        )


def claim(
    record: Path, settings: Mapping, what: str, advice: str, **options
) -> dict[str, Any] | None:
    """Note the settings in a JSON file, or check that the ones there are the same.

    Returns the record that was there, or None for a fresh folder. Raises UserError as
    `check_same`, and when the record is damaged.
    """
    if record.is_file():
        there = read_json(record)
        check_same(there, settings, record.parent, what, advice, **options)
        return there
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)
    return None
