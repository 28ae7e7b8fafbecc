"""A coordinator over two sites and a network: all or nothing, with the reason of everybody who could not."""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grid_parts import ME, QUICK, coordinating, grid, providers, soon, until, wish

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.grc.coordinator import site_view
from virtgrid.grid.messages.coalloc import (
    Command,
    Offer,
    ReservationState,
    SiteWish,
)

ALL = {"alpha": 1, "beta": 1, "net": 1}
NONE = {"alpha": 0, "beta": 0, "net": 0}


async def test_everything_is_reserved_with_disjoint_addresses(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        view = await parts.coordinator.reserve(wish(), owner=ME)
        assert view.state is ReservationState.COMMITTED
        grants = {one.party: one.grant for one in view.parties}
        assert parts.kept() == ALL
        alpha, beta, net = (grants[name] for name in ("alpha", "beta", "net"))
        assert alpha is not None
        assert beta is not None
        assert net is not None
        assert len(alpha.nodes) == len(beta.nodes) == 2
        ranges = [ipaddress.IPv4Network(str(one.addresses)) for one in (alpha, beta)]
        assert not ranges[0].overlaps(ranges[1])
        assert net.segment is not None
        assert 100 <= net.segment <= 110


async def test_a_refusal_has_the_reason_of_every_party_and_a_window_that_fits_all(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        first = wish("first", window=soon(1, 2), bandwidth_bytes_s=100_000_000)
        assert (await parts.coordinator.reserve(first, owner=ME)).state is ReservationState.COMMITTED
        more = (SiteWish(site="alpha", nodes=4), SiteWish(site="beta", nodes=1))
        second = wish("second", window=soon(2, 2), sites=more, bandwidth_bytes_s=50_000_000)
        view = await parts.coordinator.reserve(second, owner=ME)
        assert view.state is ReservationState.RELEASED
        why = {one.party: one.why for one in view.parties}
        assert why["alpha"] == "4 nodes were asked for, and 2 are free"
        assert why["beta"] == "1 node was asked for, and 0 are free"
        assert why["net"] == "400 Mbit/s were asked for on alpha-beta, and 200 Mbit/s are left"
        assert parts.kept() == ALL
        again = wish("third", window=view.nearest[0], sites=more, bandwidth_bytes_s=50_000_000)
        assert (await parts.coordinator.reserve(again, owner=ME)).state is ReservationState.COMMITTED


async def test_the_same_id_is_the_same_reservation_and_other_words_are_refused(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        asked = wish()
        both = await asyncio.gather(*(parts.coordinator.reserve(asked, owner=ME) for _ in range(3)))
        assert both[0] == both[1] == both[2]
        with pytest.raises(RefusedError, match="the id r1 was used for another reservation"):
            await parts.coordinator.reserve(wish(bandwidth_bytes_s=1), owner=ME)
        with pytest.raises(RefusedError, match="the id r1 was used"):
            await parts.coordinator.reserve(asked, owner="uid:2000")
        assert parts.kept() == ALL


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"window": soon(-3, 1)}, "the window ended"),
        ({"window": soon(-3, 8)}, "the window began"),
        (
            {"sites": (SiteWish(site="gamma", nodes=1),), "bandwidth_bytes_s": None},
            "there is no site 'gamma'",
        ),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_is_changed(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    async with grid(tmp_path) as parts:
        with pytest.raises(RefusedError, match=words):
            await parts.coordinator.reserve(wish(**changed), owner=ME)
        with pytest.raises(NotFoundError):
            await parts.coordinator.show("r1", owner=ME)
        assert all(not line.said for line in parts.lines.values())


@pytest.mark.parametrize(
    ("changed", "party", "words"),
    [
        (
            {"sites": (SiteWish(site="alpha", nodes=2), SiteWish(site="beta", nodes=9))},
            "beta",
            "9 nodes were asked for, and there are 2",
        ),
        ({"segment": 7}, "net", "segment 7 is out of range"),
        (
            {"bandwidth_bytes_s": 10**10},
            "net",
            "8e+04 Mbit/s were asked for on alpha-beta, which has 1000 Mbit/s",
        ),
        (
            {"sites": (SiteWish(site="alpha", nodes=1, addresses="10.9.0.0/28"),), "bandwidth_bytes_s": None},
            "alpha",
            "10.9.0.0/28 is not among the advertised ranges",
        ),
    ],
)
async def test_what_somebody_never_has_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], party: str, words: str
) -> None:
    async with grid(tmp_path) as parts:
        view = await parts.coordinator.reserve(wish(**changed), owner=ME)
        assert view.state is ReservationState.RELEASED
        assert {one.party: one.why for one in view.parties}[party] == words
        assert view.reason == f"{party}: {words}"
        assert parts.kept() == NONE


