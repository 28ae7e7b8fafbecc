"""A reservation, as its coordinator (GRC) sees it: a table, and the theory above it. Pure.

Two-phase commit with *presumed abort*, after Mohan, Lindsay and Obermarck (1986), where the participants'
vote is a hold that lapses by itself:

* HOLD goes to all at once. Nothing is decided until every one has answered or been silent too long: a user is
  told the reason of every party, not of the first.
* The decision to commit is COMMITTING, *written down* before the first COMMIT is said. What was not written
  down was not decided: after a restart HOLDING goes to RELEASING.
* In COMMITTING and RELEASING the same is said again until everybody has answered it.
* A party whose hold lapsed before COMMIT reached it refuses. Then the others give back what they have
  committed. So "committed" is said to the user only in COMMITTED, when all have answered; until then the
  right answer is "unknown, ask again".
* RELEASING leads to RELEASED when everybody has answered, or when the window has ended and took everything
  with it. A party that answered HOLD with a refusal has nothing to give back and is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from virtgrid.grid.messages.coalloc import Command, PartyState, ReservationState


class Event(StrEnum):
    """What moves a reservation on."""

    ALL_HELD = "all held"
    NOT_ALL = "not all could"
    ALL_COMMITTED = "all committed"
    LAPSED = "a hold had lapsed"
    ALL_RELEASED = "all released"
    CANCELLED = "cancelled"
    RESTARTED = "restarted"
    ENDED = "window ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One state: what it means, what every party is asked in it, and what may follow.

    answer: what its user is told when asking now.
    """

    meaning: str
    asks: Command | None
    answer: str
    events: Mapping[Event, ReservationState]


_R, _E = ReservationState, Event
TABLE: Final[Mapping[ReservationState, Row]] = {
    _R.HOLDING: Row(
        meaning="Everybody was asked to hold; nothing is decided.",
        asks=Command.HOLD,
        answer="unknown, ask again",
        events={
            _E.ALL_HELD: _R.COMMITTING,
            _E.NOT_ALL: _R.RELEASING,
            _E.CANCELLED: _R.RELEASING,
            _E.RESTARTED: _R.RELEASING,
            _E.ENDED: _R.RELEASING,
        },
    ),
    _R.COMMITTING: Row(
        meaning="Decided, and written down; not everybody has answered yet.",
        asks=Command.COMMIT,
        answer="unknown, ask again",
        events={
            _E.ALL_COMMITTED: _R.COMMITTED,
            _E.LAPSED: _R.RELEASING,
            _E.CANCELLED: _R.RELEASING,
            _E.ENDED: _R.RELEASING,
        },
    ),
    _R.COMMITTED: Row(
        meaning="Everybody has committed: the reservation stands.",
        asks=None,
        answer="reserved",
        events={_E.CANCELLED: _R.RELEASING, _E.ENDED: _R.OVER},
    ),
    _R.RELEASING: Row(
        meaning="Refused, cancelled or lapsed; not everybody has given back yet.",
        asks=Command.RELEASE,
        answer="not reserved",
        events={_E.ALL_RELEASED: _R.RELEASED, _E.ENDED: _R.RELEASED},
    ),
    _R.RELEASED: Row(meaning="Nobody keeps anything.", asks=None, answer="not reserved", events={}),
    _R.OVER: Row(meaning="It stood, and its window has ended.", asks=None, answer="over", events={}),
}

