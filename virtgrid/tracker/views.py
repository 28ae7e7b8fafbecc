"""What the tracker tells others: a verdict with its reason per connection, and a snapshot of all.

The words are the paper's (Ishikawa et al. 2011, section 3.1): a connection is *suitable* when
stopping the guest now would not be noticed by its client. *Unknown* counts as unsuitable.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Verdict(StrEnum):
    """May the guest be stopped, as far as this connection is concerned?"""

    SUITABLE = "suitable"
    UNSUITABLE = "unsuitable"
    UNKNOWN = "unknown"


class ConnectionView(NamedTuple):
    """One connection as it stands. A tuple, which is made in a quarter of the time.

    client, server: ``address:port`` (IPv6 in brackets). state: the definition's state name.
    since_s: when the present verdict began, on the caller's clock.
    large_transfers: transfers judged large so far; ``bytes_*``: payload seen on the wire.
    """

    client: str
    server: str
    protocol: str
    state: str
    verdict: Verdict
    reason: str
    since_s: float
    requests: int = 0
    responses: int = 0
    large_transfers: int = 0
    gaps: int = 0
    bytes_to_client: int = 0
    bytes_to_server: int = 0

    @property
    def suitable(self) -> bool:
        return self.verdict is Verdict.SUITABLE

    def as_dict(self) -> dict[str, Any]:
        """As ``virtgrid track --json`` tells it."""
        return {
            "client": self.client,
            "server": self.server,
            "protocol": self.protocol,
            "requests": self.requests,
            "responses": self.responses,
            "state": self.state,
            "suitable": self.suitable,
            "reason": self.reason,
            "large_transfers": self.large_transfers,
            "gaps": self.gaps,
            "bytes_to_client": self.bytes_to_client,
            "bytes_to_server": self.bytes_to_server,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All connections of a guest at one moment (``at_s`` on the caller's clock)."""

    at_s: float
    connections: tuple[ConnectionView, ...] = ()

    @property
    def total(self) -> int:
        return len(self.connections)

    @property
    def suitable(self) -> int:
        return sum(1 for c in self.connections if c.verdict is Verdict.SUITABLE)

    @property
    def unknown(self) -> int:
        return sum(1 for c in self.connections if c.verdict is Verdict.UNKNOWN)

    @property
    def unsuitable(self) -> int:
        """Unsuitable or unknown: what counts against stopping now."""
        return self.total - self.suitable
