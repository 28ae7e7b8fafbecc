"""What a tracker tells: changes of verdicts, as they happen, and a connection as it stands."""

from __future__ import annotations

from typing import NamedTuple

from virtgrid.tracker.connection import Connection, Exchange
from virtgrid.tracker.judge import reason_of, waiting_for
from virtgrid.tracker.views import ConnectionView, Verdict


class Change(NamedTuple):
    """A verdict changed, or a connection went away (verdict ``closed``): a journal's `connection` event."""

    at_s: float
    client: str
    server: str
    protocol: str
    verdict: str
    reason: str
    state: str


#: What makes a Change; its reason may still be the exchange that is waited for.
Told = tuple[float, str, str, str, str, str | Exchange, str]


def worded(told: Told) -> Change:
    """A change in words."""
    at_s, client, server, protocol, verdict, reason, state = told
    if not isinstance(reason, str):
        reason = waiting_for(reason)
    return Change(at_s, client, server, protocol, str(verdict), reason, state)


def view(conn: Connection, now_s: float, shown: Verdict | None = None) -> ConnectionView:
    """A connection as others see it; ``shown``: with that verdict, whatever its reason says."""
    client, server = conn.names
    verdict = conn.verdict or Verdict.UNKNOWN
    return ConnectionView(
        client=client,
        server=server,
        protocol=conn.label,
        state=conn.state,
        verdict=shown or verdict,
        reason=reason_of(conn, conn.state, verdict, now_s),
        since_s=conn.since_s,
        requests=conn.requests,
        responses=conn.responses,
        large_transfers=conn.large_transfers,
        gaps=conn.gaps,
        bytes_to_client=conn.server.position,
        bytes_to_server=conn.client.position,
    )
