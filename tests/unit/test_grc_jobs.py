"""Jobs of a coordinator over two sites with pilots, all in one process; sites that are silent, and kills."""

from __future__ import annotations

import asyncio
import base64
import pwd
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crew_parts import USER, Place
from grid_parts import QUICK, Flaky, until
from sqlalchemy import delete

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.grc import jobs as grc
from virtgrid.grid.grc.coordinator import Coordinator
from virtgrid.grid.grc.jobs import Jobs, Pace
from virtgrid.grid.grc.parties import WireParty
from virtgrid.grid.messages import job as messages
from virtgrid.grid.messages.coalloc import Command, ReservationState, Reserve, SiteWish, Window
from virtgrid.grid.messages.job import JobState, JobView, Order, Submit, Verdict
from virtgrid.grid.messages.node import Exec
from virtgrid.grid.node import uplink
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.provide import Counter, Stored
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.schema import reservation
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.line import Line

ME = "uid:1000"
PACE = Pace(up_s=20.0, ask_s=2.0, watch_s=0.5, again_s=0.02, again_most_s=0.1, answer_s=8.0)


class World:
    """Sites alpha and beta, a network, and a coordinator that can be killed and started again."""

    def __init__(self, directory: Path, pace: Pace) -> None:
        self.directory, self.pace = directory, pace
        self.places: dict[str, Place] = {}
        self.stack = AsyncExitStack()
        self.grc = AsyncExitStack()
        self.lines: dict[str, Flaky] = {}
        self.jobs: Jobs

    async def start(self) -> None:
        for name, addresses in (("alpha", "10.1.0.0/28"), ("beta", "10.1.1.0/28")):
            (self.directory / name).mkdir()
            place = self.places[name] = Place(self.directory / name, name=name, addresses=addresses)
            await place.start()
            self.stack.push_async_callback(place.close)
            more = (messages.CREW_PARAMS, place.site.answer)
            await self.stack.enter_async_context(Counter(place.site, self._at(name), more=more))
        stock = NetworkStock(links={("alpha", "beta"): 10**9}, segments=(7, 9))
        database = self.stack.enter_context(Database(self.directory / "net.db"))
        with database.write() as connection:
            stock.prepare(connection)
        net = Stored(party="net", database=database, stock=stock, clock=SystemClock())
        self.stack.callback(net.close)
        await self.stack.enter_async_context(Counter(net, self._at("net")))
        await self.start_grc()

    def _at(self, name: str) -> Endpoint:
        return Endpoint(self.directory / f"{name}.sock")

    async def start_grc(self) -> None:
        self.grc = AsyncExitStack()
        database = self.grc.enter_context(Database(self.directory / "grc.db"))
        self.lines = {name: Flaky(WireParty(name, self._at(name))) for name in ("alpha", "beta", "net")}
        self.coordinator = Coordinator(
            database=database,
            sites={name: self.lines[name] for name in self.places},
            network=("net", self.lines["net"]),
            clock=SystemClock(),
            timing=QUICK,
        )
        await self.grc.enter_async_context(self.coordinator)
        self.jobs = Jobs(
            coordinator=self.coordinator,
            database=database,
            reach=lambda site: Flaky(WireParty(site, self._at(site)), like=self.lines[site]),
            directory=self.directory / "journals",
            clock=SystemClock(),
            pace=self.pace,
        )
        await self.grc.enter_async_context(self.jobs)

    async def again(self) -> None:
        await self.grc.aclose()
        await self.start_grc()

    async def close(self) -> None:
        await self.grc.aclose()
        await self.stack.aclose()

    # -- a user --------------------------------------------------------------------------------

    async def submit(self, id_: str = "j1", *, lasts_s: int = 600, **more: Any) -> JobView:
        return await self.jobs.submit(self.asked(id_, lasts_s=lasts_s, **more), owner=ME)

    def asked(self, id_: str = "j1", *, lasts_s: int = 600, begins_in_s: int = 0, nodes: int = 2) -> Submit:
        now_s = int(time.time()) + begins_in_s
        wish = Reserve(
            id=id_,
            window=Window(begins_at_s=now_s, ends_at_s=now_s + lasts_s),
            sites=(SiteWish(site="alpha", nodes=nodes), SiteWish(site="beta", nodes=1)),
            bandwidth_bytes_s=1000,
        )
        return Submit(reserve=wish, program=Exec(argv=("true",)))

    async def until(self, state: JobState, id_: str = "j1") -> JobView:
        async with asyncio.timeout(60):
            while (view := await self.jobs.show(id_, owner=ME)).state is not state:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return view

    async def run_and_write(self) -> None:
        """The program runs and has written something."""
        await self.until(JobState.RUNNING)
        await until(lambda: "exec" in self.places["alpha"].first.done)
        self.places["alpha"].first.writes(b"hello ")

    async def output(self, id_: str = "j1") -> str:
        journal = await self.jobs.follow(id_, 0, 0.0, owner=ME)
        lines = [messages.JOURNAL_LINE.validate_json(line) for line in journal.lines.splitlines()]
        return b"".join(
            base64.b64decode(line.data) for line in lines if isinstance(line, messages.Wrote)
        ).decode()

    async def kept(self) -> set[str]:
        """The sites that keep something."""
        return {name for name, place in self.places.items() if place.backend.promised}


