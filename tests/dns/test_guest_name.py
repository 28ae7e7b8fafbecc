"""A guest's name goes with it, and comes back when it stays: the steps of a migration on a real BIND."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bind import NAME, NEW, NEW6, OLD, OLD6, OTHER, TTL_S, ZONE, Bind

from tests.unit.plans import plan, request
from virtgrid.core import journal as journals
from virtgrid.core.clock import SystemClock
from virtgrid.core.events import Record as Line
from virtgrid.core.journal import Journal
from virtgrid.migration.guestname import GuestName, end_name, name_facts
from virtgrid.migration.naming import LOW_TTL_S, NameFacts, NameRequest, NameState
from virtgrid.migration.preflight import CheckVerdict, preflight
from virtgrid.migration.recovery import remains
from virtgrid.wire.dns.records import Change, NameServerError, Record

ID = "20260101T000000-web1"
MEND = f"virtgrid migration recover {ID} --yes"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / f"{ID}.jsonl", SystemClock())
    journal.write(
        "started", id=ID, domain="web1", uuid="u", source="alice", destination="bob", dest_uri="x",
        policy="strict",
    )  # fmt: skip
    return journal


def asked(bind: Bind, name: str = NAME, *addresses: str) -> NameRequest:
    return NameRequest(
        name=name, addresses=addresses or (NEW,), server=bind.address, key_file=str(bind.key_file())
    )


async def begun(journal: Journal, wish: NameRequest) -> GuestName:
    """A name's part of a migration after preflight."""
    facts = await name_facts(wish)
    assert facts is not None
    assert facts.problem is None
    return GuestName(journal, SystemClock(), plan(request(dns=wish), name=facts), ID)


def lines(journal: Journal) -> list[Line]:
    return journals.read(journal.path)


def states(journal: Journal) -> list[str]:
    return [line["state"] for line in lines(journal) if line.event == "name_changed"]


async def by_somebody_else(bind: Bind, before: str, after: str, *, ttl_s: int = TTL_S) -> None:
    old, new = (Record.of(before, ttl_s),), (Record.of(after, ttl_s),)
    await bind.stranger().change(Change(name=NAME, zone=ZONE, before=old, after=new))


# --- a migration that arrives -------------------------------------------------------------


async def test_the_time_to_live_goes_down_then_the_address_over_then_the_time_back(
    bind: Bind, journal: Journal
) -> None:
    name = await begun(journal, asked(bind))
    seen = [bind.resolve()]
    async with name:
        await name.lower()
        seen.append(bind.resolve())
        await name.move()
        seen.append(bind.resolve())
        await name.settle("yes")
    assert [*seen, bind.resolve()] == [[(OLD, TTL_S)], [(OLD, LOW_TTL_S)], [(NEW, LOW_TTL_S)], [(NEW, TTL_S)]]
    assert name.told() == {"name_state": "settled"}
    assert states(journal) == ["lowered", "moved", "settled"]
    assert remains(lines(journal)).name is None


async def test_both_addresses_go_together(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind, NAME, NEW, NEW6)) as name:
        await name.lower()
        await name.move()
        await name.settle("yes")
    assert (bind.resolve(), bind.resolve(kind="AAAA")) == ([(NEW, TTL_S)], [(NEW6, TTL_S)])


async def test_only_what_was_asked_for_is_changed(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind, NAME, NEW6)) as name:
        await name.lower()
        await name.move()
        await name.settle("unknown")
    assert (bind.resolve(), bind.resolve(kind="AAAA")) == ([(OLD, TTL_S)], [(NEW6, TTL_S)])


async def test_a_time_to_live_that_is_short_already_stays(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind, f"brief.{ZONE}")) as name:
        await name.lower()
        assert bind.serial() == 1
        await name.move()
        await name.settle("yes")
    assert bind.resolve(f"brief.{ZONE}") == [(NEW, 4)]


