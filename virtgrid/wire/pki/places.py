"""Where a host has its certificates: where libvirt and QEMU look for theirs, and virtgrid beside them.

Below one directory, ``/etc/pki`` (of users ``~/.pki``):

    CA/ libvirt/ qemu/                    a host's, as libvirt and QEMU name them
    virtgrid/trust.pem revoked.pem        whom the grid trusts, and no longer
    virtgrid/ROLEcert.pem private/ROLEkey.pem     of a coordinator or a user
    virtgrid/ROLE.csr private/ROLEkey.next.pem    asked for, and not yet signed

libvirt and QEMU are shown the authority of the hosts alone: to libvirtd any certificate it can verify is an
administrator's, and a user of the grid is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from virtgrid.core.errors import NotFoundError, RefusedError, UsageError
from virtgrid.wire.certificates import exists, identity_of, issued, read_certificates, read_pem, read_revoked
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki import bundle, request
from virtgrid.wire.pki.bundle import Bundle
from virtgrid.wire.pki.files import private_directory, put
from virtgrid.wire.pki.signing import host_names, key_pem, new_key, pem
from virtgrid.wire.tls import TlsFiles

SYSTEM: Final = Path("/etc/pki")
_LIBVIRT_CERTIFICATE: Final = "libvirt/servercert.pem"
_LIBVIRT_KEY: Final = "libvirt/private/serverkey.pem"
_HOST_CERTIFICATES: Final = (
    _LIBVIRT_CERTIFICATE, "libvirt/clientcert.pem", "qemu/server-cert.pem", "qemu/client-cert.pem",
)  # fmt: skip
_HOST_KEYS: Final = (
    _LIBVIRT_KEY, "libvirt/private/clientkey.pem", "qemu/server-key.pem", "qemu/client-key.pem",
)  # fmt: skip
_HOST_AUTHORITIES: Final = ("CA/cacert.pem", "qemu/ca-cert.pem")
_HOST_REVOKED: Final = ("CA/cacrl.pem", "qemu/ca-crl.pem")


#: A file, its content, and whether it is secret.
_Writing = tuple[Path, bytes, bool]


def default() -> Path:
    """The system's for root, else the user's own."""
    return SYSTEM if os.geteuid() == 0 else Path.home() / ".pki"


@dataclass(frozen=True, slots=True)
class Places:
    """The files below a directory."""

    directory: Path

    def files(self, role: Role) -> TlsFiles:
        """What ``virtgrid.wire.tls.Tls`` reads to be this role."""
        return TlsFiles(
            certificate=self.certificate(role), key=self.key(role), trust=self.trust, revoked=self.revoked
        )

    @property
    def trust(self) -> Path:
        return self.directory / "virtgrid/trust.pem"

    @property
    def revoked(self) -> Path:
        return self.directory / "virtgrid/revoked.pem"

    def certificate(self, role: Role) -> Path:
        below = _LIBVIRT_CERTIFICATE if role is Role.HOST else f"virtgrid/{role}cert.pem"
        return self.directory / below

    def key(self, role: Role) -> Path:
        below = _LIBVIRT_KEY if role is Role.HOST else f"virtgrid/private/{role}key.pem"
        return self.directory / below

    def next_key(self, role: Role) -> Path:
        return self.directory / f"virtgrid/private/{role}key.next.pem"

    def request(self, role: Role) -> Path:
        return self.directory / f"virtgrid/{role}.csr"

    def roles(self) -> list[Role]:
        """Those there is a certificate for."""
        return [role for role in Role if exists(self.certificate(role))]

    # -- asking ----------------------------------------------------------------------------------

    def ask(self, identity: Identity, hosts: Sequence[str], *, again: bool = False) -> Path:
        """Make a key and a request for it; returns the request's file. What is in use stays in use.

        again: in place of a request that is under way. Errors: RefusedError.
        """
        key_file, file = self.next_key(identity.role), self.request(identity.role)
        if exists(key_file) and not again:
            raise RefusedError(
                f"a request is under way already: {file}",
                hint="sign and install that one, or --force makes another, with another key",
            )
        key = new_key()
        text = request.write(key, identity, hosts)
        private_directory(key_file.parent)
        put(key_file, key_pem(key), secret=True)
        put(file, text)
        return file

    def ask_again(self, role: Role) -> tuple[Identity, list[str]]:
        """Who the certificate in use is for, and by which names: to be asked for anew.

        Errors: NotFoundError, RefusedError.
        """
        path = self.certificate(role)
        if not exists(path):
            raise NotFoundError(
                f"there is no certificate of a {role} at {path} to renew", hint="give --site, for a first one"
            )
        own = read_certificates(path)[0]
        return identity_of(own), host_names(own)

    # -- putting in place ------------------------------------------------------------------------

    def install(self, found: Bundle, *, now: datetime, force: bool = False) -> list[Path]:
        """Put what an authority gave in place; returns what was written. All is checked before.

        force: trust another authority than before. Errors: RefusedError.
        """
        todo = self._plan(found, now, force=force)
        for path, data, secret in todo:
            if path.parent.name == "private":
                private_directory(path.parent)
            put(path, data, secret=secret)
        if found.own is not None:
            role = identity_of(found.own).role
            self.next_key(role).unlink(missing_ok=True)
            self.request(role).unlink(missing_ok=True)
        return [path for path, _, _ in todo]

    def _plan(self, found: Bundle, now: datetime, *, force: bool) -> list[_Writing]:
        """What is to be written, whom to trust first: what follows is of no use without it."""
        trust, todo = self._trust(found, force=force)
        role = None if found.own is None else identity_of(found.own).role
        hosts = bundle.hosts_authority(trust)
        is_host = role is Role.HOST or self._is_host_of(hosts)
        if is_host:
            todo += self._shown_to_libvirt(hosts, force=force)
        if found.own is not None and role is not None:
            key = self._key_of(found.own, role)
            if not any(issued(found.own, by=one) for one in trust):
                raise RefusedError("this certificate is signed by nobody who is trusted here")
            if found.own.not_valid_after_utc <= now:
                raise RefusedError(
                    f"this certificate was good until {found.own.not_valid_after_utc:%Y-%m-%d}"
                )
            todo += self._pair(role, key_pem(key), pem(found.own))
        lists = bundle.newest(found.revoked, self._lists(trust, force=force), trust)
        if lists:
            todo.append((self.revoked, b"".join(pem(one) for one in lists), False))
        for one in lists:
            if is_host and one.issuer == hosts.subject:
                todo += [(self.directory / name, pem(one), False) for name in _HOST_REVOKED]
        return todo

    def _trust(self, found: Bundle, *, force: bool) -> tuple[list[x509.Certificate], list[_Writing]]:
        """Whom to trust, and what is to be written for that: nothing when they were trusted before."""
        given = list(found.authorities)
        before = read_certificates(self.trust) if exists(self.trust) else []
        if not given and not before:
            raise RefusedError(
                f"nobody is trusted below {self.directory} yet",
                hint="install the certificate first that virtgrid pki sign wrote",
            )
        if set(given) <= set(before):
            return before, []
        if before and not force:
            raise _other_authority(self.trust)
        return given, [(self.trust, b"".join(pem(one) for one in given), False)]

    def _is_host_of(self, authority: x509.Certificate) -> bool:
        """Whether libvirt's certificate here is of this authority, and not of one that was here before us."""
        path = self.certificate(Role.HOST)
        return exists(path) and issued(read_certificates(path)[0], by=authority)

    def _shown_to_libvirt(self, authority: x509.Certificate, *, force: bool) -> list[_Writing]:
        todo: list[_Writing] = []
        for name in _HOST_AUTHORITIES:
            path = self.directory / name
            before = read_certificates(path) if exists(path) else []
            if authority in before:
                continue
            if before and not force:
                raise _other_authority(path)
            todo.append((path, pem(authority), False))
        return todo

    def _pair(self, role: Role, key: bytes, certificate: bytes) -> list[_Writing]:
        if role is not Role.HOST:
            return [(self.key(role), key, True), (self.certificate(role), certificate, False)]
        keys = [(self.directory / name, key, True) for name in _HOST_KEYS]
        return [*keys, *((self.directory / name, certificate, False) for name in _HOST_CERTIFICATES)]

    def _key_of(self, certificate: x509.Certificate, role: Role) -> ec.EllipticCurvePrivateKey:
        for path in (self.next_key(role), self.key(role)):
            if not exists(path):
                continue
            key = _read_key(path)
            if key.public_key() == certificate.public_key():
                return key
        raise RefusedError(
            f"no key below {self.directory} belongs to this certificate of {identity_of(certificate)}",
            hint="install it where virtgrid pki request was called, with the same --directory",
        )

    def _lists(self, trust: list[x509.Certificate], *, force: bool) -> list[x509.CertificateRevocationList]:
        if not exists(self.revoked):
            return []
        try:
            return read_revoked(self.revoked, trust)
        except RefusedError:
            if force:
                return []
            raise


def _other_authority(path: Path) -> RefusedError:
    return RefusedError(
        f"{path} trusts another authority, and this certificate is not of it",
        hint="another --directory keeps both; --force replaces it",
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_pem(path), None)
    except (ValueError, TypeError) as error:
        raise RefusedError(f"{path} is no private key", cause=str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RefusedError(f"{path} is a key of another kind")
    return key


def role_of(text: str) -> Role:
    """Errors: UsageError."""
    asked = [role for role in Role if role is not Role.PILOT]
    if text not in asked:
        raise UsageError(f"'{text[:80]}' is no role", hint=f"one of {', '.join(asked)}")
    return Role(text)
