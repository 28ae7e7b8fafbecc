"""The two ssh key pairs of a sandbox. The private halves are written into its layer and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HOST_KEY: Final = "etc/ssh/ssh_host_ed25519_key"
USER_KEY: Final = "id_ed25519"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKeys:
    """What GET_KEYS answers: ``ssh-ed25519 AAAA… COMMENT`` each."""

    host: str
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """private: OpenSSH's own format, without a passphrase."""

    private: str
    public: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public})"


def make(comment: str) -> KeyPair:
    """A new Ed25519 pair (a tenth of a millisecond)."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return KeyPair(private=private.decode(), public=f"{public.decode()} {comment}")
