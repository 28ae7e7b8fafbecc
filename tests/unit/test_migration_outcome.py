"""Where the guest is: the whole table of virtgrid.migration.outcome, and what no repair may ever do."""

from __future__ import annotations

import itertools

import pytest

from virtgrid.migration.outcome import Place, Repair, judge
from virtgrid.virt.domain import ABSENT, DomainState, Position

RUNNING = Position(state=DomainState.RUNNING)
DEFINED = Position(state=DomainState.SHUTOFF, persistent=True)
MIGRATING = Position(state=DomainState.PAUSED, reason="migration")
BY_USER = Position(state=DomainState.PAUSED, reason="user")
NO_SPACE = Position(state=DomainState.PAUSED, reason="I/O error")
CRASHED = Position(state=DomainState.CRASHED)
POSTCOPY = Position(state=DomainState.PAUSED, reason="postcopy")
OTHER = Position(state=DomainState.OTHER)
EVERYTHING = (
    None, ABSENT, RUNNING, DEFINED, MIGRATING, BY_USER, NO_SPACE, CRASHED, POSTCOPY, OTHER,
    Position(state=DomainState.PAUSED), Position(state=DomainState.PAUSED, reason="starting up"),
)  # fmt: skip

TABLE = [
    (RUNNING, ABSENT, Place.SOURCE, ()),
    (RUNNING, DEFINED, Place.SOURCE, ()),
    (RUNNING, MIGRATING, Place.SOURCE, (Repair.REMOVE_DESTINATION,)),
    (RUNNING, RUNNING, Place.BOTH, ()),
    (RUNNING, None, Place.SOURCE, ()),
    (ABSENT, RUNNING, Place.DESTINATION, ()),
    (DEFINED, RUNNING, Place.DESTINATION, ()),
    (MIGRATING, RUNNING, Place.DESTINATION, (Repair.REMOVE_SOURCE,)),
    (MIGRATING, ABSENT, Place.SOURCE, (Repair.RESUME_SOURCE,)),
    (MIGRATING, DEFINED, Place.SOURCE, (Repair.RESUME_SOURCE,)),
    (MIGRATING, MIGRATING, Place.SOURCE, (Repair.REMOVE_DESTINATION, Repair.RESUME_SOURCE)),
    (MIGRATING, None, Place.UNKNOWN, ()),
    (ABSENT, MIGRATING, Place.UNKNOWN, ()),
    (DEFINED, MIGRATING, Place.UNKNOWN, ()),
    (ABSENT, ABSENT, Place.NOWHERE, ()),
    (ABSENT, DEFINED, Place.NOWHERE, ()),
    (DEFINED, ABSENT, Place.NOWHERE, ()),
    (None, RUNNING, Place.DESTINATION, ()),
    (None, ABSENT, Place.UNKNOWN, ()),
    (None, DEFINED, Place.UNKNOWN, ()),
    (None, MIGRATING, Place.UNKNOWN, ()),
    (None, None, Place.UNKNOWN, ()),
    (ABSENT, None, Place.UNKNOWN, ()),
    (DEFINED, None, Place.UNKNOWN, ()),
    # Paused by a person or for want of space: it is there and whole, the migration did not stop it.
    (BY_USER, ABSENT, Place.SOURCE, ()),
    (NO_SPACE, MIGRATING, Place.SOURCE, (Repair.REMOVE_DESTINATION,)),
    (ABSENT, BY_USER, Place.DESTINATION, ()),
]


def situation(here: Position | None, there: Position | None):
    return judge("web1", "alice", "bob", here, there)


@pytest.mark.parametrize(("here", "there", "place", "repairs"), TABLE)
def test_the_table_is_what_is_judged(
    here: Position | None, there: Position | None, place: Place, repairs: tuple[Repair, ...]
) -> None:
    found = situation(here, there)
    assert found.place is place
    assert found.repairs == repairs


@pytest.mark.parametrize(("here", "there"), list(itertools.product(EVERYTHING, EVERYTHING)))
def test_no_repair_ends_a_running_guest_or_starts_a_second_one(
    here: Position | None, there: Position | None
) -> None:
    found = situation(here, there)
    if here is not None and here.state is DomainState.RUNNING:
        assert Repair.REMOVE_SOURCE not in found.repairs
        assert Repair.RESUME_SOURCE not in found.repairs
    if there is not None and there.state is DomainState.RUNNING:
        assert Repair.REMOVE_DESTINATION not in found.repairs
        assert Repair.RESUME_SOURCE not in found.repairs
    if there is None:
        assert Repair.RESUME_SOURCE not in found.repairs, "it may run over there"
    if not found.certain:
        assert found.repairs == (), "who does not know does nothing"


@pytest.mark.parametrize(("here", "there"), list(itertools.product(EVERYTHING, EVERYTHING)))
def test_a_certain_place_is_one_that_answered_and_the_sentence_names_a_host(
    here: Position | None, there: Position | None
) -> None:
    found = situation(here, there)
    if found.place is Place.SOURCE:
        assert here is not None
        assert here.active
        assert "alice" in found.text
    if found.place is Place.DESTINATION:
        assert there is not None
        assert there.active
        assert "bob" in found.text
    assert found.text.startswith("web1 ")


def test_a_domain_paused_in_postcopy_is_never_resumed_on_the_source() -> None:
    # Its memory is split over both hosts: neither copy is whole.
    assert Repair.RESUME_SOURCE not in situation(POSTCOPY, None).repairs


def test_nothing_is_said_to_run_that_crashed() -> None:
    found = situation(CRASHED, ABSENT)
    assert found.place is Place.SOURCE
    assert "runs" not in found.text
