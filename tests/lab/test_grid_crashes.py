"""kill -9 of NodeManager and virtgridd at every step: nothing leaks, and the state afterwards is right."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from gridsite import GridSite

from tests.wire_ends import until
from virtgrid.core.errors import VirtgridError
from virtgrid.grid.messages.node import Exec, Finished, HostEntry, Output, SetKeys, State
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab

STEPS = (State.INITIATING, State.HOST_READY, State.KEYS_READY, State.STARTING_UP, State.RUNNING)
REST = {State.INITIATING: State.HOST_READY, State.STARTING_UP: State.RUNNING}


class Drive:
    """One pilot and its CRM, brought along step by step."""

    def __init__(self, grid: GridSite, pilots: Pilots, name: str) -> None:
        self.grid, self.pilots, self.name = grid, pilots, name
        self.crm = Endpoint(grid.home / "crm.sock")

    async def begin(self, *, lasts_s: float = 600) -> Pilot:
        self.grid.ticket(self.name, lasts_s=lasts_s)
        self.process = self.grid.start_pilot(self.name, self.crm)
        return await self.pilots.pilot(self.name)

    async def bring(self, pilot: Pilot, state: State) -> None:
        """Until this state was told, from wherever it is; working states are left behind at once."""
        if pilot.state is State.INITIAL:
            await pilot.init(self.grid.init(1))
            if state is State.INITIATING:
                return
        await pilot.until(State.HOST_READY, State.KEYS_READY, State.STARTING_UP, State.RUNNING)
        if pilot.state is State.HOST_READY and state is not State.HOST_READY:
            keys = await pilot.get_keys()
            own = HostEntry(hostname=self.name, address=self.grid.init(1).address, **keys.model_dump())
            await pilot.set_keys(SetKeys(hosts=(own,)))
        if state in (State.STARTING_UP, State.RUNNING):
            if pilot.state in (State.HOST_READY, State.KEYS_READY):
                await pilot.run()
            if state is State.RUNNING:
                await pilot.until(State.RUNNING)

    async def kill_pilot(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait, 30)

    def start_again(self) -> None:
        self.process = self.grid.start_pilot(self.name, self.crm)

    async def use_and_end(self, pilot: Pilot) -> None:
        """It works, and afterwards nothing is left."""
        await self.bring(pilot, State.RUNNING)
        ran = await pilot.exec(Exec(argv=("sh", "-c", "hostname; id -un; exit 3")))
        assert (ran.stdout, ran.finished.status) == (f"{self.name}\ngridu\n".encode(), 3), ran
        await pilot.shut_down()
        await pilot.until(State.DONE)
        assert await asyncio.to_thread(self.process.wait, 30) == 0
        await self.grid.until_nothing_left()


@asynccontextmanager
async def drive(grid: GridSite, name: str) -> AsyncIterator[Drive]:
    async with Pilots(Endpoint(grid.home / "crm.sock"), [grid.key.public_key()]) as pilots:
        yield Drive(grid, pilots, name)


@pytest.mark.parametrize("step", STEPS)
async def test_a_pilot_killed_at_any_step_comes_back_and_goes_on(grid: GridSite, step: State) -> None:
    async with drive(grid, "r42-k") as one:
        pilot = await one.begin()
        await one.bring(pilot, step)
        await one.kill_pilot()
        one.start_again()
        await pilot.until(REST.get(step, step))
        told = list(pilot.history)
        assert len(told) == len(set(told)), "no state was told twice"
        await one.use_and_end(pilot)
        assert list(pilot.history)[:5] == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
async def test_virtgridd_killed_at_any_step_is_restarted_and_goes_on(grid: GridSite, step: State) -> None:
    async with drive(grid, "r42-v") as one:
        pilot = await one.begin()
        await one.bring(pilot, step)
        grid.kill_virtgridd()
        grid.start_virtgridd()
        await pilot.until(REST.get(step, step))
        await one.use_and_end(pilot)
        assert list(pilot.history) == [*STEPS, State.SHUTTING_DOWN, State.DONE]


@pytest.mark.parametrize("step", STEPS)
async def test_libvirtd_killed_at_any_step_is_waited_for(grid: GridSite, step: State) -> None:
    async with drive(grid, "r42-l") as one:
        pilot = await one.begin()
        await one.bring(pilot, step)
        assert grid.site.kill_libvirtd()
        grid.site.launch_libvirtd()
        await asyncio.to_thread(grid.site.wait_libvirtd)
        await pilot.until(REST.get(step, step), State.FAILED)
        try:
            await one.bring(pilot, State.RUNNING)
        except VirtgridError:
            await pilot.until(State.FAILED)
        if pilot.state is State.FAILED:
            # What libvirtd was making when it died, ahead too, is gone with it: told, and nothing is left.
            assert step is not State.RUNNING, pilot.reason
            await pilot.shut_down()
            await pilot.until(State.DONE)
            await grid.until_nothing_left()
        else:
            await one.use_and_end(pilot)


@pytest.mark.parametrize("step", STEPS)
async def test_a_pilot_that_never_comes_back_leaves_nothing(grid: GridSite, step: State) -> None:
    grid.kill_virtgridd()
    grid.orphan_s = 1.0
    grid.start_virtgridd()
    async with drive(grid, "r42-o") as one:
        await one.bring(await one.begin(), step)
        await one.kill_pilot()
        await grid.until_nothing_left()


async def test_everybody_killed_leaves_nothing_once_virtgridd_is_back(grid: GridSite) -> None:
    grid.orphan_s = 1.0
    async with drive(grid, "r42-a") as one:
        pilot = await one.begin()
        await one.bring(pilot, State.RUNNING)
        await pilot.start_program(Exec(argv=("sleep", "1000")))
        grid.kill_virtgridd()
        await one.kill_pilot()
        grid.start_virtgridd()
        await grid.until_nothing_left()


async def test_the_end_of_the_reservation_ends_everything_by_itself(grid: GridSite) -> None:
    async with drive(grid, "r42-e") as one:
        pilot = await one.begin(lasts_s=6)
        await one.bring(pilot, State.RUNNING)
        program = await pilot.start_program(Exec(argv=("sleep", "1000")))
        await pilot.until(State.DONE)
        assert list(pilot.history)[-2:] == [State.SHUTTING_DOWN, State.DONE]
        notes = [note async for note in pilot.program(program)]
        assert isinstance(notes[-1], Finished)
        assert notes[-1].status in (128 + 9, 128 + 15)  # whichever is faster
        await grid.until_nothing_left()


async def test_a_program_outlives_a_restart_of_virtgridd(grid: GridSite) -> None:
    async with drive(grid, "r42-p") as one:
        pilot = await one.begin()
        await one.bring(pilot, State.RUNNING)
        words = "echo before; while [ ! -e go ]; do sleep 0.02; done; echo after; exit 5"
        program = await pilot.start_program(Exec(argv=("sh", "-c", words)))
        notes = pilot.program(program)
        first = await anext(notes)
        assert isinstance(first, Output)
        grid.kill_virtgridd()
        grid.start_virtgridd()
        (grid.home / "kenji" / "go").touch()
        rest = [note async for note in notes]
        assert isinstance(rest[-1], Finished)
        assert rest[-1].status == 5
        assert isinstance(rest[0], Output)
        await one.use_and_end(pilot)


async def test_a_program_of_a_killed_pilot_is_ended(grid: GridSite) -> None:
    async with drive(grid, "r42-d") as one:
        pilot = await one.begin()
        await one.bring(pilot, State.RUNNING)
        program = await pilot.start_program(Exec(argv=("sleep", "1000")))
        await one.kill_pilot()
        one.start_again()
        notes = [note async for note in pilot.program(program)]
        assert isinstance(notes[-1], Finished)
        assert "restarted" in (notes[-1].problem or "")
        while (await pilot.exec(Exec(argv=("pgrep", "-xf", "sleep 1000")))).finished.status == 0:
            pass  # the program is killed as soon as its output has nowhere to go
        await one.use_and_end(pilot)


@pytest.mark.parametrize("how", ["virsh destroy", "kill -9 libvirt_lxc"])
@pytest.mark.parametrize("step", [State.HOST_READY, State.KEYS_READY, State.STARTING_UP, State.RUNNING])
async def test_a_sandbox_that_dies_is_told_and_leaves_nothing(grid: GridSite, step: State, how: str) -> None:
    async with drive(grid, "r42-d") as one:
        pilot = await one.begin()
        await one.bring(pilot, step)
        await until(lambda: one.name in grid.site.domains())  # it is started ahead
        killed = grid.site.domains()[one.name]
        if how == "virsh destroy":
            grid.site.run(["virsh", "-c", "lxc:///", "destroy", one.name])
        else:
            os.kill(killed, signal.SIGKILL)
        if (
            step is State.STARTING_UP
            and await pilot.until(State.FAILED, State.RUNNING) is State.RUNNING
            and grid.site.domains().get(one.name) not in (None, killed)
        ):
            # It had not been asked for when it died, and was made anew then: it runs.
            await one.use_and_end(pilot)
            return
        await pilot.until(State.FAILED)
        if step is State.STARTING_UP:  # by whoever notices first
            assert "ended" in pilot.reason or "no sandbox" in pilot.reason, pilot.reason
        else:
            assert pilot.reason.startswith("the sandbox ended: "), pilot.reason
        await pilot.shut_down()
        await pilot.until(State.DONE)
        await grid.until_nothing_left()


@pytest.mark.parametrize("who", ["pilot", "virtgridd", "libvirtd", "libvirt_lxc"])
async def test_whoever_is_killed_while_it_ends_it_ends(grid: GridSite, who: str) -> None:
    async with drive(grid, "r42-x") as one:
        pilot = await one.begin()
        await one.bring(pilot, State.RUNNING)
        controller = grid.site.domains()[one.name]
        await pilot.shut_down()
        match who:
            case "pilot":
                await one.kill_pilot()
                one.start_again()
            case "virtgridd":
                grid.kill_virtgridd()
                grid.start_virtgridd()
            case "libvirtd":
                assert grid.site.kill_libvirtd()
                grid.site.launch_libvirtd()
                await asyncio.to_thread(grid.site.wait_libvirtd)
            case _:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(controller, signal.SIGKILL)
        await pilot.until(State.DONE)
        assert list(pilot.history) == [*STEPS, State.SHUTTING_DOWN, State.DONE]
        assert await asyncio.to_thread(one.process.wait, 30) == 0
        await grid.until_nothing_left()
