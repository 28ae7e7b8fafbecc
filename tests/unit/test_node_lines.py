"""A pilot and its CRM over sockets that are cut at any byte: nothing is lost, nothing is done twice."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_host import HOSTS, INIT, KEYS, NOW, Bench
from tests.wire_ends import raw, until
from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.node import Exec, Init, Output, SetKeys, State, StateChanged
from virtgrid.grid.node import uplink
from virtgrid.grid.node.uplink import Uplink
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Identity, LocalUser, Role

KEY = seal.new_key()


class Cutter:
    """Between a pilot and its CRM; ends each connection after a number of bytes, in either direction."""

    def __init__(self, inner: Path, outer: Path, budgets: list[int]) -> None:
        self.inner, self.outer, self.budgets = inner, outer, budgets
        self.cuts = 0
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Cutter:
        self.server = await asyncio.start_unix_server(self._take, self.outer)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        left = [self.budgets.pop(0) if self.budgets else 1 << 30]
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_unix_connection(self.inner)
            try:
                ways = [self._pump(reader, back, left), self._pump(there, writer, left)]
                done = [asyncio.create_task(way) for way in ways]
                await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
                for way in done:
                    way.cancel()
                await asyncio.gather(*done, return_exceptions=True)
            finally:
                back.transport.abort()
        writer.transport.abort()
        self.cuts += left[0] <= 0
        self.tasks.discard(task)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]
    ) -> None:
        while left[0] > 0 and (data := await reader.read(min(left[0], 700))):
            left[0] -= len(data)
            writer.write(data)
            await writer.drain()


class World:
    """One NodeManager in this process, its CRM, and a line that is cut."""

    def __init__(self, tmp_path: Path, budgets: list[int], **ticket: Any) -> None:
        self.bench = Bench(tmp_path / "pilot", uid=os.geteuid() or 1, **ticket)
        self.text = tickets.issue(self.bench.ticket, KEY)
        self.heard: list[Model] = []
        self.pilots = Pilots(Endpoint(tmp_path / "crm"), [KEY.public_key()], taker=self._take)
        self.cutter = Cutter(tmp_path / "crm", tmp_path / "cut", budgets)

    def _take(self, pilot: Pilot, note: Model) -> None:
        self.heard.append(note)

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Pilot]:
        async with self.pilots, self.cutter:
            link = asyncio.create_task(
                Uplink(self.bench.manager, Endpoint(self.cutter.outer), self.text).run()
            )
            try:
                yield await self.pilots.pilot(self.bench.ticket.sandbox)
                assert await asyncio.wait_for(link, 30)
            finally:
                link.cancel()
                await asyncio.gather(link, return_exceptions=True)
                await self.bench.manager.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redialling without waiting, the tickets' time as the fake clock's, and root's own ticket."""
    monkeypatch.setattr(uplink, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(uplink, "_LONGEST_WAIT_S", 0.005)
    monkeypatch.setattr(time, "time", lambda: NOW.timestamp())
    monkeypatch.setattr("virtgrid.wire.line.Line.peer_uid", lambda _: os.geteuid() or 1)


@pytest.mark.parametrize("seed", range(25))
async def test_a_whole_life_over_lines_that_drop_at_any_byte(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    world = World(tmp_path, [dice.randrange(1, 6000) for _ in range(30)])
    host = world.bench.host
    async with world.up() as pilot:
        await pilot.init(Init(**INIT))
        await pilot.until(State.HOST_READY)
        assert await pilot.get_keys() == KEYS
        await pilot.set_keys(SetKeys.model_validate_json(json.dumps(HOSTS)))
        await pilot.run()
        await pilot.until(State.RUNNING)
        pieces = [dice.randbytes(dice.randrange(1, 900)) for _ in range(60)]
        program = await pilot.start_program(Exec(argv=("true",)))
        for piece in pieces:
            host.writes(piece)
        host.exits(7)
        notes = [note async for note in pilot.program(program)]
        written = [base64.b64decode(note.data) for note in notes if isinstance(note, Output)]
        assert written == pieces
        assert notes[-1].model_dump()["status"] == 7
        await pilot.shut_down()
        await pilot.until(State.DONE)
    states = [note.state for note in world.heard if isinstance(note, StateChanged)]
    assert states == [
        State.INITIATING, State.HOST_READY, State.KEYS_READY, State.STARTING_UP, State.RUNNING,
        State.SHUTTING_DOWN, State.DONE,
    ]  # fmt: skip
    assert host.done == ["prepare", "set_keys", "start", "exec", "remove"]
    assert pilot.inbox.missing == 0
    assert world.cutter.cuts > 3


async def test_a_ticket_that_was_used_is_good_for_nobody_else(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    async with world.up() as pilot:
        thief = Bench(tmp_path / "thief", uid=world.bench.ticket.uid)
        assert not await Uplink(thief.manager, Endpoint(tmp_path / "crm"), world.text).run()
        assert thief.manager.state is State.DONE
        assert "used by another pilot" in thief.told("state")[0]["reason"]
        assert pilot.connected
        await pilot.shut_down()


async def test_who_brings_no_good_ticket_shuts_down(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    forged = tickets.issue(world.bench.ticket, seal.new_key())
    async with world.pilots:
        assert not await Uplink(world.bench.manager, Endpoint(tmp_path / "crm"), forged).run()
    assert world.bench.manager.state is State.DONE
    assert "nobody trusted here" in world.bench.told("state")[0]["reason"]


async def test_who_does_not_say_hello_is_not_listened_to(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    async with world.pilots, raw(Endpoint(tmp_path / "crm")) as stranger:
        await stranger.say(b'{"jsonrpc":"2.0","method":"TELL","params":{},"id":1}\n')
        assert b"says HELLO first" in await stranger.hear()
        await stranger.say(b'{"jsonrpc":"2.0","method":"HELLO","params":{"ticket":7},"id":2}\n')
        assert b"-32602" in await stranger.hear()


async def test_a_number_left_out_ends_the_line(tmp_path: Path) -> None:
    world = World(tmp_path, [])
    async with world.up() as pilot:
        line = pilot._line
        assert line is not None
        manager = world.bench.manager
        manager.outbox.last += 1  # a sender that has lost its memory
        await pilot.init(Init(**INIT))
        await until(lambda: line.lost is not None)
        assert "one is missing" in (line.lost or "")
        manager.outbox._kept.clear()
        manager.outbox.last = manager.outbox.acknowledged = pilot.inbox.taken
        await pilot.shut_down()


# -- tickets -------------------------------------------------------------------------------------


def _user(uid: int) -> LocalUser:
    return LocalUser(uid=uid, trusted=False)


def _admit(text: str, **changes: Any) -> tickets.Ticket:
    values = {"bearer": _user(5001), "now_s": NOW.timestamp()}
    return tickets.admit(text, [KEY.public_key()], **{**values, **changes})


def test_a_ticket_is_good_for_its_user_and_its_time(tmp_path: Path) -> None:
    ticket = Bench(tmp_path).ticket
    text = tickets.issue(ticket, KEY)
    assert _admit(text) == ticket
    with pytest.raises(RefusedError, match="of user 5001"):
        _admit(text, bearer=_user(5002))
    with pytest.raises(RefusedError, match="of user 5001"):
        _admit(text, bearer=LocalUser(uid=0, trusted=True))
    pilot = Identity(role=Role.PILOT, site="a", name=ticket.sandbox)
    assert _admit(text, bearer=pilot) == ticket
    with pytest.raises(RefusedError, match="virtgrid://a/pilot/other brings it"):
        _admit(text, bearer=replace(pilot, name="other"))
    with pytest.raises(RefusedError, match="virtgrid://a/user/"):
        _admit(text, bearer=replace(pilot, role=Role.USER))
    with pytest.raises(RefusedError, match="has ended"):
        _admit(text, now_s=ticket.ends_at_s)


def test_a_ticket_that_was_changed_is_nobody_s(tmp_path: Path) -> None:
    text = tickets.issue(Bench(tmp_path).ticket, KEY)
    body, _, signature = text.partition(".")
    for changed in (
        "", ".", body, f"{body}.", f".{signature}", f"{body}A.{signature}", f"{body}.{signature[:-4]}AAAA",
        text + ".x", "ü", text * 200, f"{body} .{signature}",
    ):  # fmt: skip
        with pytest.raises(RefusedError):
            _admit(changed)


@pytest.mark.parametrize(
    "changes",
    [{"uid": 0}, {"uid": 65535}, {"sandbox": "../x"}, {"ends_at_s": 0.0}, {"cpus": "a"}, {"memory_bytes": 1}],
)
def test_a_ticket_cannot_say_something_impossible(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).replace("ends_at_s", "ends before")):
        Bench(tmp_path, **changes)


def test_a_ticket_s_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "ticket"
    seal.write_private(path, tickets.issue(Bench(tmp_path / "pilot").ticket, KEY))
    assert path.stat().st_mode & 0o777 == 0o600
    assert tickets.read(path)[1].sandbox == "r-42-1"
    path.chmod(0o640)
    with pytest.raises(RefusedError, match="may be read by others"):
        tickets.read(path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(RefusedError, match="cannot be read"):
        tickets.read(link)
    with pytest.raises(RefusedError, match="cannot be written"):
        seal.write_private(path, "again")
