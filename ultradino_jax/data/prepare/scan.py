"""Ids of what there is to prepare: keyed hashes of names."""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from ultradino_jax.data.formats.walk import Entry
from ultradino_jax.errors import UserError


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
