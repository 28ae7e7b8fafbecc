"""What an authority hands out: a certificate, its own ones, and who is revoked, in one PEM file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from virtgrid.core.errors import RefusedError
from virtgrid.wire.certificates import parse_revoked, read_pem, require_signed
from virtgrid.wire.pki.signing import pem

HOSTS: Final = "virtgrid hosts"
GRID: Final = "virtgrid grid"
"""The units in the names of a grid's two authorities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """own: None where only whom to trust is told, or who is revoked."""

    own: x509.Certificate | None
    authorities: tuple[x509.Certificate, ...]
    revoked: tuple[x509.CertificateRevocationList, ...]

    def pem(self) -> bytes:
        parts = [pem(one) for one in (self.own, *self.authorities) if one is not None]
        return b"".join(parts) + b"".join(pem(one) for one in self.revoked)


def read(path: Path) -> Bundle:
    """Errors: RefusedError."""
    data = read_pem(path)
    revoked = parse_revoked(data, path)
    certificates = []
    if b"-----BEGIN CERTIFICATE-----" in data:
        try:
            certificates = x509.load_pem_x509_certificates(data)
        except ValueError as error:
            raise RefusedError(
                f"there is a certificate in {path} that nobody can read", cause=str(error)
            ) from error
    own = [one for one in certificates if not is_authority(one)]
    if len(own) > 1:
        raise RefusedError(f"{path} has {len(own)} certificates, and one is installed at a time")
    if not certificates and not revoked:
        raise RefusedError(f"there is no certificate in {path}", hint="virtgrid pki sign writes such a file")
    authorities = tuple(one for one in certificates if is_authority(one))
    return Bundle(own=own[0] if own else None, authorities=authorities, revoked=tuple(revoked))


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def newest(
    given: Sequence[x509.CertificateRevocationList],
    known: Sequence[x509.CertificateRevocationList],
    trust: Sequence[x509.Certificate],
) -> list[x509.CertificateRevocationList]:
    """Of every authority the latest list: an older one that turns up again pardons nobody.

    Errors: RefusedError when one given is of nobody who is trusted.
    """
    require_signed(given, trust, "this file")
    found: dict[bytes, x509.CertificateRevocationList] = {}
    for one in (*known, *given):
        issuer = one.issuer.public_bytes()
        if issuer not in found or number(one) > number(found[issuer]):
            found[issuer] = one
    return list(found.values())


def number(one: x509.CertificateRevocationList) -> int:
    return one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def hosts_authority(trust: Sequence[x509.Certificate]) -> x509.Certificate:
    """The one libvirt and QEMU are shown. Errors: RefusedError."""
    for one in trust:
        units = one.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        if any(unit.value == HOSTS for unit in units):
            return one
    raise RefusedError("no authority for hosts is among those trusted here")
