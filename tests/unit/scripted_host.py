"""virtgridd as a script: what a NodeManager's host can do, with every step under the test's control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.wire_ends import until
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import PeerUnreachableError, VirtgridError
from virtgrid.grid.messages.frames import STDERR, STDOUT, End, Frame
from virtgrid.grid.messages.host import Stage, View
from virtgrid.grid.messages.node import Command, Exec, HostEntry, Init, Keys, State
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.node.manager import NodeManager
from virtgrid.grid.node.record import Store

KEYS = Keys(user_key="ssh-ed25519 " + "u" * 68, host_key="ssh-ed25519 " + "h" * 68)
OTHER = Keys(user_key="ssh-ed25519 " + "v" * 68, host_key="ssh-ed25519 " + "i" * 68)
INIT = {"address": "10.77.0.21", "prefix": 24, "tag": 42, "user": "gridu"}
HOSTS = {
    "hosts": [
        {"hostname": "r-42-1", "address": "10.77.0.21", **KEYS.model_dump()},
        {"hostname": "r-42-2", "address": "10.77.0.22", **OTHER.model_dump(), "slots": 2},
    ]
}
PARAMS: dict[Command, dict[str, Any]] = {
    Command.INIT: INIT,
    Command.SET_KEYS: HOSTS,
    Command.EXEC: {"argv": ["true"]},
}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ticket(**changes: Any) -> Ticket:
    values: dict[str, Any] = {
        "id": "ticket-0001", "reservation": "r-42", "sandbox": "r-42-1", "uid": 5001,
        "begins_at_s": NOW.timestamp() - 10, "ends_at_s": NOW.timestamp() + 3600, "memory_bytes": 256 << 20,
    }  # fmt: skip
    return Ticket(**{**values, **changes})


class ScriptedHost:
    """gates: a step waits at its gate until the test opens it. broken: step -> the error it ends with."""

    def __init__(self) -> None:
        self.view = View(stage=Stage.ABSENT)
        self.done: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.broken: dict[str, VirtgridError] = {}
        self.frames: asyncio.Queue[Frame | End | VirtgridError] = asyncio.Queue()
        self.streamed = 0

    def hold(self, step: str) -> asyncio.Event:
        return self.gates.setdefault(step, asyncio.Event())

    async def _step(self, step: str) -> None:
        self.done.append(step)
        if step in self.gates:
            await self.gates[step].wait()
        if step in self.broken:
            raise self.broken[step]

    async def look(self) -> View:
        return self.view

    async def prepare(self, init: Init) -> Keys:
        await self._step("prepare")
        self.view = View(stage=Stage.PREPARED, keys=KEYS)
        return KEYS

    async def set_keys(self, hosts: tuple[HostEntry, ...]) -> None:
        await self._step("set_keys")
        self.view = View(stage=Stage.PREPARED, ready=True, keys=KEYS)

    async def start(self) -> None:
        await self._step("start")
        self.view = View(stage=Stage.RUNNING, ready=True, keys=KEYS)

    async def stop(self) -> None:
        await self._step("stop")
        self.view = View(stage=Stage.STOPPED, keys=KEYS)

    async def remove(self) -> None:
        await self._step("remove")
        self.view = View(stage=Stage.ABSENT)
        self.frames.put_nowait(PeerUnreachableError("gone with the sandbox"))

    @asynccontextmanager
    async def program(self, what: Exec) -> AsyncIterator[AsyncIterator[Frame | End]]:
        await self._step("exec")
        yield self._stream()

    async def _stream(self) -> AsyncIterator[Frame | End]:
        while True:
            frame = await self.frames.get()
            if isinstance(frame, VirtgridError):
                raise frame
            self.streamed += 1
            yield frame
            if isinstance(frame, End):
                return

    def writes(self, data: bytes, *, error: bool = False) -> None:
        self.frames.put_nowait(Frame(STDERR if error else STDOUT, data))

    def exits(self, status: int) -> None:
        self.frames.put_nowait(End(status=status, user_s=0.5, max_rss_bytes=1024, elapsed_s=1.0))


class Bench:
    """A NodeManager over a scripted host; ``again`` is kill -9 and a new incarnation."""

    def __init__(self, directory: Path, **ticket_changes: Any) -> None:
        self.host = ScriptedHost()
        self.clock = FakeClock(NOW)
        self.directory = directory
        self.ticket = ticket(**ticket_changes)
        self.manager = self._manager()

    def _manager(self) -> NodeManager:
        return NodeManager(ticket=self.ticket, host=self.host, store=Store(self.directory), clock=self.clock)

    async def again(self) -> None:
        await self.manager.close()
        self.manager = self._manager()
        self.manager.seen(await self.host.look())
        await self.manager.resume()

    async def say(self, command: Command, **more: Any) -> dict[str, Any]:
        return await self.manager.command(command, {**PARAMS.get(command, {}), **more})

    async def until(self, state: State) -> None:
        await until(lambda: self.manager.state is state)

    async def bring_to(self, state: State) -> None:
        """By the shortest way the table has; working states are held there."""
        ways: dict[State, list[Command]] = {
            State.INITIAL: [],
            State.INITIATING: [Command.INIT],
            State.HOST_READY: [Command.INIT],
            State.KEYS_READY: [Command.INIT, Command.SET_KEYS],
            State.STARTING_UP: [Command.INIT, Command.SET_KEYS, Command.RUN],
            State.RUNNING: [Command.INIT, Command.SET_KEYS, Command.RUN],
            State.SHUTTING_DOWN: [Command.SHUT_DOWN],
            State.DONE: [Command.SHUT_DOWN],
            State.FAILED: [Command.INIT],
        }
        held = {State.INITIATING: "prepare", State.STARTING_UP: "start", State.SHUTTING_DOWN: "remove"}
        if state in held:
            self.host.hold(held[state])
        if state is State.FAILED:
            self.host.broken["prepare"] = VirtgridError("no template", cause="it is half built")
        rests = {Command.INIT: State.HOST_READY, Command.RUN: State.RUNNING}
        for command in ways[state]:
            await self.say(command)
            if command is not ways[state][-1]:
                await self.until(rests.get(command, self.manager.state))
        await self.until(state)
        begun = {**held, State.FAILED: "stop"}.get(state)
        await until(lambda: begun is None or self.host.done[-1:] == [begun])

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [dict(note.body) for note in self.manager.outbox.after(0, limit=10**6) if note.kind == kind]
