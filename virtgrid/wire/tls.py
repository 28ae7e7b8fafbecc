"""TLS 1.3 with certificates on both sides, and who a certificate is of.

``Tls`` is what a program brings to a network line: its certificate and key, and whom it trusts. Files are
read again when they have changed, so a renewed certificate or a longer list of revoked ones is used from the
next handshake on; what cannot be read leaves the old ones in use, and is told once.
"""

from __future__ import annotations

import logging
import ssl
from asyncio.sslproto import SSLProtocol
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import RefusedError
from virtgrid.wire.certificates import exists, identity_of, issued, read_certificates, read_revoked
from virtgrid.wire.identity import Identity, Role

RENEW_BEFORE: Final = timedelta(days=30)
"""A certificate that expires sooner is spoken of."""
_DAY: Final = timedelta(days=1)
# asyncio keeps so large a buffer for each TLS connection. Its 256 KiB would be 300 MB for a CRM with a
# thousand pilots, whose lines are short.
SSLProtocol.max_size = 32 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. key: mode 0600. trust: of authorities. revoked: their lists, if there are any."""

    certificate: Path
    key: Path
    trust: Path
    revoked: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    state: tuple[object, ...]
    server: ssl.SSLContext
    client: ssl.SSLContext
    identity: Identity
    until: datetime
    revoked: frozenset[tuple[bytes, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A certificate that was shown in a handshake, and what of it matters afterwards."""

    identity: Identity
    issuer: bytes
    serial: int
    until: datetime


class Tls:
    """Our side of every TLS line. pilots: the authority of our own tickets, which only a CRM has; whom it
    vouches for is a pilot and nothing else.
    """

    def __init__(
        self, files: TlsFiles, *, pilots: x509.Certificate | None = None, clock: Clock | None = None
    ) -> None:
        """Errors: RefusedError naming the file that is missing, unreadable, or does not fit the others."""
        self._files, self._pilots = files, pilots
        self.clock: Clock = clock or SystemClock()
        self._failed: tuple[object, ...] | None = None
        self._reminded: datetime | None = None
        self._loaded = self._load()

    @property
    def identity(self) -> Identity:
        """Who we are."""
        return self._now().identity

    def require_own(self) -> None:
        """Whether our own certificate is good. Errors: RefusedError: nobody would let us in, nor say why."""
        loaded = self._now()
        if loaded.until <= self.clock.utc():
            raise RefusedError(
                f"our own certificate {self._files.certificate} was good until {loaded.until:%Y-%m-%d}",
                hint=f"virtgrid pki request {loaded.identity.role} asks for another one",
            )

    def server_context(self) -> ssl.SSLContext:
        return self._now().server

    def client_context(self) -> ssl.SSLContext:
        return self._now().client

    def examine(self, der: bytes) -> Shown:
        """What a certificate says that a handshake has verified.

        Errors: RefusedError: of nobody, not its issuer's to give, revoked.
        """
        certificate = x509.load_der_x509_certificate(der)
        who = identity_of(certificate)
        if (who.role is Role.PILOT) != (self._pilots is not None and issued(certificate, by=self._pilots)):
            raise RefusedError(
                f"the certificate of {who} is signed by somebody who cannot vouch for a {who.role}"
            )
        shown = Shown(
            identity=who,
            issuer=certificate.issuer.public_bytes(),
            serial=certificate.serial_number,
            until=certificate.not_valid_after_utc,
        )
        self.require_good(shown)
        return shown

    def require_good(self, shown: Shown) -> None:
        """Cheap, and asked at every question: a line outlives neither its certificate nor a revocation.

        Errors: RefusedError.
        """
        if (shown.issuer, shown.serial) in self._now().revoked:
            raise RefusedError(f"the certificate of {shown.identity} has been revoked")
        if shown.until <= self.clock.utc():
            raise RefusedError(
                f"the certificate of {shown.identity} has expired",
                hint="virtgrid pki request there renews it",
            )

    def _now(self) -> _Loaded:
        self._remind()
        state = self._state()
        if state not in (self._loaded.state, self._failed):
            try:
                self._loaded = self._load()
                _log.info("certificates were read anew: %s", self._loaded.identity)
            except RefusedError as error:
                self._failed = state
                _log.warning("the certificates from before stay in use: %s (%s)", error.what, error.cause)
        return self._loaded

    def _remind(self) -> None:
        """Once a day, in time: a certificate that ends soon ends whatever runs with it."""
        now, loaded = self.clock.utc(), self._loaded
        if loaded.until - now >= RENEW_BEFORE or loaded.identity.role is Role.PILOT:
            return
        if self._reminded is None or now - self._reminded >= _DAY:
            self._reminded = now
            _log.warning(
                "%s is good until %s: virtgrid pki request", self._files.certificate, loaded.until.date()
            )

    def _state(self) -> tuple[object, ...]:
        files = self._files
        return tuple(_stamp(path) for path in (files.certificate, files.key, files.trust, files.revoked))

    def _load(self) -> _Loaded:
        files, state = self._files, self._state()
        own = read_certificates(files.certificate)[0]
        trust = read_certificates(files.trust)
        _require_private(files.key)
        callers = [*trust, *([self._pilots] if self._pilots else [])]
        return _Loaded(
            state=state,
            server=_context(ssl.PROTOCOL_TLS_SERVER, files, callers),
            client=_context(ssl.PROTOCOL_TLS_CLIENT, files, trust),
            identity=identity_of(own),
            until=own.not_valid_after_utc,
            revoked=_revoked(files.revoked, trust),
        )


