"""A grid's authority and certificates of its members, made in a moment, for tests that speak TLS."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.wire.identity import Identity
from virtgrid.wire.pki.authority import Authority
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.signing import LIFETIME
from virtgrid.wire.tls import Tls

CRM = "virtgrid://a/crm/crm"
GRC = "virtgrid://b/grc/grc"


class Grid:
    """One authority, below a directory of its own. at: where its members are called."""

    def __init__(
        self, directory: Path, clock: Clock | None = None, *, at: tuple[str, ...] = ("127.0.0.1", "localhost")
    ) -> None:
        self.directory, self.clock, self.at = directory, clock or SystemClock(), at
        self.authority = Authority.create(directory / "authority", "tests", now=self.now)

    @property
    def now(self) -> datetime:
        return self.clock.utc()

    def places(self, uri: str) -> Places:
        return Places(self.directory / uri.removeprefix("virtgrid://").replace("/", "-"))

    def enrol(self, uri: str, *, lifetime: timedelta = LIFETIME, ago: timedelta = timedelta(0)) -> Places:
        """Certificate and key for somebody of the grid."""
        identity, places = Identity.parse(uri), self.places(uri)
        hosts = [] if identity.role == "user" else list(self.at)
        asked_at = self.now - ago
        self.authority.enrol(places, identity, hosts, now=asked_at, lifetime=lifetime)
        return places

    def tls(self, uri: str, *, clock: Clock | None = None, **enrol: timedelta) -> Tls:
        places = self.enrol(uri, **enrol)
        return Tls(places.files(Identity.parse(uri).role), clock=clock or self.clock)
