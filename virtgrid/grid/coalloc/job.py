"""A job, as its coordinator (GRC) sees it: a table, and the theory above it. Pure.

A job is a reservation and a program. Its state says what the sites are to be told (``order``) and is
written down before anything is said. Sites are told again until they have answered, and what they tell of
their crews moves the job on:

* MUSTERING gathers addresses and public keys, EQUIPPING spreads them, LAUNCHING starts the program in the
  first node's sandbox. Everything said in them may be said twice, so a coordinator that was killed goes
  on in the state it finds written down, and nothing else needs to be.
* Whatever goes wrong leads to DISMISSING, and the first reason (``verdict``) stays. DISMISSING leads to
  OVER only when no site has anything left and the reservation is given back, or its window has ended and
  took everything with it. There is no other way out: a job that is OVER keeps nothing.
* The program's exit status is what its NodeManager told, or not known. It is never made up, and once told
  never taken back: it may still arrive in DISMISSING, for a job that was cancelled.
* A site that does not answer is no reason to end a job whose program runs: the sandboxes do not need it.
  It is one while the crews come up, when nothing is lost yet: whoever is not ready in time (the caller's
  clock) breaks the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from virtgrid.grid.coalloc.crew import FALLEN
from virtgrid.grid.messages.job import CrewView, JobState, NodeView, Order, Verdict
from virtgrid.grid.messages.node import HostEntry, State, Usage


class Event(StrEnum):
    """What moves a job on."""

    RESERVED = "reserved"
    REFUSED = "not reserved"
    BEGUN = "window begun"
    KEYED = "all keys known"
    UP = "all run"
    LAUNCHED = "program started"
    FINISHED = "program ended"
    BROKEN = "broken"
    CANCELLED = "cancelled"
    ENDED = "window ended"
    GONE = "all given back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One state: what it means, what the sites are told in it, and what may follow.

    answer: what its user is told when asking now.
    """

    meaning: str
    order: Order | None
    answer: str
    events: Mapping[Event, JobState]


_S, _E = JobState, Event
_FALL: Final = {
    _E.BROKEN: _S.DISMISSING,
    _E.CANCELLED: _S.DISMISSING,
    _E.ENDED: _S.DISMISSING,
}
TABLE: Final[Mapping[JobState, Row]] = {
    _S.RESERVING: Row(
        meaning="Nodes, addresses, segment and bandwidth are being reserved.",
        order=None,
        answer="unknown, ask again",
        events={_E.RESERVED: _S.WAITING, _E.REFUSED: _S.OVER, **_FALL},
    ),
    _S.WAITING: Row(
        meaning="Everything is reserved; the window has not begun.",
        order=None,
        answer="will run",
        events={_E.BEGUN: _S.MUSTERING, **_FALL},
    ),
    _S.MUSTERING: Row(
        meaning="Pilots are started; addresses and public keys are gathered.",
        order=Order.MUSTER,
        answer="starting",
        events={_E.KEYED: _S.EQUIPPING, **_FALL},
    ),
    _S.EQUIPPING: Row(
        meaning="Everybody's keys and addresses are spread, the sandboxes are started.",
        order=Order.EQUIP,
        answer="starting",
        events={_E.UP: _S.LAUNCHING, **_FALL},
    ),
    _S.LAUNCHING: Row(
        meaning="The program is being started in the first node's sandbox.",
        order=Order.LAUNCH,
        answer="starting",
        events={_E.LAUNCHED: _S.RUNNING, _E.FINISHED: _S.DISMISSING, **_FALL},
    ),
    _S.RUNNING: Row(
        meaning="The program runs.",
        order=None,
        answer="runs",
        events={_E.FINISHED: _S.DISMISSING, **_FALL},
    ),
    _S.DISMISSING: Row(
        meaning="It is decided how it ends; sandboxes are removed, everything is given back.",
        order=Order.DISMISS,
        answer="ending",
        events={_E.GONE: _S.OVER},
    ),
    _S.OVER: Row(meaning="Nothing is kept for it any more.", order=None, answer="over", events={}),
}

