"""The name clients find a guest by, brought along with it: the effects of ``naming``, told in the journal.

After the switchover nothing here raises: the guest has arrived, and a name that could not follow it is
said with the command that mends it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from virtgrid.core.clock import Clock
from virtgrid.core.errors import VirtgridError
from virtgrid.core.journal import Journal
from virtgrid.migration.naming import LOW_TTL_S, NameFacts, NameMove, NameRequest, NameState, obstacle
from virtgrid.migration.plan import MigrationPlan
from virtgrid.wire.dns.key import read_key
from virtgrid.wire.dns.records import Change, ServerAddress, shown
from virtgrid.wire.dns.server import NameServer


async def name_facts(asked: NameRequest | None) -> NameFacts | None:
    """Ask the name server what the name is, and whether our key may change it; nothing is changed."""
    if asked is None:
        return None
    try:
        server = _server(asked.server, asked.key_file)
        entry = await server.look(asked.name)
        if obstacle(asked, entry) is None:
            await server.permits(entry)
    except VirtgridError as error:
        return NameFacts(problem=_reason(error), hint=error.hint)
    return NameFacts(entry=entry)


class GuestName:
    """A guest's name during one migration. Leaving gives it back as it was, unless it was moved or left.

    Without ``--dns`` every method does nothing.
    """

    def __init__(self, journal: Journal, clock: Clock, plan: MigrationPlan, migration_id: str) -> None:
        self._journal = journal
        self._clock = clock
        asked, facts = plan.request.dns, plan.facts.name
        self._way = NameMove.of(asked, facts.entry) if asked and facts and facts.entry else None
        self._mend = f"virtgrid migration recover {migration_id} --yes"
        self._state = NameState.ORIGINAL
        self._undo = False
        self._hint: str | None = None

    async def __aenter__(self) -> GuestName:
        return self

    async def lower(self) -> None:
        """Shorten the records' time to live. Errors: NameServerError, RefusedError."""
        if self._way is None:
            return
        # Written before it is done: a worker that dies in between must not hide it.
        self._journal.write("name", sync=True, **self._way.fields())
        self._undo = True
        change = self._way.change(NameState.ORIGINAL, NameState.LOWERED)
        await self._make(self._way, change, NameState.LOWERED)

    async def move(self) -> None:
        """The guest runs at the destination: point its name there."""
        self._undo = False
        if self._way is None:
            return
        try:
            change = self._way.change(NameState.LOWERED, NameState.MOVED)
            await self._make(self._way, change, NameState.MOVED)
        except VirtgridError as error:
            self._say_left(self._way, error)

    async def leave(self, *, there: bool) -> None:
        """The migration ended badly and not on the source: there, or nobody can say where."""
        if there:
            await self.move()
        elif self._undo and self._way is not None:
            self._undo = False
            reason = "where its guest is must be told first"
            self._journal.write("left", kind="name", name=self._way.name, reason=reason)

    async def settle(self, answering: str) -> None:
        """The guest has been verified: give the records their time to live back.

        One that is silent keeps the short one: somebody may want to point its name elsewhere soon.
        """
        if self._way is None:
            return
        if answering == "no" and self._state is NameState.MOVED:
            self._hint = f"{self._mend} gives {self._way.name} its time to live back"
            text = f"{self._way.name} keeps a time to live of at most {LOW_TTL_S} s: the guest is silent"
            self._journal.write("note", text=text, hint=self._hint)
            return
        try:
            await self._end(self._way, NameState.SETTLED)
            self._hint = None
        except VirtgridError as error:
            self._say_left(self._way, error)

    def told(self) -> dict[str, Any]:
        """What ``finished`` tells of it."""
        if self._way is None:
            return {}
        return {"name_state": self._state.value} | ({"hint": self._hint} if self._hint else {})

    async def __aexit__(self, *_: object) -> None:
        if not self._undo or self._way is None:
            return
        self._undo = False
        try:
            await self._end(self._way, NameState.ORIGINAL)
        except VirtgridError as error:
            self._journal.write("left", kind="name", name=self._way.name, reason=_reason(error))

    async def _end(self, way: NameMove, last: NameState) -> None:
        change = await _last_change(way, last)
        if isinstance(change, str):
            self._journal.write("note", text=change)
        else:
            await self._make(way, change, last)

    async def _make(self, way: NameMove, change: Change | None, state: NameState) -> None:
        began_s = self._clock.monotonic_s()
        await _send(way, change)
        took_s = round(self._clock.monotonic_s() - began_s, 4)
        _say_changed(self._journal, way, state, took_s=took_s)
        self._state = state

    def _say_left(self, way: NameMove, error: VirtgridError) -> None:
        if self._state is NameState.MOVED:
            text, does = "has not got its time to live back", "gives it back"
        else:
            text, does = "does not point to the guest's new place", f"points it to {shown(way.destination)}"
        self._hint = f"{self._mend} {does}"
        self._journal.write("note", text=f"{way.name} {text}: {_reason(error)}", hint=self._hint)


async def end_name(way: NameMove, journal: Journal, last: NameState) -> str:
    """For ``recover``: bring the records to their last state -> a sentence of what was done.

    Errors: NameServerError, RefusedError (the key's file).
    """
    change = await _last_change(way, last)
    if isinstance(change, str):
        return change
    await _send(way, change)
    _say_changed(journal, way, last)
    return way.text(last)


async def _last_change(way: NameMove, last: NameState) -> Change | str | None:
    """Look at the records: what brings them to their last state, or why nothing does (``NameMove.end``)."""
    return way.end(await _server(way.server, way.key_file).look(way.name), last)


async def _send(way: NameMove, change: Change | None) -> None:
    if change is not None and change.before != change.after:
        await _server(way.server, way.key_file).change(change)


def _say_changed(journal: Journal, way: NameMove, state: NameState, **took_s: float) -> None:
    fields: dict[str, Any] = {"state": state.value, "text": way.text(state), **took_s}
    journal.write("name_changed", name=way.name, **fields)


def _server(address: ServerAddress, key_file: str) -> NameServer:
    return NameServer(address, read_key(Path(key_file)))


def _reason(error: VirtgridError) -> str:
    return f"{error.what}{f' ({error.cause})' if error.cause else ''}"
