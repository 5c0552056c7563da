"""The one boundary between the program and the shell, for every command.

What a user can mend ends with one line and exit code 1: bad input (UserError), files
that cannot be read or written (OSError, also when a library wraps it), memory that is
not there, a backend of JAX_PLATFORMS that is not installed. Everything else is a fault
of the program and keeps its traceback.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator

from absl import app

from ultradino_jax.errors import UserError

# What libraries that wrap the operating system's errors leave in their texts.
_DISK = {os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)}
_MEMORY = "RESOURCE_EXHAUSTED"
_NO_BACKEND = "Unable to initialize backend"


def user_line(error: BaseException) -> str | None:
    """The line for an error that a user can mend, None for a fault of the program."""
    if isinstance(error, UserError | OSError):
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return "out of memory: smaller batches or images, or fewer workers need less"
    text = _first_line(error)
    if _MEMORY in text:
        return f"the device is out of memory: {text[:200]}"
    if _NO_BACKEND in str(error):
        return (
            f"{text[:200]} (JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r})"
        )
    if any(words in str(error) for words in _DISK):
        return text[:200]
    cause = error.__cause__ or (
        None if error.__suppress_context__ else error.__context__
    )
    return str(cause) if isinstance(cause, OSError) else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """End the program with `error: LINE` and exit code 1 when a user can mend it."""
    try:
        yield
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


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
        last = str(error).strip().splitlines()[-1].strip()
        sys.exit(f"error: the config file cannot be read: {last}")


def run(main: Callable[[list[str]], object]) -> None:
    """absl's app.run for a program with a --config flag, inside the boundary."""

    def bounded(argv):
        with boundary():
            return main(argv)

    app.run(bounded, flags_parser=_parse_flags)
