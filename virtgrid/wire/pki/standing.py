"""How long a certificate is good, in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from cryptography import x509

from virtgrid.core.errors import RefusedError
from virtgrid.wire.certificates import identity_of
from virtgrid.wire.pki.signing import host_names
from virtgrid.wire.tls import RENEW_BEFORE


class Validity(StrEnum):
    GOOD = "good"
    ENDS_SOON = "ends soon"
    ENDED = "ended"
    NOT_YET = "not yet good"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """identity: of an authority its name, as in its certificate. serial: hexadecimal."""

    identity: str
    hosts: tuple[str, ...]
    serial: str
    until: datetime
    days_left: int
    validity: Validity


def standing(certificate: x509.Certificate, *, now: datetime, revoked: bool = False) -> Standing:
    """What is to be said about a certificate at this moment."""
    try:
        identity = str(identity_of(certificate))
    except RefusedError:
        identity = certificate.subject.rfc4514_string()
    until = certificate.not_valid_after_utc
    return Standing(
        identity=identity,
        hosts=tuple(host_names(certificate)),
        serial=f"{certificate.serial_number:x}",
        until=until,
        days_left=(until - now).days,
        validity=Validity.REVOKED if revoked else _validity(certificate, now),
    )


def _validity(certificate: x509.Certificate, now: datetime) -> Validity:
    if now >= certificate.not_valid_after_utc:
        return Validity.ENDED
    if now < certificate.not_valid_before_utc:
        return Validity.NOT_YET
    if certificate.not_valid_after_utc - now < RENEW_BEFORE:
        return Validity.ENDS_SOON
    return Validity.GOOD