#: What is said to the first site alone.
_OF_FIRST: Final = frozenset({Order.LAUNCH})
_VERDICTS: Final = {
    _E.FINISHED: Verdict.FINISHED,
    _E.REFUSED: Verdict.REFUSED,
    _E.BROKEN: Verdict.BROKEN,
    _E.CANCELLED: Verdict.CANCELLED,
    _E.ENDED: Verdict.ENDED,
}
#: States in which crews are looked at.
_WATCHED: Final = frozenset({_S.MUSTERING, _S.EQUIPPING, _S.LAUNCHING, _S.RUNNING})
COMING_UP: Final = frozenset({_S.MUSTERING, _S.EQUIPPING, _S.LAUNCHING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What a site has told of its crew. used_s: node-seconds."""

    nodes: tuple[NodeView, ...] = ()
    gone: bool = False
    used_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job's state with its crews. sites: in the order of the user's wish; the program runs at the first.

    reason: why this state, for people. status, usage: the program's, once told; ended: whether it was.
    """

    state: JobState
    reason: str
    sites: Mapping[str, Crew]
    verdict: Verdict | None = None
    ended: bool = False
    status: int | None = None
    usage: Usage | None = None

    @property
    def first(self) -> str:
        return next(iter(self.sites))

    @property
    def over(self) -> bool:
        return self.state is JobState.OVER


def begin(sites: Iterable[str]) -> Job:
    """A new job, to be written down before anything is asked."""
    return Job(state=_S.RESERVING, reason="everybody is asked", sites={site: Crew() for site in sites})


def order(now: Job, site: str) -> Order | None:
    """What a site is to be told. Telling it again is harmless; leaving it out is not."""
    found = TABLE[now.state].order
    if found in _OF_FIRST and site != now.first:
        return None
    if found is Order.DISMISS and now.sites[site].gone:
        return None
    return found


def happened(now: Job, event: Event, reason: str) -> Job:
    """The job after an event; the same where it means nothing (any more)."""
    following = TABLE[now.state].events.get(event)
    if following is None:
        return now
    return replace(now, state=following, reason=reason, verdict=now.verdict or _VERDICTS.get(event))


def told(now: Job, site: str, said: Order) -> Job:
    """A site has answered an order. An answer to what is not asked any more changes nothing."""
    if said is Order.LAUNCH and order(now, site) is said:
        return happened(now, _E.LAUNCHED, "the program was started")
    return now


def heard(now: Job, site: str, view: CrewView) -> Job:
    """A site has told how its crew is."""
    if now.sites[site].gone:
        return now
    crew = Crew(nodes=view.nodes, gone=view.gone, used_s=view.used_s)
    now = replace(now, sites={**now.sites, site: crew})
    if now.state not in _WATCHED:
        return now
    for node in crew.nodes:
        if why := broken(node):
            return happened(now, _E.BROKEN, f"{site}: {node.node}: {why}")
    if crew.gone:
        return happened(now, _E.BROKEN, f"{site}: its nodes were taken back")
    if keyed(now):
        everybody = [node for one in now.sites.values() for node in one.nodes]
        now = happened(now, _E.KEYED, f"the keys of {len(everybody)} nodes are known")
        if all(node.state is State.RUNNING for node in everybody):
            now = happened(now, _E.UP, f"all {len(everybody)} sandboxes run")
    return now


def keyed(now: Job) -> bool:
    """Whether every node's keys are known."""
    crews = now.sites.values()
    return all(crew.nodes and all(node.keys is not None for node in crew.nodes) for crew in crews)


def broken(node: NodeView) -> str:
    """Why a node will not be up (any more); empty while it may."""
    if node.problem:
        return node.problem
    return f"{node.state}: {node.reason}" if node.state in FALLEN else ""


def unknown(now: Job, site: str) -> Job:
    """A site knows nothing of the crew: it was taken back, or it has been given back."""
    if now.state in _WATCHED:
        now = happened(now, _E.BROKEN, f"{site}: the nodes are not reserved any more")
    if now.state is not _S.DISMISSING:
        return now
    return replace(now, sites={**now.sites, site: replace(now.sites[site], gone=True)})


def finished(now: Job, status: int | None, usage: Usage | None, problem: str | None) -> Job:
    """The program has ended, as its NodeManager tells it."""
    if now.ended or now.over:
        return now
    now = replace(now, ended=True, status=status, usage=usage)
    what = f"the program ended with status {status}"
    if status is None:
        what = f"how the program ended is not known: {problem or 'its end was lost'}"
    return happened(now, _E.FINISHED, what)


def all_gone(now: Job) -> bool:
    """Whether no site has anything left: the reservation can be given back."""
    return all(one.gone for one in now.sites.values())


def late(now: Job) -> str:
    """Who keeps the crews from coming up, for people."""
    waiting = []
    for site, one in now.sites.items():
        if not one.nodes:
            waiting.append(f"{site} has told nothing")
        waiting += [
            f"{site}: {node.node} is {node.state or 'awaited'}"
            for node in one.nodes
            if node.state is not State.RUNNING
        ]
    return "; ".join(waiting[:8]) or "everybody is up"


def hosts(now: Job) -> tuple[HostEntry, ...]:
    """Every node of the job, in the order of the hostfile: the first is where the program starts."""
    return tuple(
        HostEntry(hostname=node.sandbox, address=node.address, **node.keys.model_dump())
        for one in now.sites.values()
        for node in one.nodes
        if node.keys is not None
    )


# -- for people ----------------------------------------------------------------------------------


def markdown() -> str:
    """The table, for docs/reference/jobs.md."""
    lines = ["| state | means | sites are told | its user is told | may follow |", "|---|---|---|---|---|"]
    for state, row in TABLE.items():
        following = ", ".join(f"{event}: {after}" for event, after in row.events.items()) or "-"
        lines.append(f"| {state} | {row.meaning} | {row.order or '-'} | {row.answer} | {following} |")
    return "\n".join(lines) + "\n"
