"""How long to drain: the guest's frames go to the destination a little before it stops. Pure.

What is being answered is answered to its end, what comes anew waits at the destination, and the guest stops
with nothing half said. That is not free: without it whoever asks in that moment and is answered before the
stop does not wait at all. So it is done only when the tracker says that somebody would be caught, and
that most are answered in the time a drain may take:

1. on the average less than ``worth_busy`` requests under way, and no more now   -> none
2. too few have been seen to tell how long they take                              -> none
3. less than half of them end within ``max_s``                                    -> none
4. otherwise as long as ``share`` of them take, at most ``max_s``

A connection that is being opened is none of them: its next frame comes from the client, and waits elsewhere.
A drain delays acknowledgements as well: an answer longer than what TCP sends without any does not end in it,
which shows in how long such answers take.

A client whose frame waits sends it again after 0.2 s and its round trip (Linux; RFC 6298 has 1 s), so a
drain together with the release ends before that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from virtgrid.tracker.changes import Change
from virtgrid.tracker.views import Snapshot, Verdict

#: From the release to the stopped guest, give or take: QEMU looks ten times a second.
STOPS_AFTER_S: Final = 0.1
#: Spells kept, and for how long they say something.
_SPELLS: Final = 256
_MEMORY_S: Final = 20.0
#: Weight of one look in the average; there are some 30 a second.
_LOOK_WEIGHT: Final = 0.05
#: The tracker's state of a connection before its first request.
_OPENING: Final = "new"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainConfig:
    """The numbers of a drain. max_s: from the first frame that waits to the stop of the guest, about."""

    max_s: float = 0.2
    share: float = 0.9
    worth_busy: float = 0.25
    enough: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """for_s: how long the frames wait before the stop, about; 0: no drain. reason: for people."""

    for_s: float
    reason: str

    @property
    def lead_s(self) -> float:
        """How long before QEMU is told: it takes its own time to stop the guest."""
        return max(0.0, self.for_s - STOPS_AFTER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spells:
    """How long requests took, as the tracker told of connections being unsuitable; immutable.

    ended: (when, how long) of those that are over, oldest first. open: since when, by connection.
    busy: connections with a request under way, averaged over some seconds; None before the first look.
    """

    ended: tuple[tuple[float, float], ...] = ()
    open: frozenset[tuple[tuple[str, str], float]] = frozenset()
    busy: float | None = None

    def look(self, at_s: float, now: int, changes: Sequence[Change]) -> Self:
        """One look: how many requests are under way at the moment, and what has changed since the last."""
        busy = float(now) if self.busy is None else self.busy + _LOOK_WEIGHT * (now - self.busy)
        if not changes:
            return replace(self, busy=busy)
        begun = dict(self.open)
        ended = list(self.ended)
        for change in changes:
            connection = (change.client, change.server)
            if change.verdict == Verdict.UNSUITABLE and change.state == _OPENING:
                continue
            if change.verdict == Verdict.UNSUITABLE:
                begun.setdefault(connection, change.at_s)
            elif (since_s := begun.pop(connection, None)) is not None and change.verdict == Verdict.SUITABLE:
                ended.append((change.at_s, max(0.0, change.at_s - since_s)))
        kept = [spell for spell in ended[-_SPELLS:] if spell[0] >= at_s - _MEMORY_S]
        return replace(self, ended=tuple(kept), open=frozenset(begun.items()), busy=busy)


def under_way(snapshot: Snapshot) -> int:
    """Connections with a request that is being answered."""
    return sum(c.verdict is Verdict.UNSUITABLE and c.state != _OPENING for c in snapshot.connections)


def decide(spells: Spells, now: int, config: DrainConfig) -> Drain:
    """Whether and how long to drain, so many requests being under way; the table above."""
    caught = max(float(now), spells.busy or 0.0)
    if caught < config.worth_busy:
        return Drain(for_s=0.0, reason=f"hardly anybody would be caught ({caught:.1f} requests at a time)")
    took = sorted(spell_s for _, spell_s in spells.ended)
    if len(took) < config.enough:
        return Drain(for_s=0.0, reason=f"how long requests take is not known ({len(took)} seen)")
    within = sum(spell_s <= config.max_s for spell_s in took) / len(took)
    if within < 0.5:
        return Drain(
            for_s=0.0, reason=f"only {within:.0%} of the requests end within {config.max_s * 1000:.0f} ms"
        )
    for_s = min(config.max_s, took[math.ceil(config.share * len(took)) - 1])
    done = sum(spell_s <= for_s for spell_s in took) / len(took)
    return Drain(
        for_s=for_s,
        reason=f"{caught:.1f} requests at a time, {done:.0%} of them end within {for_s * 1000:.0f} ms",
    )
