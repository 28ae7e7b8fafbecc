"""A hold, as its provider (CRM, NRM) sees it: a table, and the theory above it. Pure.

* A hold is *tentative* (HELD) until COMMIT, and lapses by the provider's own clock when none came in time.
  So a coordinator that dies takes nothing with it for long, and nobody needs to be told.
* Lapsing is a fact of the clock, not of a sweep: a hold whose time is up is EXPIRED for whoever asks, at that
  moment, whether or not anybody has cleared it away (``at``).
* Every command may come twice, late, or after a restart. HOLD with a known key and the same words is the
  same hold; COMMIT of what is committed, and RELEASE of what is gone, are done already. COMMIT of what has
  lapsed is a refusal: somebody else may have it by now. It never becomes a new hold.
* RELEASE of a key nobody knows is answered as done: there is nothing to give back. A HOLD that was on its
  way then is held and lapses; nobody will commit it.
* What is gone must be remembered for a while, or a late copy of HOLD, and then of COMMIT, would raise it
  from the dead. A HOLD whose ``asked_at_s`` is further than ``SKEW_LIMIT_S`` from the provider's clock is
  refused; so after twice that time no copy of it can be taken for new, and ``REMEMBER_S`` is longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.coalloc import Command, Grant, Hold, HoldState, Standing, Window

SKEW_LIMIT_S: Final = 60
LATE_LIMIT_S: Final = 60
"""A window may have begun this long ago: a reservation from now on takes a moment to arrive."""
REMEMBER_S: Final = 3600
"""How long a hold that is gone is remembered, and can be asked for."""


class Event(StrEnum):
    """What the clock does."""

    EXPIRED = "expired"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One state: what it means, whether the resources are kept, and what may follow.

    A command that is missing is refused; ``words`` completes the sentence "hold KEY …".
    """

    meaning: str
    keeps: bool
    words: str
    commands: Mapping[Command, HoldState]
    events: Mapping[Event, HoldState]


_H = HoldState
TABLE: Final[Mapping[HoldState, Row]] = {
    _H.HELD: Row(
        meaning="Tentative: kept for its coordinator until its time to live is over.",
        keeps=True,
        words="is held",
        commands={Command.HOLD: _H.HELD, Command.COMMIT: _H.COMMITTED, Command.RELEASE: _H.RELEASED},
        events={Event.EXPIRED: _H.EXPIRED, Event.ENDED: _H.EXPIRED},
    ),
    _H.COMMITTED: Row(
        meaning="Promised until the window ends.",
        keeps=True,
        words="is committed",
        commands={Command.HOLD: _H.COMMITTED, Command.COMMIT: _H.COMMITTED, Command.RELEASE: _H.RELEASED},
        events={Event.ENDED: _H.OVER},
    ),
    _H.EXPIRED: Row(
        meaning="No COMMIT came in time; others may have the resources.",
        keeps=False,
        words="has expired",
        commands={Command.RELEASE: _H.EXPIRED},
        events={},
    ),
    _H.RELEASED: Row(
        meaning="Given back by its coordinator.",
        keeps=False,
        words="was released",
        commands={Command.RELEASE: _H.RELEASED},
        events={},
    ),
    _H.OVER: Row(
        meaning="It was committed, and its window has ended.",
        keeps=False,
        words="is over",
        commands={Command.RELEASE: _H.OVER},
        events={},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a provider writes down of a hold.

    print: of the HOLD's words (``virtgrid.wire.answers.fingerprint``). owner: who asked.
    gone_at_s: since when it keeps nothing; None while it does.
    """

    key: str
    print: str
    owner: str
    reservation: str
    window: Window
    expires_at_s: int
    state: HoldState
    grant: Grant
    gone_at_s: int | None = None

    def standing(self, now_s: int) -> Standing:
        """How it stands now, for its coordinator."""
        return Standing(
            key=self.key,
            reservation=self.reservation,
            state=at(self, now_s),
            window=self.window,
            expires_at_s=self.expires_at_s,
            grant=self.grant,
        )


def at(record: Record, now_s: int) -> HoldState:
    """The state, with what the clock has done to it since it was written down."""
    state = record.state
    if now_s >= record.window.ends_at_s:
        state = TABLE[state].events.get(Event.ENDED, state)
    elif now_s >= record.expires_at_s:
        state = TABLE[state].events.get(Event.EXPIRED, state)
    return state


def after_command(record: Record, command: Command, now_s: int) -> HoldState:
    """The state a command leads to. Errors: RefusedError when it comes too late."""
    state = at(record, now_s)
    following = TABLE[state].commands.get(command)
    if following is None:
        raise RefusedError(
            f"{command} comes too late: the hold of reservation {record.reservation} {TABLE[state].words}",
            hint="make a new reservation",
        )
    return following


def require_same(record: Record, print_: str, owner: str) -> None:
    """HOLD came with a key that is known. Errors: RefusedError when its words are other ones."""
    if record.print != print_ or record.owner != owner:
        raise RefusedError(
            f"the key of this HOLD was used for another one, of reservation {record.reservation}",
            hint="make a new key for each hold",
        )


def require_timely(hold: Hold, now_s: int) -> None:
    """Errors: RefusedError when the clocks disagree, or the window cannot be had any more."""
    ahead_s = hold.asked_at_s - now_s
    if abs(ahead_s) > SKEW_LIMIT_S:
        way = "ahead of" if ahead_s > 0 else "behind"
        raise RefusedError(
            f"the coordinator's clock is {abs(ahead_s)} s {way} ours, or HOLD took as long to arrive",
            hint="both machines should run NTP",
        )
    require_window(hold.window, now_s)


def require_window(window: Window, now_s: int) -> None:
    """Errors: RefusedError for a window in the past."""
    if window.ends_at_s <= now_s:
        raise RefusedError(f"the window ended {now_s - window.ends_at_s} s ago")
    if window.begins_at_s < now_s - LATE_LIMIT_S:
        raise RefusedError(f"the window began {now_s - window.begins_at_s} s ago", hint="let it begin now")


def forgotten_s(now_s: int) -> int:
    """No copy of a command can do harm any more to a hold that went at this time or before."""
    return now_s - REMEMBER_S


def forgettable(record: Record, now_s: int) -> bool:
    """Whether a hold is to be forgotten."""
    return record.gone_at_s is not None and record.gone_at_s <= forgotten_s(now_s)


# -- for people ----------------------------------------------------------------------------------


def markdown() -> str:
    """The table, for docs/reference/co-allocation.md."""
    lines = [
        "| state | means | keeps | HOLD | COMMIT | RELEASE | by the clock |",
        "|---|---|---|---|---|---|---|",
    ]
    for state, row in TABLE.items():
        answers = [str(row.commands.get(command, "refused")) for command in Command]
        clock = ", ".join(f"{event}: {following}" for event, following in row.events.items()) or "-"
        keeps = "yes" if row.keeps else "no"
        lines.append(f"| {state} | {row.meaning} | {keeps} | {' | '.join(answers)} | {clock} |")
    return "\n".join(lines) + "\n"
