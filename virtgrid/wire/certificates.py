"""Reading certificates: whose one is, and files of them, with bounds and errors that name the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from virtgrid.core.errors import RefusedError
from virtgrid.wire.identity import Identity

FILE_LIMIT_BYTES: Final = 1 << 20
_LIST_BEGIN: Final = b"-----BEGIN X509 CRL-----"
_LIST_END: Final = b"-----END X509 CRL-----"


def identity_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Identity:
    """Whose a certificate is, or is to be. Errors: RefusedError when it names nobody of the grid."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = list(names.get_values_for_type(x509.UniformResourceIdentifier))
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    found = [uri for uri in uris if uri.startswith("virtgrid:")]
    if len(found) != 1:
        raise RefusedError(
            "the certificate names nobody of the grid", hint="it has no one URI virtgrid://SITE/ROLE/NAME"
        )
    return Identity.parse(found[0])


def read_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Errors: RefusedError."""
    try:
        return x509.load_pem_x509_certificates(read_pem(path))
    except ValueError as error:
        raise RefusedError(f"there is no certificate in {path}", cause=str(error)) from error


def read_pem(path: Path) -> bytes:
    """A file of bounded size. Errors: RefusedError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read", cause=error.strerror) from error
    if len(data) > FILE_LIMIT_BYTES:
        raise RefusedError(f"{path} is too large for certificates")
    return data


def exists(path: Path) -> bool:
    """Whether there is such a file. Errors: RefusedError when that is not for us to know."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise RefusedError(f"{path} cannot be looked at", cause=error.strerror) from error
    return True


def issued(certificate: x509.Certificate, *, by: x509.Certificate) -> bool:
    """Whether this authority has signed it."""
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def parse_revoked(data: bytes, path: Path) -> list[x509.CertificateRevocationList]:
    """The lists of revoked certificates in PEM, whoever has signed them. Errors: RefusedError."""
    lists = []
    for part in data.split(_LIST_END)[:-1]:
        begin = part.find(_LIST_BEGIN)
        try:
            lists.append(x509.load_pem_x509_crl(part[max(begin, 0) :] + _LIST_END + b"\n"))
        except ValueError as error:
            raise RefusedError(f"{path} is no list of revoked certificates", cause=str(error)) from error
    return lists


def read_revoked(path: Path, authorities: Sequence[x509.Certificate]) -> list[x509.CertificateRevocationList]:
    """The lists of a PEM file, each signed by one of the authorities. Errors: RefusedError."""
    lists = parse_revoked(read_pem(path), path)
    if not lists:
        raise RefusedError(f"{path} is no list of revoked certificates")
    require_signed(lists, authorities, path)
    return lists


def require_signed(
    lists: Sequence[x509.CertificateRevocationList], authorities: Sequence[x509.Certificate], where: object
) -> None:
    """Errors: RefusedError when one of the lists is of nobody we trust."""
    if not all(any(_signed(one, authority) for authority in authorities) for one in lists):
        raise RefusedError(f"{where} has a list of revoked certificates that nobody trusted here has signed")


def _signed(one: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    return one.issuer == authority.subject and one.is_signature_valid(key)  # type: ignore[arg-type]
