"""virtgridd's queue of migrations: what becomes of each, decided from a table. Pure.

Theory: an entry is one domain's wish to be elsewhere. It is *asked for* once and ends in exactly one of
three states, whatever happens to virtgridd meanwhile. The migration itself belongs to a worker, a process of
its own with its own journal and lock; the queue only starts it, and afterwards believes the journal or, when
its writer died, what both hosts say. After a restart, looking is enough.

``TABLE`` is the whole truth about what may follow what; an event that is not in it is a mistake of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from virtgrid.grid.messages.common import Model


class State(StrEnum):
    """What each means: ``MEANING``."""

    QUEUED = "queued"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    GAVE_UP = "gave up"


MEANING: Final = {
    State.QUEUED: "Asked for; its turn comes, after a failed attempt not before some time.",
    State.WAITING: "It could go, but a slot of this host, of the destination or of the link is not free.",
    State.STARTING: "Its worker is being started; it has no journal yet.",
    State.RUNNING: "A worker migrates it; `virtgrid migration show` tells how far it is.",
    State.DONE: "The domain runs at the destination.",
    State.FAILED: "It cannot be done, or where the domain is is not known; the note says what to do.",
    State.GAVE_UP: "The domain stays: too many attempts, somebody said no, or it has ended by itself.",
}
ENDED: Final = frozenset({State.DONE, State.FAILED, State.GAVE_UP})


class Event(StrEnum):
    """held back: no slot. again: this attempt came to nothing, the domain is here. no: it will never work.

    enough: this was the last attempt. withdrawn: somebody does not want it any more, or the domain ended.
    """

    HELD_BACK = "held back"
    STARTED = "started"
    BEGAN = "began"
    ARRIVED = "arrived"
    AGAIN = "again"
    ENOUGH = "enough"
    NO = "no"
    WITHDRAWN = "withdrawn"


TABLE: Final[Mapping[State, Mapping[Event, State]]] = {
    State.QUEUED: {
        Event.HELD_BACK: State.WAITING,
        Event.STARTED: State.STARTING,
        Event.NO: State.FAILED,
        Event.WITHDRAWN: State.GAVE_UP,
    },
    State.WAITING: {
        Event.HELD_BACK: State.WAITING,
        Event.STARTED: State.STARTING,
        Event.NO: State.FAILED,
        Event.WITHDRAWN: State.GAVE_UP,
    },
    State.STARTING: {
        Event.BEGAN: State.RUNNING,
        Event.AGAIN: State.QUEUED,
        Event.ENOUGH: State.GAVE_UP,
        Event.NO: State.FAILED,
        Event.WITHDRAWN: State.GAVE_UP,
    },
    State.RUNNING: {
        Event.ARRIVED: State.DONE,
        Event.AGAIN: State.QUEUED,
        Event.ENOUGH: State.GAVE_UP,
        Event.NO: State.FAILED,
        Event.WITHDRAWN: State.GAVE_UP,
    },
    State.DONE: {},
    State.FAILED: {},
    State.GAVE_UP: {},
}


class Entry(Model):
    """One domain's migration, as it is kept on the disk and shown.

    to: a destination of the configuration. why: who wants it. note: what it waits for, or how it ended.
    tried: migrations it has had, by id, the last one perhaps running. Times: seconds since the epoch.
    """

    v: Literal[1] = 1
    id: str
    domain: str
    uuid: str
    to: str
    why: str
    asked_at_s: float
    since_s: float
    state: State = State.QUEUED
    note: str = ""
    attempts: int = 0
    not_before_s: float = 0.0
    tried: tuple[str, ...] = ()

    @property
    def migration(self) -> str | None:
        """The migration that runs, or was the last."""
        return self.tried[-1] if self.tried else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A destination: how many may be on their way to it, and the link they share with others."""

    slots: int
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """here: how many may leave this host at a time. links: slots of each. attempts, retry_s: of an entry."""

    here: int
    places: Mapping[str, Place]
    links: Mapping[str, int]
    attempts: int
    retry_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What happens to an entry now, and why."""

    id: str
    event: Event
    note: str


def follow(entry: Entry, event: Event, now_s: float, *, note: str, limits: Limits | None = None) -> Entry:
    """The entry after an event. limits: for ``AGAIN``, after which it waits longer each time.

    Errors: ValueError naming event and state.
    """
    after = TABLE[entry.state].get(event)
    if after is None:
        raise ValueError(f"'{event}' cannot happen to {entry.domain} while it is {entry.state}")
    changes: dict[str, object] = {"state": after, "note": note[:500]}
    if after is not entry.state:
        changes["since_s"] = now_s
    if event is Event.STARTED:
        changes["attempts"] = entry.attempts + 1
    if event is Event.AGAIN and limits is not None:
        changes["not_before_s"] = now_s + limits.retry_s * 2 ** max(0, entry.attempts - 1)
    return entry.model_copy(update=changes)


def decide(entries: Iterable[Entry], limits: Limits, now_s: float, busy: Mapping[str, str]) -> list[Step]:
    """Who may start now, and what the others wait for. First come, first served; a full link stops no other.

    busy: domain's uuid -> a migration of it that the queue did not start. Only steps that change something.
    """
    ordered = sorted(entries, key=lambda entry: (entry.asked_at_s, entry.id))
    going = [entry for entry in ordered if entry.state in (State.STARTING, State.RUNNING)]
    to, over = Counter(entry.to for entry in going), Counter[str | None]()
    for entry in going:
        place = limits.places.get(entry.to)
        over[place.link if place else None] += 1
    total, steps = len(going), []
    for entry in ordered:
        if entry.state not in (State.QUEUED, State.WAITING) or now_s < entry.not_before_s:
            continue
        place = limits.places.get(entry.to)
        if place is None:
            steps.append(
                Step(id=entry.id, event=Event.NO, note=f"there is no destination '{entry.to}' any more")
            )
            continue
        why = _held_back(entry, place, limits, total, to[entry.to], over[place.link], busy)
        if why is None:
            total, to[entry.to], over[place.link] = total + 1, to[entry.to] + 1, over[place.link] + 1
            steps.append(Step(id=entry.id, event=Event.STARTED, note=""))
        elif entry.state is State.QUEUED or entry.note != why:
            steps.append(Step(id=entry.id, event=Event.HELD_BACK, note=why))
    return steps


def _held_back(
    entry: Entry, place: Place, limits: Limits, total: int, to: int, over: int, busy: Mapping[str, str]
) -> str | None:
    if (other := busy.get(entry.uuid)) is not None:
        return f"it is being migrated by somebody else ({other})"
    if total >= limits.here:
        return f"{_count(limits.here, 'leave', 'leaves')} this host already"
    if to >= place.slots:
        return f"{_count(place.slots, 'go', 'goes')} to {entry.to} already"
    if place.link is not None and over >= (slots := limits.links.get(place.link, place.slots)):
        return f"{_count(slots, 'use', 'uses')} link {place.link} already"
    return None


def _count(number: int, do: str, does: str) -> str:
    return f"1 migration {does}" if number == 1 else f"{number} migrations {do}"


#: How a worker ended (its exit status) -> what that means for the entry; what is not here: try again.
_FINAL: Final = {
    2: Event.NO,  # the words are wrong: they will be the next time
    4: Event.WITHDRAWN,  # no such domain: it has ended
    6: Event.WITHDRAWN,  # somebody aborted it
    7: Event.NO,  # nobody knows where it is: not for a machine
}


def after_attempt(entry: Entry, exit_status: int, attempts: int) -> Event:
    """What follows from an attempt that did not succeed."""
    event = _FINAL.get(exit_status)
    if event is not None:
        return event
    return Event.ENOUGH if entry.attempts >= attempts else Event.AGAIN
