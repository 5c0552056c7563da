"""What a user can mend, told apart from what a programmer must."""

import contextlib
import errno
import os
import re
import sys
import zipfile
from collections.abc import Iterator

# The file system's own failures: whatever a file holds, they may be gone later.
# Libraries that wrap them leave the system's words or the error's name in their texts.
_FAILURES = {
    code: os.strerror(code)
    for code in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EFBIG,
        errno.EIO,
        errno.ESTALE,
        errno.EACCES,
        errno.EPERM,
        errno.ETIMEDOUT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOLCK,
        errno.EBUSY,
        errno.EREMOTEIO,
        errno.ECONNRESET,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENXIO,
        errno.ENODEV,
    )
}
_NAMES = re.compile(
    r"\b(" + "|".join(errno.errorcode[code] for code in _FAILURES) + r")\b"
)
# A file that is not there, or is of another kind, is damage.
_OF_CONTENTS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError)
_MEMORY = "RESOURCE_EXHAUSTED"
_NO_BACKEND = "Unable to initialize backend"


class UserError(ValueError):
    """Bad input; the message is one line that says what and where.

    `cli` prints it without a traceback and ends the command with exit code 1. Every
    other exception, OSError apart, is a fault of the program and keeps its traceback.
    """


class Paused(Exception):
    """The work was saved on a signal; the message says where it goes on."""


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


class StaleFile(UserWarning):
    """A file that was made from a run is not of the run's newest checkpoint."""


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
        raise UserError(prefix + first_line(error)) from error


# What Python, NumPy and JAX raise for a record that is not what it should be.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
)


@contextlib.contextmanager
def damaged(place: object) -> Iterator[None]:
    """Whatever a damaged file makes the code inside raise becomes a UserError.

    place: the file or folder, to be named. For the few lines that turn the contents of
    a file into objects, and no others: they would hide a fault of the program.
    """
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        what = first_line(error)
        if isinstance(error, KeyError):
            what = f"it lacks {what}"
        raise UserError(f"{place}: its record is damaged: {what}") from error


def user_line(error: BaseException) -> str | None:
    """The line for an error that a user can mend, None for a fault of the program."""
    if isinstance(error, UserError | OSError):
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return "out of memory: smaller batches or images, or fewer workers need less"
    text = str(error)
    disk = next((line for line in text.splitlines() if _on_disk(line)), "")
    if disk:  # TensorStore calls a full disk RESOURCE_EXHAUSTED, too
        return disk.strip()[-200:]
    if _MEMORY in text:
        return (
            f"the device is out of memory: {first_line(error)} (a smaller batch_size "
            "needs less, and so does model.remat='norms')"
        )
    platforms = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}"
    if _NO_BACKEND in text:
        return f"{first_line(error)} ({platforms})"
    # Without an NVIDIA card JAX skips 'cuda' and then asserts that something is left.
    if isinstance(error, AssertionError) and _no_backend():
        return f"{platforms}, but there is no such device here"
    return str(error.__cause__) if isinstance(error.__cause__, OSError) else None


def out_of_memory(error: BaseException) -> bool:
    """Whether a host or a device ran out of memory."""
    return isinstance(error, MemoryError) or _MEMORY in str(error)


def of_file_system(error: BaseException | None) -> bool:
    """Whether the file system failed, and not what a file holds.

    Also where a library wrapped the error or kept only its words. Such an error may be
    gone at the next try; it says nothing about the file.
    """
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, _OF_CONTENTS):
            if error.errno is not None:  # Pillow and others raise it for contents, too
                return True
        elif _on_disk(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_disk(text: str) -> bool:
    words = any(words in text for words in _FAILURES.values())
    return words or _NAMES.search(text) is not None


def _no_backend() -> bool:
    """Whether JAX has been imported and finds no device at all."""
    if "jax" not in sys.modules:
        return False
    try:
        sys.modules["jax"].devices()
    except Exception:
        return True
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; else its name."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:200]
