"""What there is to prepare: every file below the inputs, in a defined order."""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ultradino_jax.errors import UserError


class Entry(NamedTuple):
    """One file. root: number of its input; name: path below that input, with slashes.

    reason: why it is no file to read, "" otherwise.
    """

    root: int
    path: str
    name: str
    size: int
    mtime_ns: int
    reason: str = ""


def scan(inputs: list[str]) -> Iterator[Entry]:
    """Files below each input (a folder or one file), sorted by the bytes of the names.

    Links are followed; a folder is entered once, so that loops end. What cannot be
    listed or is no regular file comes with a reason.
    """
    seen: set[tuple[int, int]] = set()
    # A stack, not recursion: folders can be nested deeper than Python can call.
    stack = [(root, top, "") for root, top in enumerate(inputs)][::-1]
    while stack:
        root, path, name = stack.pop()
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                name = name or os.path.basename(path)
                yield Entry(root, path, name, status.st_size, status.st_mtime_ns)
                continue
            identity = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode) or identity in seen:
                yield Entry(root, path, name, 0, 0, "not_a_file")
                continue
            children = sorted(os.listdir(path), key=os.fsencode, reverse=True)
        except PermissionError:
            yield Entry(root, path, name, 0, 0, "no_permission")
            continue
        except OSError:  # broken link, link to itself, name too long
            yield Entry(root, path, name, 0, 0, "not_a_file")
            continue
        seen.add(identity)
        stack.extend(
            (root, os.path.join(path, child), f"{name}/{child}" if name else child)
            for child in children
        )


class Key:
    """Secret that turns names into ids. Without it the ids say nothing."""

    def __init__(self, secret: bytes):
        self._secret = secret

    @classmethod
    def load(cls, path: Path) -> "Key":
        """Reads the key file, or makes it, readable by its owner only.

        Raises UserError when the file holds no key.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            text = path.read_text(errors="replace").strip()
            try:
                secret = bytes.fromhex(text)
            except ValueError:
                secret = b""
            if len(secret) < 32:
                raise UserError(f"{path}: not a key file of prepare") from None
            return cls(secret)
        # Not written beside and renamed: of two runs that start together, one makes it.
        secret = secrets.token_bytes(32)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(secret.hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return cls(secret)

    def hash(self, purpose: str, *parts) -> bytes:
        """Keyed hash [12 bytes] of text and numbers."""
        # Names of files and patients may hold bytes that are no text.
        texts = (str(part).encode("utf-8", "surrogatepass") for part in parts)
        message = b"\0".join((purpose.encode(), *texts))
        return hmac.digest(self._secret, message, "sha256")[:12]

    def file_id(self, root: int, name: str, member: int = -1) -> bytes:
        """Id of one file, or of one member of an archive."""
        return self.hash("file", root, name, member)

    def inputs_digest(self, entries: list[Entry]) -> str:
        """Keyed hash of all names, sizes and times: says whether the inputs changed."""
        digest = hashlib.sha256()
        for entry in entries:
            fields = (entry.root, entry.name, entry.size, entry.mtime_ns, entry.reason)
            digest.update(ascii(fields).encode())
        return self.hash("inputs", digest.hexdigest()).hex()
