"""Where a domain is after a migration ended, decided from what both hosts say. Pure.

Theory: the guest may run in exactly one place. libvirt's answer to the migrate call is not
trusted, nor is "no job" taken for success: both hosts are asked, and the table below says what
their answers mean (the idea is ganeti's: reconcile from observed truth, never from memory).

=====================  =====================  =====================================================
source                 destination            meaning
=====================  =====================  =====================================================
running                absent or defined      on the source
running                paused                 on the source; the paused one is left over, remove it
running                running                both: an operator must decide
running                no answer              on the source (it could only start there by stopping here)
absent or defined      running                on the destination
paused (migration)     running                on the destination; the paused one is left over
paused (migration)     absent or defined      on the source, stopped: resume it
paused (migration)     paused                 the source's copy is the whole one: resume it, remove the other
paused                 no answer              unknown: it may run there
absent or defined      paused                 on the destination, stopped: its only copy; operator
absent or defined      absent or defined      nowhere: it was shut off during the migration
no answer              running                on the destination
no answer              anything else          unknown
=====================  =====================  =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtgrid.virt.domain import DomainState, Position


class Place(StrEnum):
    """Where the one running copy of the guest is."""

    SOURCE = "source"
    DESTINATION = "destination"
    NOWHERE = "nowhere"
    BOTH = "both"
    UNKNOWN = "unknown"


class Repair(StrEnum):
    """What would put things right; only ``recover`` and a failed migration's clean-up do it."""

    RESUME_SOURCE = "resume it on the source"
    REMOVE_DESTINATION = "remove the stopped copy on the destination"
    REMOVE_SOURCE = "remove the stopped copy on the source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The verdict: where it is, what would put things right, and one sentence for a person."""

    place: Place
    repairs: tuple[Repair, ...]
    text: str

    @property
    def certain(self) -> bool:
        return self.place not in (Place.UNKNOWN, Place.BOTH)


def judge(
    name: str, source_host: str, destination_host: str, source: Position | None, destination: Position | None
) -> Situation:
    """What both hosts' answers mean; None is no answer. The table at the top of this module."""
    here, there = _kind(source), _kind(destination)

    def found(place: Place, text: str, *repairs: Repair) -> Situation:
        return Situation(place=place, repairs=repairs, text=text)

    match here, there:
        case "running", "none":
            return found(Place.SOURCE, f"{name} runs on {source_host}")
        case "running", "stopped":
            return found(
                Place.SOURCE,
                f"{name} runs on {source_host}; a stopped copy is left over on {destination_host}",
                Repair.REMOVE_DESTINATION,
            )
        case "running", "silent":
            return found(Place.SOURCE, f"{name} runs on {source_host}; {destination_host} does not answer")
        case "running", "running":
            return found(Place.BOTH, f"{name} runs on {source_host} and on {destination_host}")
        case "none", "running":
            return found(Place.DESTINATION, f"{name} runs on {destination_host}")
        case "silent", "running":
            return found(
                Place.DESTINATION, f"{name} runs on {destination_host}; {source_host} does not answer"
            )
        case "stopped", "running":
            return found(
                Place.DESTINATION,
                f"{name} runs on {destination_host}; a stopped copy is left over on {source_host}",
                Repair.REMOVE_SOURCE,
            )
        case "stopped", "none":
            return found(
                Place.SOURCE, f"{name} is {source} on {source_host} and nowhere else", Repair.RESUME_SOURCE
            )
        case "stopped", "stopped":
            return found(
                Place.SOURCE,
                f"{name} is {source} on {source_host} and {destination} on {destination_host}",
                Repair.REMOVE_DESTINATION,
                Repair.RESUME_SOURCE,
            )
        case "none", "none":
            return found(Place.NOWHERE, f"{name} runs on neither host: it was shut off")
        case "none", "stopped":
            return found(
                Place.UNKNOWN,
                f"{name} is only on {destination_host}, and {destination} there; nothing was done",
            )
        case _:
            return found(
                Place.UNKNOWN,
                f"{name} may be on {source_host} ({_say(source)})"
                f" or {destination_host} ({_say(destination)})",
            )


#: Reasons of a pause that have nothing to do with a migration.
_NOT_OURS: Final = frozenset({"user", "I/O error"})


def _kind(position: Position | None) -> str:
    if position is None:
        return "silent"
    match position.state:
        case DomainState.RUNNING:
            return "running"
        case DomainState.ABSENT | DomainState.SHUTOFF:
            return "none"
        case DomainState.PAUSED if position.reason.startswith("postcopy"):
            return "postcopy"  # its memory lies on both hosts: not for this table to put right
        case DomainState.PAUSED if position.reason in _NOT_OURS:
            return "running"  # it is there and whole; who paused it will resume it
        case _:
            return "stopped"


def _say(position: Position | None) -> str:
    return "no answer" if position is None else str(position)
