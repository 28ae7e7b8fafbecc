"""Sealed texts: a body anybody can read, with an Ed25519 signature that says who wrote it (RFC 8032).

The form is ``BODY.SIGNATURE``, both base64url without padding (RFC 4648), one line. A ticket is such a text:
whoever holds the public key can tell whether it is genuine without asking anybody.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from virtgrid.core.errors import RefusedError

TEXT_LIMIT: Final = 16 << 10
# What is signed begins with this, so that no signature made for something else can pass for a seal.
_CONTEXT: Final = b"virtgrid seal v1\0"


def seal(body: bytes, key: Ed25519PrivateKey) -> str:
    """The body with its signature."""
    return f"{_encode(body)}.{_encode(key.sign(_CONTEXT + body))}"


def unseal(text: str, keys: Iterable[Ed25519PublicKey]) -> bytes:
    """The body, if one of the keys signed it. Errors: RefusedError."""
    body, signature = _parts(text)
    for key in keys:
        try:
            key.verify(signature, _CONTEXT + body)
        except InvalidSignature:
            continue
        return body
    raise RefusedError("nobody trusted here has signed this ticket")


def peek(text: str) -> bytes:
    """The body, whoever signed it: for its holder, who cannot check it. Errors: RefusedError."""
    return _parts(text)[0]


def _parts(text: str) -> tuple[bytes, bytes]:
    if len(text) > TEXT_LIMIT:
        raise RefusedError("the ticket is too long")
    body, dot, signature = text.strip().partition(".")
    try:
        if not dot:
            raise ValueError
        return _decode(body), _decode(signature)
    except (ValueError, binascii.Error):
        raise RefusedError("the ticket is torn: it is not two parts of base64url") from None


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)


# -- files ---------------------------------------------------------------------------------------


def write_private(path: Path, text: str) -> None:
    """A file of mode 0600 that was not there before. Errors: RefusedError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RefusedError(f"{path} cannot be written", cause=error.strerror) from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def read_private(path: Path, *, what: str) -> str:
    """A file that only its owner, who must be us, may read. Errors: RefusedError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, encoding="ascii") as file:
            found = os.fstat(descriptor)
            if found.st_mode & 0o077:
                raise RefusedError(
                    f"{what} {path} may be read by others (mode {found.st_mode & 0o777:04o})",
                    hint=f"chmod 600 {path}, and have a new one made if others can have read it",
                )
            if found.st_uid != os.geteuid():
                raise RefusedError(f"{what} {path} belongs to another user")
            return file.read(TEXT_LIMIT + 1)
    except UnicodeDecodeError:
        raise RefusedError(f"{what} {path} is not text") from None
    except OSError as error:
        raise RefusedError(f"{what} {path} cannot be read", cause=error.strerror) from error


def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def private_text(key: Ed25519PrivateKey) -> str:
    """The key as PEM (PKCS #8)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def public_text(key: Ed25519PublicKey) -> str:
    """The key as PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Errors: RefusedError."""
    text = read_private(path, what="the key")
    try:
        key = serialization.load_pem_private_key(text.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{path} is no private key", cause=str(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RefusedError(f"{path} is no Ed25519 key")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Errors: RefusedError."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise RefusedError(f"the key {path} cannot be read", cause=error.strerror) from error
    except ValueError as error:
        raise RefusedError(f"{path} is no public key", cause=str(error)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise RefusedError(f"{path} is no Ed25519 key")
    return key