@asynccontextmanager
async def world(directory: Path, pace: Pace = PACE) -> AsyncIterator[World]:
    made = World(directory, pace)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redialling soon; the coordinator is root, everybody else the user that has an account everywhere."""
    monkeypatch.setattr(uplink, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(uplink, "_LONGEST_WAIT_S", 0.05)
    user = pwd.getpwnam(USER).pw_uid
    monkeypatch.setattr(Line, "peer_uid", lambda line: 0 if line.name == "a coordinator" else user)
    monkeypatch.setattr(grc, "_user", lambda _: USER)


async def test_a_job_runs_over_two_sites_and_gives_everything_back(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        asked = grid.asked()
        for _ in range(2):
            assert (await grid.jobs.submit(asked, owner=ME)).state is not JobState.RESERVING
        await grid.run_and_write()
        grid.places["alpha"].first.writes(b"world")
        grid.places["alpha"].first.exits(4)
        view = await grid.until(JobState.OVER)
        assert (view.verdict, view.status, view.used_s) == (Verdict.FINISHED, 4, 6.0)
        assert await grid.output() == "hello world"
        assert await grid.kept() == set()
        hosts = [host for place in grid.places.values() for host in place.backend.hosts.values()]
        assert len(hosts) == 3
        assert all(host.done[-1] == "remove" for host in hosts)
        with pytest.raises(RefusedError, match="used for another job"):
            await grid.jobs.submit(replace_program(asked), owner=ME)


def replace_program(asked: Submit) -> Submit:
    return asked.model_copy(update={"program": Exec(argv=("false",))})


@pytest.mark.parametrize("state", [JobState.MUSTERING, JobState.EQUIPPING, JobState.RUNNING])
async def test_a_coordinator_that_is_killed_goes_on_from_what_is_written(
    tmp_path: Path, state: JobState
) -> None:
    async with world(tmp_path) as grid:
        stuck = {JobState.MUSTERING: Order.MUSTER, JobState.EQUIPPING: Order.EQUIP}.get(state)
        if stuck is not None:
            grid.lines["beta"].unsaid = {stuck}
        await grid.submit()
        await grid.until(state)
        if state is JobState.RUNNING:
            await grid.run_and_write()
            await grid.again()
        else:
            await grid.again()
            await grid.run_and_write()
        grid.places["alpha"].first.exits(0)
        view = await grid.until(JobState.OVER)
        assert (view.verdict, view.status) == (Verdict.FINISHED, 0)
        assert await grid.output() == "hello "
        assert grid.places["alpha"].first.done.count("exec") == 1


@pytest.mark.parametrize("state", [JobState.WAITING, JobState.MUSTERING, JobState.RUNNING])
async def test_a_job_is_cancelled_in_any_state_by_its_user_alone(tmp_path: Path, state: JobState) -> None:
    async with world(tmp_path) as grid:
        if state is JobState.MUSTERING:
            grid.places["beta"].backend.mute = True
        await grid.submit(begins_in_s=3600 if state is JobState.WAITING else 0)
        await grid.until(state)
        for ask in (grid.jobs.cancel, grid.jobs.show):
            with pytest.raises(NotFoundError):
                await ask("j1", owner="uid:2000")
        assert (await grid.jobs.list(None, owner="uid:2000")).jobs == ()
        await grid.jobs.cancel("j1", owner=ME)
        for _ in range(30):
            if (await grid.jobs.cancel("j1", owner=ME)).state is JobState.OVER:
                break
        view = await grid.until(JobState.OVER)
        assert view.verdict is Verdict.CANCELLED
        assert await grid.kept() == set()


async def test_who_does_not_come_up_in_time_breaks_the_job_by_name(tmp_path: Path) -> None:
    async with world(tmp_path, replace(PACE, up_s=1.0)) as grid:
        grid.places["beta"].backend.mute = True
        grid.places["beta"].site._terms = replace(grid.places["beta"].site._terms, gone_s=0.5)
        await grid.submit()
        view = await grid.until(JobState.OVER)
        assert view.verdict is Verdict.BROKEN
        assert "not everybody was up within 1 s" in view.reason
        assert "beta: n1 is awaited" in view.reason
        assert await grid.kept() == set()


async def test_a_silent_site_ends_no_running_program_and_keeps_no_other_site_s_nodes(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        await grid.submit()
        await grid.run_and_write()
        grid.lines["beta"].unsaid = {messages.CREW, Order.DISMISS, Command.RELEASE}
        grid.places["alpha"].first.writes(b"still")
        async with asyncio.timeout(30):
            while await grid.output() != "hello still":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        grid.places["alpha"].first.exits(0)
        await grid.until(JobState.DISMISSING)
        async with asyncio.timeout(60):
            while await grid.kept() != {"beta"}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await grid.jobs.show("j1", owner=ME)).status == 0
        grid.lines["beta"].unsaid = set()
        await grid.until(JobState.OVER)
        assert await grid.kept() == set()


async def test_the_window_s_end_is_the_job_s(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        await grid.submit(lasts_s=8)
        view = await grid.until(JobState.OVER)
        assert view.verdict is Verdict.ENDED
        async with asyncio.timeout(30):
            while await grid.kept():
                for place in grid.places.values():
                    await place.site.sweep()
                await asyncio.sleep(0.1)


async def test_a_reservation_that_is_cancelled_under_a_job_breaks_it(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        await grid.submit()
        await grid.run_and_write()
        await grid.coordinator.cancel("j1", owner=ME)
        view = await grid.until(JobState.OVER)
        assert view.verdict is Verdict.BROKEN
        shown = await grid.coordinator.show("j1", owner=ME)
        assert shown.state is ReservationState.RELEASED


async def test_a_coordinator_that_fails_itself_gives_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as grid:
        await grid.submit()
        await grid.run_and_write()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(grid.jobs, "_output", full)
        grid.places["alpha"].first.writes(b"more")
        view = await grid.until(JobState.OVER)
        assert view.verdict is Verdict.BROKEN
        assert "No space left on device" in view.reason
        assert await grid.kept() == set()


async def test_a_job_whose_reservation_nobody_knows_is_over(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        await grid.submit()
        await grid.until(JobState.RUNNING)
        await grid.grc.aclose()
        with Database(tmp_path / "grc.db") as database, database.write() as connection:
            connection.execute(delete(reservation))
        await grid.start_grc()
        view = await grid.until(JobState.OVER)
        assert (view.verdict, view.reason) == (Verdict.BROKEN, "nothing was reserved")


async def test_what_cannot_be_reserved_is_not_run_and_what_cannot_be_is_no_job(tmp_path: Path) -> None:
    async with world(tmp_path) as grid:
        view = await grid.submit(nodes=3)
        assert (view.state, view.verdict) == (JobState.OVER, Verdict.REFUSED)
        assert view.reason == "alpha: 3 nodes were asked for, and there are 2"
        late = grid.asked("j2", begins_in_s=-7200)
        with pytest.raises(RefusedError, match="the window ended"):
            await grid.jobs.submit(late, owner=ME)
        with pytest.raises(NotFoundError):
            await grid.jobs.show("j2", owner=ME)
