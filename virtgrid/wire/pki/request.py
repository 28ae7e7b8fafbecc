"""What somebody asks an authority to sign: a PKCS #10 request (RFC 2986) with one identity and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from virtgrid.core.errors import RefusedError
from virtgrid.wire.certificates import identity_of, read_pem
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.signing import SERVING, alternative_names, host_names, pem, subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, and the public half of the key it is for."""

    identity: Identity
    hosts: tuple[str, ...]
    key: ec.EllipticCurvePublicKey


def write(key: ec.EllipticCurvePrivateKey, identity: Identity, hosts: Sequence[str]) -> bytes:
    """The request as PEM. Errors: RefusedError."""
    require_sense(identity.role, hosts)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject(identity))
        .add_extension(alternative_names(identity, hosts), critical=False)
        .sign(key, hashes.SHA256())
    )
    return pem(request)


def read(path: Path) -> Request:
    """A request, checked: its own key has signed it, and it asks only for what we can mean.

    Errors: RefusedError.
    """
    data = read_pem(path)
    try:
        found = x509.load_pem_x509_csr(data)
        key = found.public_key()
        genuine = found.is_signature_valid
        identity, hosts = identity_of(found), host_names(found)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(f"{path} is no request for a certificate", cause=str(error)) from error
    if not genuine:
        raise RefusedError(f"{path} is not signed by the key it is for")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise RefusedError(
            f"{path} has a key of another kind than P-256", hint="virtgrid pki request makes one"
        )
    require_sense(identity.role, hosts)
    alternative_names(identity, hosts)
    return Request(identity=identity, hosts=tuple(hosts), key=key)


def require_sense(role: Role, hosts: Sequence[str]) -> None:
    """Errors: RefusedError for what no certificate can be for."""
    if role is Role.PILOT:
        raise RefusedError("nobody asks for a pilot's certificate", hint="it comes with the pilot's ticket")
    if hosts and role not in SERVING:
        raise RefusedError(f"a {role} is called by nobody: its certificate has no host's name")
    if not hosts and role in SERVING:
        raise RefusedError(f"a {role} is called by a name or an address, and none is given", hint="--at HOST")
