"""Flag parsing that answers a wrong key or file with one line."""

import sys
from collections.abc import Callable

from absl import app


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        # ml_collections names only the last part of the key it does not know.
        key = getattr(error, "name", None) or str(error).split("'")[1]
        given = [a.split("=")[0] for a in argv if a.split("=")[0].endswith(f".{key}")]
        name = given[0].removeprefix("--config.") if given else key
        sys.exit(f"error: the config has no key {name!r}")
    except OSError as error:
        sys.exit(f"error: the config file cannot be read: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def run(main: Callable[[list[str]], object]) -> None:
    """absl's app.run for a program with a --config flag."""
    app.run(main, flags_parser=_parse_flags)