def _context(protocol: int, files: TlsFiles, trust: list[x509.Certificate]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # Nobody resumes: every caller is verified anew, and no session outlives what it was based on.
        context.num_tickets = 0
    for certificate in trust:
        context.load_verify_locations(cadata=certificate.public_bytes(Encoding.DER))
    try:
        # The password is never asked for: a service has nobody to ask.
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise RefusedError(
            f"{files.certificate} and {files.key} are no pair",
            cause=getattr(error, "reason", None) or str(error),
        ) from error
    return context


def _stamp(path: Path | None) -> object:
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode)


def _require_private(key: Path) -> None:
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise RefusedError(f"the key {key} cannot be read", cause=error.strerror) from error
    if mode & 0o077:
        raise RefusedError(
            f"the key {key} may be read by others (mode {mode & 0o777:04o})", hint=f"chmod 600 {key}"
        )


def _revoked(path: Path | None, trust: list[x509.Certificate]) -> frozenset[tuple[bytes, int]]:
    if path is None or not exists(path):
        return frozenset()
    return frozenset(
        (one.issuer.public_bytes(), entry.serial_number) for one in read_revoked(path, trust) for entry in one
    )


# -- what went wrong, in words -------------------------------------------------------------------

_VERIFY: Final = {
    # OpenSSL: x509_vfy.h
    9: "its certificate is not yet valid",
    10: "its certificate has expired",
    18: "its certificate is of an authority that is not trusted here",
    19: "its certificate is of an authority that is not trusted here",
    20: "its certificate is of an authority that is not trusted here",
    21: "its certificate is of an authority that is not trusted here",
    26: "its certificate is not for this purpose",
    62: "its certificate is not for that name",
    64: "its certificate is not for that address",
}  # fmt: skip
_REASONS: Final = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS 1.3",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "HTTP_REQUEST": "it does not speak TLS",
    "HTTPS_PROXY_REQUEST": "it does not speak TLS",
}


def reason(error: Exception) -> str:
    """Why a handshake failed, as the second half of a sentence about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, f"its certificate is refused: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        name = error.reason or ""
        if "ALERT" in name:
            return _REASONS.get(name) or f"it refuses us ({name.lower().replace('_', ' ')})"
        return _REASONS.get(name) or f"it breaks TLS ({name.lower().replace('_', ' ') or error})"
    if isinstance(error, ConnectionAbortedError | TimeoutError):
        return "it did not finish the handshake in time"
    return "it hung up during the handshake"


def peer_certificate(ssl_object: ssl.SSLObject) -> bytes:
    """DER of the verified certificate at the other end."""
    found = ssl_object.getpeercert(binary_form=True)
    assert found is not None, "CERT_REQUIRED"
    return found