#: What a party is after it did what it was asked.
_DONE: Final = {
    Command.HOLD: PartyState.HELD,
    Command.COMMIT: PartyState.COMMITTED,
    Command.RELEASE: PartyState.RELEASED,
}
#: What a party is after it refused: of a refused HOLD or a lapsed hold it keeps nothing.
_REFUSED: Final = {Command.HOLD: PartyState.REFUSED, Command.COMMIT: PartyState.RELEASED}
#: Who has nothing to give back.
_NOTHING: Final = frozenset({PartyState.REFUSED, PartyState.RELEASED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One party: its state, and what it said when that is worth telling."""

    state: PartyState = PartyState.ASKED
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordination:
    """A reservation's state with its parties'. reason: why this state, for people."""

    state: ReservationState
    reason: str
    parties: Mapping[str, Party]

    @property
    def settled(self) -> bool:
        """Whether nobody is asked anything any more."""
        return TABLE[self.state].asks is None


def begin(parties: Iterable[str]) -> Coordination:
    """A new reservation, to be written down before the first HOLD."""
    return Coordination(
        state=ReservationState.HOLDING,
        reason="everybody is asked",
        parties={party: Party() for party in parties},
    )


def todo(now: Coordination) -> dict[str, Command]:
    """Who is to be asked what. Asking again what was asked is harmless; leaving it out is not."""
    asks = TABLE[now.state].asks
    if asks is None:
        return {}
    if asks is Command.RELEASE:
        return {name: asks for name, party in now.parties.items() if party.state not in _NOTHING}
    waiting = PartyState.ASKED if asks is Command.HOLD else PartyState.HELD
    return {name: asks for name, party in now.parties.items() if party.state is waiting}


def did(now: Coordination, party: str, command: Command) -> Coordination:
    """A party has done what it was asked. An answer to what is not asked any more changes nothing."""
    return _answered(now, party, command, _DONE[command], "")


def refused(now: Coordination, party: str, command: Command, why: str) -> Coordination:
    """A party has said no: it cannot hold, or its hold has lapsed; RELEASE is never refused."""
    return _answered(now, party, command, _REFUSED[command], why)


def silent(now: Coordination, party: str, why: str) -> Coordination:
    """A party did not answer HOLD in time. It may keep something all the same, so it is asked to release."""
    return _answered(now, party, Command.HOLD, PartyState.SILENT, why)


def _answered(now: Coordination, party: str, command: Command, state: PartyState, why: str) -> Coordination:
    if todo(now).get(party) is not command:
        return now
    kept = why or now.parties[party].why
    now = replace(now, parties={**now.parties, party: Party(state=state, why=kept)})
    event, reason = _moved_by(now, party, command)
    return now if event is None else happened(now, event, reason)


def _moved_by(now: Coordination, party: str, command: Command) -> tuple[Event | None, str]:
    """What an answer means for the whole."""
    if command is Command.COMMIT and now.parties[party].state is PartyState.RELEASED:
        return Event.LAPSED, f"{party}: {now.parties[party].why}"
    if todo(now):
        return None, ""
    if command is Command.COMMIT:
        return Event.ALL_COMMITTED, "everybody has committed"
    if command is Command.RELEASE:
        return Event.ALL_RELEASED, now.reason
    unwilling = [name for name, one in now.parties.items() if one.state is not PartyState.HELD]
    if unwilling:
        return Event.NOT_ALL, "; ".join(f"{name}: {now.parties[name].why}" for name in unwilling)
    return Event.ALL_HELD, "everybody holds it"


def happened(now: Coordination, event: Event, reason: str) -> Coordination:
    """The reservation after an event; the same where it means nothing (any more)."""
    following = TABLE[now.state].events.get(event)
    if following is None:
        return now
    after = replace(now, state=following, reason=reason)
    if following is ReservationState.RELEASING and not todo(after):
        return happened(after, Event.ALL_RELEASED, reason)
    return after


# -- for people ----------------------------------------------------------------------------------


def markdown() -> str:
    """The table, for docs/reference/co-allocation.md."""
    lines = ["| state | means | parties are asked | its user is told | may follow |", "|---|---|---|---|---|"]
    for state, row in TABLE.items():
        following = ", ".join(f"{event}: {after}" for event, after in row.events.items()) or "-"
        lines.append(f"| {state} | {row.meaning} | {row.asks or '-'} | {row.answer} | {following} |")
    return "\n".join(lines) + "\n"
