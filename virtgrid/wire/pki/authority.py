"""The directory of the one who signs: two keys, what they have signed, and what has been revoked.

    hosts.cert.pem hosts.key.pem     signs hosts; libvirt and QEMU trust it
    grid.cert.pem grid.key.pem       signs coordinators and users; only virtgrid trusts it
    issued/SERIAL.pem                every certificate, written before it is given out
    revoked.pem                      the lists of both, once there are any

It needs no network and serves none: requests come, and certificates go, as files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.wire.certificates import exists, identity_of, read_certificates, read_pem, read_revoked
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki import request
from virtgrid.wire.pki.bundle import GRID, HOSTS, Bundle, number
from virtgrid.wire.pki.files import private_directory, put
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.request import Request
from virtgrid.wire.pki.signing import LIFETIME, Signer, authority_name, key_pem, pem
from virtgrid.wire.pki.standing import Standing, standing

_UNITS: Final = {"hosts": HOSTS, "grid": GRID}


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """One grid's authority, in its directory."""

    directory: Path
    hosts: Signer
    grid: Signer

    @staticmethod
    def create(directory: Path, name: str, *, now: datetime) -> Authority:
        """A new one. Errors: RefusedError when there is one already: what it signed would lose its worth."""
        if any(exists(directory / f"{stem}.key.pem") for stem in _UNITS):
            raise RefusedError(
                f"there is an authority in {directory} already",
                hint="virtgrid pki list says whom it has signed",
            )
        private_directory(directory)
        signers = {}
        for stem, unit in _UNITS.items():
            signer = Signer.create(authority_name(name, unit), now=now)
            put(directory / f"{stem}.cert.pem", pem(signer.certificate))
            put(directory / f"{stem}.key.pem", key_pem(signer.key), secret=True)
            signers[stem] = signer
        return Authority(directory=directory, hosts=signers["hosts"], grid=signers["grid"])

    @staticmethod
    def load(directory: Path) -> Authority:
        """Errors: NotFoundError, RefusedError."""
        signers = {stem: _load(directory, stem) for stem in _UNITS}
        return Authority(directory=directory, hosts=signers["hosts"], grid=signers["grid"])

    @property
    def certificates(self) -> tuple[x509.Certificate, x509.Certificate]:
        return self.hosts.certificate, self.grid.certificate

    def sign(self, asked: Request, *, now: datetime, lifetime: timedelta = LIFETIME) -> Bundle:
        """A certificate for what was asked, with all its holder needs. Errors: RefusedError."""
        signer = self.hosts if asked.identity.role is Role.HOST else self.grid
        if signer.certificate.not_valid_after_utc <= now:
            raise RefusedError(f"the authority in {self.directory} has ended itself")
        own = signer.identify(asked.key, asked.identity, asked.hosts, now=now, until=now + lifetime)
        put(self.directory / "issued" / f"{own.serial_number:x}.pem", pem(own))
        return Bundle(own=own, authorities=self.certificates, revoked=tuple(self._lists()))

    def issued(self) -> list[x509.Certificate]:
        """All that was ever signed and has not ended long ago, the oldest first."""
        found = [read_certificates(path)[0] for path in (self.directory / "issued").glob("*.pem")]
        return sorted(found, key=lambda one: one.not_valid_before_utc)

    def standings(self, *, now: datetime) -> list[Standing]:
        """What is to be said about each certificate that was signed."""
        revoked = self._revoked()
        return [
            standing(one, now=now, revoked=(one.issuer.public_bytes(), one.serial_number) in revoked)
            for one in self.issued()
        ]

    def revoke(self, who: str, *, now: datetime) -> list[Standing]:
        """Revoke every certificate of an identity, or the one with a serial number; returns those that were
        good until now. Errors: NotFoundError.
        """
        with self._locked():
            revoked = self._revoked()
            chosen = [
                one
                for one in self.issued()
                if who.lower() in (str(identity_of(one)), f"{one.serial_number:x}")
                and one.not_valid_after_utc > now
                and (one.issuer.public_bytes(), one.serial_number) not in revoked
            ]
            if not chosen:
                raise NotFoundError(
                    f"no good certificate of '{who[:200]}' was signed here",
                    hint="virtgrid pki list lists them",
                )
            revoked |= {(one.issuer.public_bytes(), one.serial_number): now for one in chosen}
            lists = [self._list(signer, revoked, now) for signer in (self.hosts, self.grid)]
            put(self.revoked_file, b"".join(pem(one) for one in lists))
        return [standing(one, now=now, revoked=True) for one in chosen]

    @property
    def revoked_file(self) -> Path:
        return self.directory / "revoked.pem"

    def enrol(
        self, places: Places, identity: Identity, hosts: Sequence[str], *, now: datetime, lifetime: timedelta
    ) -> None:
        """Ask, sign and install in one go: where the authority's host is the certificate's as well."""
        asked = request.read(places.ask(identity, hosts, again=True))
        places.install(self.sign(asked, now=now, lifetime=lifetime), now=now, force=True)

    def _list(
        self, signer: Signer, revoked: dict[tuple[bytes, int], datetime], now: datetime
    ) -> x509.CertificateRevocationList:
        issuer = signer.certificate.subject
        ours = {serial: when for (by, serial), when in revoked.items() if by == issuer.public_bytes()}
        before = max((number(one) for one in self._lists() if one.issuer == issuer), default=0)
        return signer.revoke(ours, number=before + 1, now=now)

    def _lists(self) -> list[x509.CertificateRevocationList]:
        if not exists(self.revoked_file):
            return []
        return read_revoked(self.revoked_file, self.certificates)

    def _revoked(self) -> dict[tuple[bytes, int], datetime]:
        return {
            (one.issuer.public_bytes(), entry.serial_number): entry.revocation_date_utc
            for one in self._lists()
            for entry in one
        }

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Two who revoke at once: neither forgets what the other did."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _load(directory: Path, stem: str) -> Signer:
    path = directory / f"{stem}.key.pem"
    if not exists(path):
        raise NotFoundError(f"there is no authority in {directory}", hint="virtgrid pki init makes one")
    try:
        key = serialization.load_pem_private_key(read_pem(path), None)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{path} is no private key", cause=str(error)) from error
    certificate = read_certificates(directory / f"{stem}.cert.pem")[0]
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise RefusedError(f"{path} is not the key of {stem}.cert.pem")
    return Signer(key=key, certificate=certificate)
