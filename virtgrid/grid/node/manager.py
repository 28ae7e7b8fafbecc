"""The NodeManager: takes commands, drives one sandbox through virtgridd, and tells what changes.

One command at a time, whatever line it comes on. What a state has under way runs as one task; leaving the
state cancels it. Everything that another incarnation would need is written down before it is acted on
(``record``).
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol

from virtgrid.core.clock import Clock
from virtgrid.core.errors import PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.grid.messages.common import Model, parse
from virtgrid.grid.messages.frames import STDOUT, End, Frame
from virtgrid.grid.messages.host import Stage, View
from virtgrid.grid.messages.node import (
    PARAMS,
    Command,
    Exec,
    Finished,
    HostEntry,
    Init,
    Keyed,
    Keys,
    Output,
    SetKeys,
    Started,
    State,
    StateChanged,
    Status,
    Usage,
)
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.node import record as records
from virtgrid.grid.node import states
from virtgrid.grid.node.record import Store
from virtgrid.grid.node.states import Event
from virtgrid.wire import message
from virtgrid.wire.answers import Answer, fingerprint
from virtgrid.wire.outbox import Note, Outbox, Standing

_RESERVE: Final = 4096
"""So many numbers are put aside at a time: the record is not written for every piece of output."""
_PERSIST_S: Final = 30.0
"""How long work waits for a virtgridd that is being restarted."""
_BURY_S: Final = 5.0
"""How long output that is left may take on its way when the sandbox is gone."""
_EXECS_LIMIT: Final = 64
_log = logging.getLogger(__name__)


class Host(Protocol):
    """What a NodeManager needs of virtgridd. Everything but ``program`` may be said twice."""

    async def look(self) -> View: ...

    async def prepare(self, init: Init) -> Keys: ...

    async def set_keys(self, hosts: tuple[HostEntry, ...]) -> None: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def remove(self) -> None: ...

    def program(self, what: Exec) -> AbstractAsyncContextManager[AsyncIterator[Frame | End]]: ...


class NodeManager:
    """A pilot. changed: there is something new to tell; told: it is over, and everybody has heard of it."""

    def __init__(self, *, ticket: Ticket, host: Host, store: Store, clock: Clock) -> None:
        self._ticket, self._host, self._store, self._clock = ticket, host, store, clock
        self.changed = asyncio.Event()
        self.told = asyncio.Event()
        self._room = asyncio.Event()
        self._busy = asyncio.Lock()
        self._work: asyncio.Task[None] | None = None
        self._programs: dict[str, asyncio.Task[None]] = {}
        found = store.load()
        if found is None:
            self._record = records.fresh(ticket.id, _stamp(clock.utc()))
            self.outbox = Outbox()
        else:
            if found.ticket_id != ticket.id:
                raise RefusedError(
                    f"{store.path} is the record of another pilot",
                    hint="each pilot has a directory of its own",
                )
            notes = [Note(number=n.number, kind=n.kind, body=n.body) for n in found.notes]
            self.outbox = Outbox.restored(found.reserved, found.acknowledged, notes)
            self._record = found.model_copy(update={"incarnation": found.incarnation + 1})
        self._answers = records.answers_of(self._record)
        self._base = self.outbox.last
        self._save(reserved=self.outbox.last + _RESERVE)

    # -- what it is --------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._record.state

    @property
    def session(self) -> str:
        return self._record.session

    @property
    def standing(self) -> Standing:
        """Where the notifications stand, for HELLO."""
        return Standing(
            incarnation=self._record.incarnation, base=self._base, acknowledged=self.outbox.acknowledged
        )

    @property
    def over(self) -> bool:
        """DONE, and everybody has heard of everything."""
        return self.state is State.DONE and self.outbox.empty

    def status(self) -> Status:
        return Status(
            state=self.state,
            reason=self._record.reason,
            since=self._record.since,
            reservation=self._ticket.reservation,
            sandbox=self._ticket.sandbox,
            ends_at=_stamp(datetime.fromtimestamp(self._ticket.ends_at_s, UTC)),
            execs=self._record.execs,
        )

    # -- its life ----------------------------------------------------------------------------------

    async def resume(self) -> None:
        """Go on where the last incarnation was killed; nothing to do for the first one."""
        for exec_id in self._record.execs:
            problem = "the NodeManager was restarted; how the program ended is not known"
            self._finish(exec_id, Finished(exec=exec_id, status=None, problem=problem))
        self._begin_work()

    async def until_end(self) -> None:
        """Wait for the reservation's end, then shut down."""
        while (left_s := self._ticket.ends_at_s - self._clock.utc().timestamp()) > 0:
            await self._clock.sleep(min(left_s, 60.0))  # the wall clock may be set meanwhile
        self.happened(Event.ENDED, "the reservation has ended")

    async def close(self) -> None:
        """Leave everything as it is and stop working: for the end of the process."""
        tasks = [*self._programs.values(), *([self._work] if self._work else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        """Over and known to be: the record is of no more use."""
        self._store.remove()

    # -- commands ----------------------------------------------------------------------------------

    async def command(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Do what the CRM says; returns the answer.

        Errors: BadMessageError (no such command, or parameters that do not fit), RefusedError (illegal in
        this state: nothing has changed), and what setting keys can meet.
        """
        try:
            command = Command(method)
        except ValueError:
            raise message.no_such_method(method) from None
        asked = parse(PARAMS[command], method, params)
        mark = fingerprint(method, params)
        async with self._busy:
            if asked.key is not None and (known := self._answers.find(asked.key, mark)) is not None:
                return _repeat(known)
            try:
                result = await self._do(command, asked)
            except RefusedError as error:
                self._keep(asked, Answer(fingerprint=mark, fault=_members(error)))
                raise
            self._keep(asked, Answer(fingerprint=mark, result=result))
            return result

    async def _do(self, command: Command, asked: Keyed) -> dict[str, Any]:
        following = states.after_command(self.state, command)
        match command, asked:
            case Command.GET_STATUS, _:
                return self.status().model_dump(mode="json")
            case Command.GET_KEYS, _:
                assert self._record.keys is not None, "the table permits it once there are keys"
                return self._record.keys.model_dump(mode="json")
            case Command.EXEC, Exec():
                return self._exec(asked)
            case Command.INIT, Init():
                self._enter(following, "INIT", init=asked)
            case Command.SET_KEYS, SetKeys():
                self._check_own_entry(asked.hosts)
                await self._host.set_keys(asked.hosts)
                if following is not self.state:
                    # The state may have been left while the files were written.
                    following = states.after_command(self.state, command)
                    self._enter(following, f"the keys of {len(asked.hosts)} nodes are set")
            case _:
                if following is not self.state:
                    self._enter(following, str(command))
        return {}

    def _check_own_entry(self, hosts: tuple[HostEntry, ...]) -> None:
        """The cluster must know this node by its own address and keys, or it could not be reached."""
        init, keys = self._record.init, self._record.keys
        own = next((host for host in hosts if host.hostname == self._ticket.sandbox), None)
        if own is None:
            raise RefusedError(f"this node, {self._ticket.sandbox}, is not among the hosts")
        if init and own.address != init.address:
            raise RefusedError(f"this node has the address {init.address}, not {own.address}")
        if keys and (own.host_key, own.user_key) != (keys.host_key, keys.user_key):
            raise RefusedError("the keys given for this node are not its own")

    def _keep(self, asked: Keyed, answer: Answer) -> None:
        if asked.key is not None:
            self._answers.keep(asked.key, answer)
            self._save()

    # -- states ------------------------------------------------------------------------------------

    def happened(self, event: Event, reason: str) -> None:
        """Something happened by itself; where it comes too late it means nothing."""
        following = states.after_event(self.state, event)
        if following is not None and following is not self.state:
            self._enter(following, reason, happened=True)

    def _enter(self, state: State, reason: str, *, happened: bool = False, **more: Any) -> None:
        before, now = self.state, _stamp(self._clock.utc())
        told = StateChanged(state=state, before=before, reason=reason, at=now)
        note = self._put("state", told)
        try:
            self._save(state=state, reason=reason, since=now, **more)
        except OSError as error:
            if not happened:
                self.outbox.take_back(note)
                raise VirtgridError("the NodeManager cannot write its record", cause=str(error)) from error
            # What has happened is true without a record; the next incarnation finds out by looking.
            _log.error("the record cannot be written: %s", error)
            self._record = self._record.model_copy(update={"state": state, "reason": reason, "since": now})
        _log.info("%s -> %s: %s", before, state, reason)
        self._begin_work()

    def _begin_work(self) -> None:
        if self._work is not None:
            # A step that ends its own state is that state's task: it must not cancel itself.
            if self._work is not asyncio.current_task():
                self._work.cancel()
            self._work = None
        if work := states.TABLE[self.state].work:
            self._work = asyncio.create_task(self._step(work, self.state), name=work)

    async def _step(self, work: str, state: State) -> None:
        """One working state's work, and the event it ends with."""
        try:
            event, reason = await self._persist(self._works()[work])
        except VirtgridError as error:
            event, reason = Event.BROKEN, f"{error.what}: {error.cause}" if error.cause else error.what
        except Exception as error:
            _log.exception("work '%s' failed", work)
            event, reason = Event.BROKEN, f"{type(error).__name__}: {error}; this is a bug"
        if self.state is state:
            self.happened(event, reason)

    def _works(self) -> dict[str, Callable[[], Awaitable[tuple[Event, str]]]]:
        return {
            "prepare": self._prepare,
            "start": self._start,
            "remove": self._remove,
            "stop": self._stop,
        }

    async def _prepare(self) -> tuple[Event, str]:
        assert self._record.init is not None, "INIT is written down before its work begins"
        keys = await self._host.prepare(self._record.init)
        self._save(keys=keys)
        return Event.PREPARED, "the sandbox's tree and keys are made"

    async def _start(self) -> tuple[Event, str]:
        await self._host.start()
        return Event.STARTED, "the sandbox runs, its sshd answers"

    async def _remove(self) -> tuple[Event, str]:
        await self._host.remove()
        await self._bury_programs()
        return Event.STOPPED, "nothing is left of the sandbox"

    async def _bury_programs(self) -> None:
        """Their streams end with the sandbox; every end is told before DONE is."""
        left = dict(self._programs)
        if left:
            await asyncio.wait(left.values(), timeout=_BURY_S)
        for exec_id, task in left.items():
            if not task.done():  # nobody takes its output: it must not hold up the end
                task.cancel()
                problem = "it ended with the sandbox, and not all of its output was taken"
                self._finish(exec_id, Finished(exec=exec_id, status=None, problem=problem))

    async def _stop(self) -> tuple[Event, str]:
        await self._host.stop()
        return Event.BROKEN, "stopped after the failure"  # FAILED stays FAILED: nothing follows from it

    async def _persist(self, step: Callable[[], Awaitable[tuple[Event, str]]]) -> tuple[Event, str]:
        """Do the step; when virtgridd goes away under it, again from the start, for a while."""
        deadline_s = self._clock.monotonic_s() + _PERSIST_S
        wait_s = 0.05
        while True:
            try:
                return await step()
            except PeerUnreachableError:
                if self._clock.monotonic_s() > deadline_s:
                    raise
            await self._clock.sleep(wait_s)
            wait_s = min(1.0, wait_s * 2)

    def seen(self, view: View) -> None:
        """What virtgridd says is there, after a line to it was made (anew). Working states find out by
        themselves.
        """
        resting = {
            # Staged ahead it may run already, when a libvirtd died before its cable was unplugged.
            State.HOST_READY: view.stage in (Stage.PREPARED, Stage.RUNNING),
            State.KEYS_READY: view.stage in (Stage.PREPARED, Stage.RUNNING) and view.ready,
            State.RUNNING: view.stage is Stage.RUNNING,
        }
        if not resting.get(self.state, True):
            self.happened(Event.BROKEN, f"the sandbox should be there, but it is {view.stage}")

    def sandbox_ended(self, reason: str) -> None:
        """virtgridd says that the sandbox is gone. Working states find out by themselves."""
        if self.state in (State.HOST_READY, State.KEYS_READY, State.RUNNING):
            self.happened(Event.BROKEN, f"the sandbox ended: {reason}")

    # -- programs ----------------------------------------------------------------------------------

    def _exec(self, asked: Exec) -> dict[str, Any]:
        if len(self._record.execs) >= _EXECS_LIMIT:
            raise RefusedError(f"{_EXECS_LIMIT} programs run already")
        number = self._record.next_exec
        exec_id = f"e{number}"
        self._save(next_exec=number + 1, execs=(*self._record.execs, exec_id))
        task = asyncio.create_task(self._program(exec_id, asked), name=f"program {exec_id}")
        self._programs[exec_id] = task
        task.add_done_callback(lambda _: self._programs.pop(exec_id, None))
        return Started(exec=exec_id).model_dump()

    async def _program(self, exec_id: str, asked: Exec) -> None:
        end = End(status=None, problem="its connection ended before it did")
        try:
            async with self._host.program(asked) as frames:
                async for frame in frames:
                    if isinstance(frame, End):
                        end = frame
                    else:
                        await self._output(exec_id, frame)
        except VirtgridError as error:
            end = End(status=None, problem=f"{error.what}: {error.cause}" if error.cause else error.what)
        self._finish(exec_id, _finished(exec_id, end))

    async def _output(self, exec_id: str, frame: Frame) -> None:
        while not self.outbox.has_room():
            # Nobody reads from the program until its output has gone on: it waits in its write(2).
            self._room.clear()
            await self._room.wait()
        stream: Literal["stdout", "stderr"] = "stdout" if frame.kind == STDOUT else "stderr"
        data = base64.b64encode(frame.data).decode()
        self._put("output", Output(exec=exec_id, stream=stream, data=data), size_bytes=len(data))

    def _finish(self, exec_id: str, finished: Finished) -> None:
        self._put("finished", finished)
        left = tuple(one for one in self._record.execs if one != exec_id)
        try:
            self._save(execs=left)
        except OSError as error:
            _log.error("the record cannot be written: %s", error)
            self._record = self._record.model_copy(update={"execs": left})

    # -- telling -----------------------------------------------------------------------------------

    def _put(self, kind: str, body: Model, *, size_bytes: int = 0) -> Note:
        passing = size_bytes > 0
        if self.outbox.last >= self._record.reserved:
            self._save(reserved=self.outbox.last + _RESERVE)
        told = body.model_dump(mode="json")
        note = self.outbox.put(kind, told, durable=not passing, size_bytes=size_bytes)
        self.changed.set()
        return note

    def acknowledged(self, number: int) -> None:
        """The CRM has everything up to this number. Errors: OutOfStepError."""
        before = len(self.outbox.durable())
        if self.outbox.acknowledge(number):
            if len(self.outbox.durable()) != before:
                self._save()
            self._room.set()
            if self.over:
                self.told.set()

    def _save(self, **changes: Any) -> None:
        """Change the record and write it down, with the notifications and answers as they are."""
        changes["notes"] = records.kept_notes(self.outbox.durable())
        changes["acknowledged"] = self.outbox.acknowledged
        changes["answers"] = records.kept_answers(self._answers)
        changed = self._record.model_copy(update=changes)
        self._store.save(changed)
        self._record = changed


def _finished(exec_id: str, end: End) -> Finished:
    usage = None
    if end.problem is None:
        usage = Usage(
            user_s=end.user_s,
            system_s=end.system_s,
            max_rss_bytes=end.max_rss_bytes,
            elapsed_s=end.elapsed_s,
        )
    return Finished(exec=exec_id, status=end.status, usage=usage, problem=end.problem)


def _members(error: RefusedError) -> dict[str, Any]:
    fault = message.fault_of(error)
    return {"code": fault.code, "message": fault.message, "data": dict(fault.data or {})}


def _repeat(known: Answer) -> dict[str, Any]:
    if known.fault is not None:
        raise message.error_of(message.Fault(**known.fault))
    return dict(known.result)


def _stamp(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
