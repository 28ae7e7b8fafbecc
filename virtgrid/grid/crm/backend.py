"""Whose nodes a site's manager (CRM) gives out: the interface behind it.

The CRM itself writes down which hold has which nodes and leads the pilots; a backend knows the nodes, keeps
them free for a window, and starts and ends the pilots on them. ``embedded`` does it on this very host.
What every backend must keep is tests/unit/test_crm_backend.py.

A hold is named by its key, a pilot by its sandbox. Every method may be said again with the same effect, after
a crash of the CRM too: a backend looks at what is there and remembers nothing that only its process knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from virtgrid.grid.messages.coalloc import Window
from virtgrid.wire.endpoint import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A time at which a node is somebody else's, whom the CRM's own table does not know; why: whose."""

    begins_at_s: int
    ends_at_s: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node there is. problem: why nothing can run on it now; None: it can. taken: in no order."""

    name: str
    problem: str | None = None
    taken: tuple[Taken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesPromised:
    """Nodes of a hold, for a window. reservation: its name, for people."""

    hold: str
    reservation: str
    nodes: tuple[str, ...]
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotOrder:
    """One pilot to start on one node of a hold.

    account: of the site's hosts, that it runs as. ticket: the whole text of its ticket's file, which only
    that account may read and which is never an argument. crm: where it dials in. window: after its end
    nothing of it may be left.
    """

    hold: str
    reservation: str
    node: str
    sandbox: str
    account: str
    ticket: str
    crm: Endpoint
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotUsage:
    """How long a node was a pilot's. cpu_s: of its processes, where the backend accounts for them."""

    sandbox: str
    elapsed_s: float
    cpu_s: float | None = None


class Backend(Protocol):
    """The nodes of a site. Errors: RefusedError, nothing changed; PeerUnreachableError: not known, say it
    again.

    names: of all nodes there are, in the order they are given out; the same ones while the CRM runs.
    guard_s: so long after a window its nodes are nobody's yet.
    """

    names: tuple[str, ...]
    guard_s: int

    async def nodes(self) -> tuple[Node, ...]:
        """How they are now, in their order."""

    async def problems(self) -> tuple[str, ...]:
        """What is wrong with its hosts now, a sentence each: nothing may be started there. For people, who
        ask how the site is; what is promised for later does not depend on it.
        """

    async def promise(self, what: NodesPromised) -> None:
        """Keep these nodes free for this window: an advance reservation. Said for a HOLD before it is
        answered, with nodes that no other hold has then; and again for its COMMIT and before the first
        pilots: the nodes are looked at each time. Errors: RefusedError when it cannot be (any more).
        """

    async def restore(self, promised: Sequence[NodesPromised]) -> Mapping[str, str]:
        """Keep these too where that was lost; of the holds for which it cannot be any more, why."""

    async def withdraw(self, hold: str) -> None:
        """Nothing is left of a hold: no reservation, no pilot that runs or waits, no file. Also of one nobody
        knows.
        """

    async def start(self, orders: Sequence[PilotOrder]) -> None:
        """Start pilots of a hold whose window has begun. One that waits or runs is left alone; one that has
        ended is started again.
        """

    async def running(self, hold: str) -> frozenset[str]:
        """The sandboxes whose pilots wait for their start or run."""

    async def stop(self, hold: str, sandboxes: Sequence[str]) -> None:
        """End these pilots: SIGTERM first, which to a pilot is SHUT_DOWN, and when that takes too long for
        good. Returns at once; ``running`` tells.
        """

    async def usage(self, hold: str) -> tuple[PilotUsage, ...]:
        """What its pilots have used so far; those the backend does not know (any more) are missing."""

    async def holds(self) -> frozenset[str]:
        """The holds something is kept for. The CRM withdraws those it does not know: orphans of a crash."""
