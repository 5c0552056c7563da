"""What a user can mend, told apart from what a programmer must."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input; the message is one line that says what and where.

    `cli` prints it without a traceback and ends the command with exit code 1. Every
    other exception, OSError apart, is a fault of the program and keeps its traceback.
    """


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


@contextlib.contextmanager
def as_user_error(prefix: str = "") -> Iterator[None]:
    """Turn a ValueError raised inside into a UserError.

    For the few places where values of a config or a file reach models and libraries,
    which raise ValueError for what they cannot use.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(prefix + lines[0].strip()) from error
