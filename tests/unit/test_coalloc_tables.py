"""The two tables of co-allocation, case by case; for interleavings see tests/property/test_coalloc.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.grid.coalloc import coordinator as grc
from virtgrid.grid.coalloc import provider as prm
from virtgrid.grid.messages.coalloc import (
    Command,
    Grant,
    Hold,
    HoldState,
    PartyState,
    Paths,
    ReservationState,
    Window,
)

HELD = prm.Record(
    key="k" * 16,
    print="p",
    owner="grc1",
    reservation="r1",
    window=Window(begins_at_s=1000, ends_at_s=2000),
    expires_at_s=930,
    state=HoldState.HELD,
    grant=Grant(segment=7),
)
COMMITTED = replace(HELD, state=HoldState.COMMITTED)


def _hold(*, begins: int = 1000, ends: int = 2000, asked: int = 900) -> Hold:
    return Hold(
        key="k" * 16,
        reservation="r1",
        window=Window(begins_at_s=begins, ends_at_s=ends),
        ttl_s=30,
        asked_at_s=asked,
        wanted=Paths(sites=("a", "b")),
    )


def test_a_hold_lapses_by_the_clock_and_needs_no_sweep() -> None:
    assert prm.at(HELD, 929) is HoldState.HELD
    assert prm.at(HELD, 930) is HoldState.EXPIRED
    with pytest.raises(RefusedError, match="COMMIT comes too late: the hold of reservation r1 has expired"):
        prm.after_command(HELD, Command.COMMIT, 930)


def test_what_is_committed_outlives_its_time_to_live_and_ends_with_its_window() -> None:
    assert prm.at(COMMITTED, 1999) is HoldState.COMMITTED
    assert prm.at(COMMITTED, 2000) is HoldState.OVER
    with pytest.raises(RefusedError, match="is over"):
        prm.after_command(COMMITTED, Command.COMMIT, 2000)


@pytest.mark.parametrize("state", list(HoldState))
def test_release_is_never_refused_and_brings_nothing_back(state: HoldState) -> None:
    after = prm.after_command(replace(HELD, state=state), Command.RELEASE, 900)
    assert not prm.TABLE[after].keeps


@pytest.mark.parametrize("state", [HoldState.EXPIRED, HoldState.RELEASED, HoldState.OVER])
@pytest.mark.parametrize("command", [Command.HOLD, Command.COMMIT])
def test_a_late_copy_raises_nothing_from_the_dead(state: HoldState, command: Command) -> None:
    with pytest.raises(RefusedError):
        prm.after_command(replace(HELD, state=state, gone_at_s=900), command, 901)


def test_what_is_gone_is_remembered_until_no_copy_of_its_hold_is_taken_for_new() -> None:
    gone = replace(HELD, state=HoldState.RELEASED, gone_at_s=900)
    forgotten_s = next(now for now in range(900, 10_000) if prm.forgettable(gone, now))
    asked_latest_s = 900 + prm.SKEW_LIMIT_S
    with pytest.raises(RefusedError, match="took as long to arrive"):
        prm.require_timely(_hold(asked=asked_latest_s, begins=20_000, ends=30_000), forgotten_s)
    assert not prm.forgettable(HELD, 10**9)


def test_a_key_is_for_one_hold_of_one_coordinator() -> None:
    prm.require_same(HELD, "p", "grc1")
    for print_, owner in (("q", "grc1"), ("p", "grc2")):
        with pytest.raises(RefusedError, match="was used for another one"):
            prm.require_same(HELD, print_, owner)


@pytest.mark.parametrize(("asked", "words"), [(1020, "120 s ahead of ours"), (780, "120 s behind ours")])
def test_a_clock_two_minutes_off_is_refused(asked: int, words: str) -> None:
    prm.require_timely(_hold(asked=900), 900)
    with pytest.raises(RefusedError, match=words):
        prm.require_timely(_hold(asked=asked), 900)


def test_a_window_in_the_past_is_refused() -> None:
    with pytest.raises(RefusedError, match="the window ended 100 s ago"):
        prm.require_timely(_hold(begins=700, ends=800), 900)
    with pytest.raises(RefusedError, match="the window began 200 s ago"):
        prm.require_timely(_hold(begins=700, ends=2000), 900)
    prm.require_timely(_hold(begins=890, ends=2000), 900)


# -- the coordinator -----------------------------------------------------------------------------


def _all(now: grc.Coordination, command: Command) -> grc.Coordination:
    for party in sorted(now.parties):
        now = grc.did(now, party, command)
    return now


def test_everybody_holds_then_everybody_commits() -> None:
    now = grc.begin(["a", "b", "n"])
    assert set(grc.todo(now).values()) == {Command.HOLD}
    now = _all(now, Command.HOLD)
    assert now.state is ReservationState.COMMITTING
    now = grc.did(now, "a", Command.COMMIT)
    assert grc.todo(now) == {"b": Command.COMMIT, "n": Command.COMMIT}
    now = _all(now, Command.COMMIT)
    assert now.state is ReservationState.COMMITTED
    assert now.settled


def test_the_reason_of_every_party_is_waited_for() -> None:
    now = grc.begin(["a", "b", "n"])
    now = grc.refused(now, "a", Command.HOLD, "2 of 4 nodes are free")
    assert now.state is ReservationState.HOLDING
    now = grc.silent(now, "n", "did not answer within 5 s")
    now = grc.did(now, "b", Command.HOLD)
    assert now.state is ReservationState.RELEASING
    assert now.reason == "a: 2 of 4 nodes are free; n: did not answer within 5 s"
    # Who refused keeps nothing; who was silent may.
    assert grc.todo(now) == {"b": Command.RELEASE, "n": Command.RELEASE}


def test_nobody_held_anything_so_nobody_is_asked_to_release() -> None:
    now = grc.refused(grc.begin(["a"]), "a", Command.HOLD, "no")
    assert now.state is ReservationState.RELEASED
    assert now.reason == "a: no"


def test_a_lapsed_hold_takes_back_what_the_others_committed() -> None:
    now = _all(grc.begin(["a", "b"]), Command.HOLD)
    now = grc.did(now, "a", Command.COMMIT)
    now = grc.refused(now, "b", Command.COMMIT, "the hold has expired")
    assert now.state is ReservationState.RELEASING
    assert grc.todo(now) == {"a": Command.RELEASE}
    now = grc.did(now, "a", Command.RELEASE)
    assert now.state is ReservationState.RELEASED
    assert now.reason == "b: the hold has expired"


@pytest.mark.parametrize(
    ("state", "after"),
    [
        (ReservationState.HOLDING, ReservationState.RELEASING),
        (ReservationState.COMMITTING, ReservationState.COMMITTING),
        (ReservationState.COMMITTED, ReservationState.COMMITTED),
        (ReservationState.RELEASING, ReservationState.RELEASING),
    ],
)
def test_what_was_not_written_down_was_not_decided(state: ReservationState, after: ReservationState) -> None:
    kept = replace(grc.begin(["a"]), state=state)
    assert grc.happened(kept, grc.Event.RESTARTED, "restarted").state is after


def test_an_answer_to_what_is_not_asked_any_more_changes_nothing() -> None:
    now = grc.happened(grc.begin(["a", "b"]), grc.Event.CANCELLED, "cancelled by its user")
    assert grc.did(now, "a", Command.HOLD) == now
    assert grc.silent(now, "a", "late") == now
    released = grc.did(now, "a", Command.RELEASE)
    assert released.parties["a"].state is PartyState.RELEASED
    assert grc.did(released, "a", Command.RELEASE) == released


def test_every_way_ends() -> None:
    """From every state the window's end leads, over at most one more, to where nobody is asked anything."""
    for state in ReservationState:
        now = replace(grc.begin(["a"]), state=state)
        for _ in range(2):
            now = grc.happened(now, grc.Event.ENDED, "the window has ended")
        assert now.settled


def test_the_tables_in_the_reference_are_those_of_the_code() -> None:
    page = (FilePath(__file__).parents[2] / "docs" / "reference" / "co-allocation.md").read_text(
        encoding="utf-8"
    )
    for table in (grc.markdown(), prm.markdown()):
        assert table in page, "python -m virtgrid.grid.coalloc prints them"
