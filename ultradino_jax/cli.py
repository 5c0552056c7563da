"""The one boundary between the program and the shell, for every command.

What a user can mend ends with one line and exit code 1: bad input (UserError), files
that cannot be read or written (OSError, also when a library wraps it), memory that is
not there, a backend of JAX_PLATFORMS that is not installed. Everything else is a fault
of the program and keeps its traceback.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator

from absl import app

from ultradino_jax.errors import Paused, StaleFile, user_line

# sysexits.h EX_TEMPFAIL: saved on a signal, the same command goes on.
EXIT_PAUSED = 75


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """End the program with `error: LINE` and exit code 1 when a user can mend it.

    Work that was saved on a signal ends with `paused: LINE` and EXIT_PAUSED.
    """
    warnings.showwarning = _one_line(warnings.showwarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except Paused as paused:
        print(f"paused: {paused}", flush=True)
        sys.exit(EXIT_PAUSED)
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def _one_line(show):
    def shown(message, category, *place, **rest):
        if issubclass(category, StaleFile):
            print(f"warning: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *place, **rest)

    return shown


def command(main: Callable[..., object], *arguments) -> None:
    """Run the body of a `python -m` command inside the boundary."""
    with boundary():
        main(*arguments)


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
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        sys.exit(f"error: the config file cannot be read: {last}")


def run(main: Callable[[list[str]], object]) -> None:
    """absl's app.run for a program with a --config flag, inside the boundary."""

    def bounded(argv):
        with boundary():
            return main(argv)

    app.run(bounded, flags_parser=_parse_flags)
