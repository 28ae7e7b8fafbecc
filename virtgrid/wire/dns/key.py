"""The secret that signs updates, read from a file as ``tsig-keygen`` writes it and ``nsupdate -k`` reads it.

::

    key "virtgrid" {
        algorithm hmac-sha256;
        secret "base64";
    };
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError

ALGORITHMS: Final = ("hmac-sha1", "hmac-sha224", "hmac-sha256", "hmac-sha384", "hmac-sha512")
_SIZE_LIMIT_BYTES: Final = 16 << 10
#: A quoted text first: base64 may hold two slashes, which are no comment there.
_COMMENT: Final = re.compile(r'("[^"\n]*")|/\*.*?\*/|//[^\n]*|#[^\n]*', re.S)
_KEY: Final = re.compile(r'key\s+"?([A-Za-z0-9._-]{1,253})"?\s*\{([^{}]*)\}\s*;')
_FIELD: Final = re.compile(r'\s*(algorithm|secret)\s+"?([^\s";]+)"?\s*;')


@dataclass(frozen=True, slots=True, kw_only=True)
class TsigKey:
    """A key's name, its algorithm, and the secret, which no message and no journal ever shows."""

    name: str
    algorithm: str
    secret: bytes = field(repr=False)


def read_key(path: Path) -> TsigKey:
    """The one key of a file. Errors: RefusedError naming the file; the secret is never told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RefusedError(
            f"the key of the name server cannot be read from {path}",
            cause=error.strerror,
            hint="tsig-keygen -a hmac-sha256 NAME writes one; [dns] key in the configuration names its file",
        ) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError(f"{path} is not a file a key could be in")
        if found.st_mode & 0o077:
            raise RefusedError(
                f"{path} holds a secret and others may read it (mode {found.st_mode & 0o777:04o})",
                hint=f"chmod 600 {path}; and make a new key if others are on this host",
            )
        data = os.read(descriptor, _SIZE_LIMIT_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _SIZE_LIMIT_BYTES:
        raise RefusedError(f"{path} is too large for a key")
    try:
        return parse_key(data.decode("ascii"))
    except ValueError as error:
        why = "it is not plain text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise RefusedError(
            f"{path} is not a key file: {why}", hint="tsig-keygen -a hmac-sha256 NAME writes one"
        ) from error


def parse_key(text: str) -> TsigKey:
    """The one key statement of a text. Pure. Errors: ValueError, without the text in it."""
    bare = _COMMENT.sub(lambda found: found[1] or " ", text)
    found = _KEY.findall(bare)
    if len(found) != 1 or _KEY.sub("", bare).strip():
        raise ValueError('it holds not one statement of the form key "NAME" { algorithm …; secret "…"; };')
    name, body = found[0]
    fields = dict(_FIELD.findall(body))
    if set(fields) != {"algorithm", "secret"} or _FIELD.sub("", body).strip():
        raise ValueError("the key has not exactly an algorithm and a secret")
    algorithm = fields["algorithm"].lower().rstrip(".")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"the algorithm is none of {', '.join(ALGORITHMS)}")
    try:
        secret = base64.b64decode(fields["secret"], validate=True)
    except binascii.Error:
        raise ValueError("the secret is not base64") from None
    if not secret:
        raise ValueError("the secret is empty")
    return TsigKey(name=name, algorithm=algorithm, secret=secret)