async def test_a_silent_guest_s_name_keeps_its_short_time_to_live_and_says_so(
    bind: Bind, journal: Journal
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await name.move()
        await name.settle("no")
    assert bind.resolve() == [(NEW, LOW_TTL_S)]
    assert name.told()["name_state"] == "moved"
    assert name.told()["hint"].startswith(MEND)
    left = remains(lines(journal)).name
    assert left is not None
    await end_name(left, journal, NameState.SETTLED)
    assert bind.resolve() == [(NEW, TTL_S)]
    assert remains(lines(journal)).name is None


async def test_without_a_name_nothing_is_done_or_told(journal: Journal) -> None:
    async with GuestName(journal, SystemClock(), plan(), ID) as name:
        await name.lower()
        await name.move()
        await name.settle("yes")
        await name.leave(there=False)
    assert name.told() == {}
    assert [line.event for line in lines(journal)] == ["started"]
    assert await name_facts(None) is None


# --- a migration that fails ---------------------------------------------------------------


async def test_a_failed_migration_gives_the_name_back_as_it_was(bind: Bind, journal: Journal) -> None:
    name = await begun(journal, asked(bind, NAME, NEW, NEW6))
    async with name:
        await name.lower()
    assert (bind.resolve(), bind.resolve(kind="AAAA")) == ([(OLD, TTL_S)], [(OLD6, TTL_S)])
    assert states(journal) == ["lowered", "original"]


@pytest.mark.parametrize("ttl_s", [77, LOW_TTL_S])
async def test_what_somebody_else_has_set_meanwhile_is_not_taken_back(
    bind: Bind, journal: Journal, ttl_s: int
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await by_somebody_else(bind, OLD, OLD if ttl_s == 77 else OTHER, ttl_s=ttl_s)
        before = bind.resolve()
    assert bind.resolve() == before
    assert "somebody else" in lines(journal)[-1]["text"]


async def test_a_name_whose_guest_cannot_be_found_is_left_for_recover(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await name.leave(there=False)
    assert bind.resolve() == [(OLD, LOW_TTL_S)]
    assert (lines(journal)[-1].event, lines(journal)[-1]["kind"]) == ("left", "name")
    assert remains(lines(journal)).name is not None


async def test_a_guest_that_arrived_in_a_failed_migration_gets_its_name(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await name.leave(there=True)
    assert bind.resolve() == [(NEW, LOW_TTL_S)]


async def test_a_name_that_changes_before_it_is_lowered_ends_the_migration_unchanged(
    bind: Bind, journal: Journal
) -> None:
    name = await begun(journal, asked(bind))
    await by_somebody_else(bind, OLD, OTHER)
    with pytest.raises(NameServerError, match=f"not point to {OLD} any more but to {OTHER}"):
        async with name:
            await name.lower()
    assert bind.resolve() == [(OTHER, TTL_S)]


# --- a name server that fails -------------------------------------------------------------


async def test_a_server_that_dies_before_the_switchover_is_told_with_what_mends_it(
    bind: Bind, journal: Journal
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        bind.kill()
        await name.move()
        await name.settle("yes")
    assert name.told()["name_state"] == "lowered"
    assert name.told()["hint"] == f"{MEND} points it to {NEW}"
    bind.start()
    assert bind.resolve() == [(OLD, LOW_TTL_S)]
    left = remains(lines(journal)).name
    assert left is not None
    assert NEW in await end_name(left, journal, NameState.SETTLED)
    assert bind.resolve() == [(NEW, TTL_S)]


async def test_a_server_that_comes_back_in_time_needs_no_mending(bind: Bind, journal: Journal) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        bind.kill()
        await name.move()
        bind.start()
        await name.settle("yes")
    assert bind.resolve() == [(NEW, TTL_S)]
    assert name.told() == {"name_state": "settled"}


async def test_a_server_that_dies_once_the_name_is_moved_only_costs_the_time_to_live(
    bind: Bind, journal: Journal
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await name.move()
        bind.kill()
        await name.settle("yes")
    assert name.told() == {"name_state": "moved", "hint": f"{MEND} gives it back"}


async def test_a_server_that_dies_before_the_name_is_given_back_leaves_it_to_recover(
    bind: Bind, journal: Journal
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        bind.kill()
    assert lines(journal)[-1].event == "left"
    bind.start()
    left = remains(lines(journal)).name
    assert left is not None
    await end_name(left, journal, NameState.ORIGINAL)
    assert bind.resolve() == [(OLD, TTL_S)]


async def test_a_record_that_went_elsewhere_before_the_switchover_is_told_and_left(
    bind: Bind, journal: Journal
) -> None:
    async with await begun(journal, asked(bind)) as name:
        await name.lower()
        await by_somebody_else(bind, OLD, OTHER)
        await name.move()
        await name.settle("yes")
    assert bind.resolve() == [(OTHER, TTL_S)]
    notes = [line["text"] for line in lines(journal) if line.event == "note"]
    assert len(notes) == 2
    assert all("somebody else" in note for note in notes)
    assert name.told() == {"name_state": "lowered"}


# --- preflight ----------------------------------------------------------------------------


async def problem(wish: NameRequest) -> tuple[str, str]:
    """What preflight says of it -> (sentence, hint)."""
    facts = await name_facts(wish)
    [check] = [one for one in preflight(plan(request(dns=wish), name=facts)) if one.name == "name"]
    assert check.verdict is CheckVerdict.FAIL
    assert check.hint
    return check.text, check.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda wish, bind: replace(wish, key_file="/nonexistent"), "/nonexistent"),
        (lambda wish, bind: replace(wish, name=f"locked.{ZONE}"), "may not change this name"),
        (lambda wish, bind: replace(wish, name="web.example.org"), "not the primary server"),
        (lambda wish, bind: replace(wish, name=f"nobody.{ZONE}"), "no A record"),
        (lambda wish, bind: replace(wish, name=f"alias.{ZONE}"), f"alias of {NAME}"),
        (lambda wish, bind: replace(wish, name=f"several.{ZONE}"), "cannot be told"),
        (lambda wish, bind: replace(wish, name=f"v4only.{ZONE}", addresses=(NEW6,)), "no AAAA record"),
    ],
)
async def test_preflight_refuses_what_would_fail_later_and_changes_nothing(
    bind: Bind, change: Callable[[NameRequest, Bind], NameRequest], words: str
) -> None:
    text, _ = await problem(change(asked(bind), bind))
    assert words in text
    assert bind.serial() == 1


async def test_preflight_tells_a_wrong_key_and_a_server_that_is_away(bind: Bind) -> None:
    wrong = bind.home / "wrong.key"
    wrong.touch(mode=0o600)
    key = bind.key_file().read_text()
    at = key.index('secret "') + 8
    wrong.write_text(f"{key[:at]}{'B' if key[at] == 'A' else 'A'}{key[at + 1 :]}")
    assert "does not know the key" in (await problem(replace(asked(bind), key_file=str(wrong))))[0]
    bind.kill()
    assert "does not answer" in (await problem(asked(bind)))[0]


async def test_preflight_passes_what_will_work_and_changes_nothing(bind: Bind) -> None:
    facts = await name_facts(asked(bind))
    assert isinstance(facts, NameFacts)
    assert facts.problem is None
    assert bind.serial() == 1