async def test_cancelling_gives_everything_back_and_only_to_its_owner(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        await parts.coordinator.reserve(wish(), owner=ME)
        for ask in (parts.coordinator.cancel, parts.coordinator.show):
            with pytest.raises(NotFoundError):
                await ask("r1", owner="uid:2000")
        assert (await parts.coordinator.list(None, owner="uid:2000")).reservations == ()
        view = await parts.coordinator.cancel("r1", owner=ME)
        assert view.state is ReservationState.RELEASED
        assert view.reason == "cancelled by its user"
        assert parts.kept() == NONE
        assert (await parts.coordinator.cancel("r1", owner=ME)).state is ReservationState.RELEASED


async def test_a_party_that_is_silent_is_named_and_the_others_give_back(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        parts.lines["net"].unsaid = {Command.HOLD}
        view = await parts.coordinator.reserve(wish(), owner=ME)
        assert view.state is ReservationState.RELEASED
        assert {one.party: one.why for one in view.parties}["net"] == "the line is gone"
        assert parts.kept() == NONE


async def test_a_hold_whose_answer_was_lost_is_released_all_the_same(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        parts.lines["beta"].unheard = {Command.HOLD}
        view = await parts.coordinator.reserve(wish(), owner=ME)
        assert view.state is ReservationState.RELEASED
        assert Command.RELEASE in parts.lines["beta"].said
        assert parts.kept() == NONE


async def test_commit_is_said_until_it_is_answered(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        parts.lines["beta"].unheard = {Command.COMMIT}
        asked = asyncio.create_task(parts.coordinator.reserve(wish(), owner=ME))
        await until(lambda: parts.lines["beta"].said.count(Command.COMMIT) >= 3)
        view = await parts.coordinator.show("r1", owner=ME)
        assert view.state is ReservationState.COMMITTING
        parts.lines["beta"].unheard = set()
        assert (await asked).state is ReservationState.COMMITTED
        assert parts.kept() == ALL


async def test_an_outcome_that_is_not_known_yet_is_told_as_such(tmp_path: Path) -> None:
    async with grid(tmp_path, timing=replace(QUICK, answer_s=0.3)) as parts:
        parts.lines["beta"].unsaid = {Command.COMMIT}
        view = await parts.coordinator.reserve(wish(), owner=ME)
        assert view.state is ReservationState.COMMITTING
        parts.lines["beta"].unsaid = set()
        await until(lambda: parts.state("r1") is ReservationState.COMMITTED)


async def test_a_hold_that_lapsed_before_commit_takes_everything_back(tmp_path: Path) -> None:
    async with grid(tmp_path, timing=replace(QUICK, ttl_s=3)) as parts:
        parts.lines["beta"].unsaid = {Command.COMMIT}
        asked = asyncio.create_task(parts.coordinator.reserve(wish(), owner=ME))
        await until(lambda: parts.kept()["beta"] == 1)
        await until(lambda: parts.kept()["beta"] == 0)
        parts.lines["beta"].unsaid = set()
        view = await asked
        assert view.state is ReservationState.RELEASED
        assert "COMMIT comes too late" in view.reason
        assert parts.kept() == NONE


@pytest.mark.parametrize(
    ("lost", "state", "kept"),
    [
        (Command.HOLD, ReservationState.RELEASED, NONE),
        (Command.COMMIT, ReservationState.COMMITTED, ALL),
        (Command.RELEASE, ReservationState.RELEASED, NONE),
    ],
)
async def test_a_coordinator_that_was_killed_goes_on_from_what_is_written(
    tmp_path: Path, lost: Command, state: ReservationState, kept: dict[str, int]
) -> None:
    async with providers(tmp_path) as (_, databases):
        slow = replace(QUICK, hold_s=30.0, answer_s=0.3)
        async with coordinating(tmp_path, timing=slow) as parts:
            parts.lines["beta"].unsaid = {lost}
            await parts.coordinator.reserve(wish(), owner=ME)
            if lost is Command.RELEASE:
                await parts.coordinator.cancel("r1", owner=ME)
        async with coordinating(tmp_path) as parts:
            parts.databases |= databases
            await until(lambda: parts.state("r1") is state)
            assert parts.kept() == kept


async def test_racing_reservations_share_nothing(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        one_each = (SiteWish(site="alpha", nodes=1), SiteWish(site="beta", nodes=1))
        when = soon()
        views = await asyncio.gather(
            *(
                parts.coordinator.reserve(wish(f"r{number}", sites=one_each, window=when), owner=ME)
                for number in range(8)
            )
        )
        won = [view for view in views if view.state is ReservationState.COMMITTED]
        assert 1 <= len(won) <= 2
        assert parts.kept() == {name: len(won) for name in ALL}
        given = [
            (one.party, node)
            for view in won
            for one in view.parties
            if one.grant is not None
            for node in one.grant.nodes
        ]
        assert len(set(given)) == len(given)
        assert all(view.state is ReservationState.RELEASED for view in views if view not in won)


def test_what_a_site_says_of_its_hosts_is_in_the_list() -> None:
    offer = Offer(nodes=2, nodes_free=1, advertised=(), free=(), problems=("node n1: is down",))
    view = site_view("alpha", offer)
    assert (view.problem, view.problems) == (None, ("node n1: is down",))


async def test_sites_are_listed_also_those_that_do_not_answer(tmp_path: Path) -> None:
    async with grid(tmp_path) as parts:
        parts.lines["beta"].unsaid = {"OFFER"}
        listed = {one.party: one for one in (await parts.coordinator.sites()).sites}
        assert (listed["alpha"].nodes, listed["alpha"].nodes_free) == (4, 4)
        assert listed["beta"].problem == "the line is gone"
        assert listed["net"].kind == "nrm"
        assert listed["net"].problem is None
