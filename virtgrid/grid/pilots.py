"""The other end of a pilot's line: what a CRM uses to lead its pilots, whichever line they are on at the
moment.

``Pilots`` listens and recognises who dials in; a ``Pilot`` lasts as long as its NodeManager. A command
that was on its way when the line dropped is asked again on the next one, with the same key, so it is done
once. Notifications come in order, each once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from virtgrid.core.errors import DeadlineError, RefusedError, VirtgridError
from virtgrid.grid.claims import Claims
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.common import Model, parse
from virtgrid.grid.messages.node import (
    NOTES,
    Acknowledge,
    Command,
    Exec,
    Finished,
    Hello,
    Init,
    Keyed,
    Keys,
    Nothing,
    Output,
    SetKeys,
    Started,
    State,
    StateChanged,
    Status,
    Tell,
    Welcome,
)
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.wire.endpoint import Endpoint, Listener, listen
from virtgrid.wire.identity import Right, Role
from virtgrid.wire.line import Line, LineLostError
from virtgrid.wire.message import bad_parameters, no_such_method
from virtgrid.wire.outbox import Inbox, OutOfStepError, Standing
from virtgrid.wire.tls import Tls

COMMAND_DEADLINE_S: Final = 60.0
_ATTEMPT_S: Final = 20.0
_HELLO_DEADLINE_S: Final = 10.0
_HISTORY: Final = 64
PILOTS_LIMIT: Final = 4096
"""Lines at a time: as many as a cluster has hosts (``SetKeys``), old and new ones of some of them."""

_RIGHTS: Final = {method: Right(ours=frozenset({Role.PILOT})) for method in ("HELLO", "TELL")}

Taker = Callable[["Pilot", Model], Awaitable[None] | None]
"""Told every notification, in order; the next one and the acknowledgement wait until it has returned."""
Meet = Callable[["Pilot"], None]
"""Told of a pilot. Errors: RefusedError: it is not listened to."""


@dataclass(slots=True)
class Ran:
    """A program that has ended, with what it wrote."""

    finished: Finished
    stdout: bytes
    stderr: bytes


@dataclass(slots=True, eq=False)
class _Program:
    """What has come of a program so far. The queue is bounded by acknowledgements, not by itself."""

    notes: asyncio.Queue[Output | Finished] = field(default_factory=asyncio.Queue)


class Pilot:
    """One NodeManager, seen from its CRM. state: what it last told.

    collects: keep what programs write for ``program``; who takes it otherwise does without.
    """

    def __init__(self, ticket: Ticket, session: str, taker: Taker | None, *, collects: bool = True) -> None:
        self._collects = collects
        self.ticket = ticket
        self.session = session
        self.inbox = Inbox()
        self.status: Status | None = None
        self.state = State.INITIAL
        self.reason = ""
        #: Its last states; a pilot that tells of changes for ever does not fill our memory.
        self.history: deque[State] = deque(maxlen=_HISTORY)
        self._taker = taker
        self._line: Line | None = None
        self._here = asyncio.Event()
        self._moved = asyncio.Condition()
        self._programs: dict[str, _Program] = {}
        self._acknowledged = 0

    @property
    def connected(self) -> bool:
        return self._line is not None and self._line.lost is None

    # -- its line ------------------------------------------------------------------------------

    def hello(self, line: Line, hello: Hello) -> Welcome:
        """The pilot has dialled in (anew). Errors: RefusedError."""
        if hello.session != self.session:
            raise RefusedError("this ticket was used by another pilot")
        new = self.inbox.incarnation == 0
        sender = Standing(incarnation=hello.incarnation, base=hello.base, acknowledged=hello.acknowledged)
        try:
            after = self.inbox.hello(sender)
        except OutOfStepError as error:
            raise RefusedError(str(error)) from error
        if self._line is not None and self._line.lost is None:
            self._line.hang_up("the pilot has dialled in anew")
        self.status = hello.status
        if new:
            # It may be older than we are: a CRM that was restarted meets it again.
            self.state, self.reason = hello.status.state, hello.status.reason
        self._line = line
        self._acknowledged = after
        self._here.set()
        return Welcome(after=after)

    def lost(self, line: Line) -> None:
        if self._line is line:
            self._line = None
            self._here.clear()

    async def heard(self, line: Line, tell: Tell) -> None:
        """A notification. One that does not follow on ends the line; the next one begins where it should."""
        if line is not self._line:
            return
        try:
            new = self.inbox.take(tell.number)
        except OutOfStepError as error:
            line.hang_up(str(error))
            return
        if new:
            await self._take(parse(NOTES[tell.kind], tell.kind, tell.body))
        self._acknowledged = max(self._acknowledged, tell.number)
        with contextlib.suppress(LineLostError):
            await line.notify("ACK", Acknowledge(number=self.inbox.taken).model_dump())

    async def _take(self, note: Model) -> None:
        if isinstance(note, StateChanged):
            self.state, self.reason = note.state, note.reason
            self.history.append(note.state)
        elif self._collects and isinstance(note, Output | Finished):
            self._programs.setdefault(note.exec, _Program()).notes.put_nowait(note)
        if self._taker is not None and (waited := self._taker(self, note)) is not None:
            await waited
        async with self._moved:
            self._moved.notify_all()

    # -- commands ------------------------------------------------------------------------------

    async def command(
        self, command: Command, params: Keyed | None = None, *, deadline_s: float = COMMAND_DEADLINE_S
    ) -> Any:
        """Give a command and wait for its answer, over as many lines as it takes.

        Errors: the pilot's (RefusedError, …); DeadlineError when it could not be reached in time.
        """
        asked = params or Nothing()
        if asked.key is None:
            asked = asked.model_copy(update={"key": secrets.token_urlsafe(12)})
        told = asked.model_dump(mode="json")
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    await self._here.wait()
                    line = self._line
                    if line is None:
                        continue
                    try:
                        return await line.call(command, told, deadline_s=_ATTEMPT_S)
                    except LineLostError:
                        self.lost(line)
                    except DeadlineError as error:
                        line.hang_up(error.what)
                        self.lost(line)
        except TimeoutError as error:
            raise DeadlineError(
                f"the pilot of {self.ticket.sandbox} did not answer {command} within {deadline_s:g} s"
            ) from error

    async def init(self, params: Init) -> None:
        await self.command(Command.INIT, params)

    async def get_keys(self) -> Keys:
        return parse(Keys, "GET_KEYS", await self.command(Command.GET_KEYS))

    async def get_status(self) -> Status:
        return parse(Status, "GET_STATUS", await self.command(Command.GET_STATUS))

    async def set_keys(self, params: SetKeys) -> None:
        await self.command(Command.SET_KEYS, params)

    async def run(self) -> None:
        await self.command(Command.RUN)

    async def shut_down(self) -> None:
        await self.command(Command.SHUT_DOWN)

    async def until(self, *states: State, deadline_s: float = COMMAND_DEADLINE_S) -> State:
        """Wait until the pilot has told one of these states.

        FAILED is an error at once, unless it is waited for, or DONE is: that may still follow.
        Errors: VirtgridError with the pilot's reason, DeadlineError.
        """
        try:
            async with asyncio.timeout(deadline_s), self._moved:
                while self.state not in states:
                    if self.state is State.FAILED and State.DONE not in states:
                        raise VirtgridError(f"sandbox {self.ticket.sandbox} failed: {self.reason}")
                    await self._moved.wait()
                return self.state
        except TimeoutError as error:
            wanted = " or ".join(states)
            state = f"{self.state} ({self.reason})" if self.reason else str(self.state)
            what = f"{self.ticket.sandbox} was not {wanted} within {deadline_s:g} s, but {state}"
            raise DeadlineError(what) from error

    async def start_program(self, params: Exec) -> str:
        """EXEC; returns the program's name for ``program``."""
        started = parse(Started, "EXEC", await self.command(Command.EXEC, params))
        self._programs.setdefault(started.exec, _Program())
        return started.exec

    async def program(self, name: str) -> AsyncIterator[Output | Finished]:
        """What a program writes as it comes, and as the last thing how it ended."""
        program = self._programs.setdefault(name, _Program())
        while True:
            note = await program.notes.get()
            yield note
            if isinstance(note, Finished):
                self._programs.pop(name, None)
                return

    async def exec(self, params: Exec) -> Ran:
        """Run a program to its end and collect what it writes."""
        written: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        async for note in self.program(await self.start_program(params)):
            if isinstance(note, Finished):
                return Ran(note, b"".join(written["stdout"]), b"".join(written["stderr"]))
            written[note.stream].append(base64.b64decode(note.data))
        raise AssertionError("a program's notes end with how it ended")


class Pilots:
    """Those who dialled in, by the sandbox their ticket names. A context manager that listens meanwhile.

    tls: of a CRM that pilots dial over the network; made with ``pilots=tickets.issuer(…).certificate``.
    claims: without them a restart of the CRM forgets which pilot had used a ticket.
    met: a pilot that was not here before is about to be let in. here: one has said HELLO, again perhaps.
    collects: as of ``Pilot``.
    """

    def __init__(
        self,
        where: Endpoint,
        keys: Iterable[Ed25519PublicKey],
        *,
        taker: Taker | None = None,
        tls: Tls | None = None,
        claims: Claims | None = None,
        met: Meet | None = None,
        here: Meet | None = None,
        collects: bool = True,
    ) -> None:
        self._where, self._keys, self._taker = where, tuple(keys), taker
        self._met, self._here, self._collects = met, here, collects
        self._tls, self._claims = tls, claims
        self._pilots: dict[str, Pilot] = {}
        self._of_line: dict[Line, Pilot] = {}
        self._arrived = asyncio.Condition()
        self._listener: Listener | None = None

    async def __aenter__(self) -> Pilots:
        self._listener = await listen(
            self._where,
            self._heard,
            name="a pilot",
            mode=0o666,
            limit=PILOTS_LIMIT,
            serve=self._serve,
            tls=self._tls,
            rights=_RIGHTS,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            await self._listener.close()

    @property
    def where(self) -> Endpoint:
        """Where it listens; a port that was free is known by then."""
        return self._listener.where if self._listener is not None else self._where

    async def pilot(self, sandbox: str, *, deadline_s: float = COMMAND_DEADLINE_S) -> Pilot:
        """The pilot of this sandbox, once it has dialled in. Errors: DeadlineError."""
        try:
            async with asyncio.timeout(deadline_s), self._arrived:
                while sandbox not in self._pilots:
                    await self._arrived.wait()
                return self._pilots[sandbox]
        except TimeoutError as error:
            raise DeadlineError(f"no pilot of {sandbox} dialled in within {deadline_s:g} s") from error

    def find(self, sandbox: str, ticket: str) -> Pilot | None:
        """The pilot of this sandbox with this ticket, if it has dialled in since we listen."""
        pilot = self._pilots.get(sandbox)
        return pilot if pilot is not None and pilot.ticket.id == ticket else None

    def forget(self, sandbox: str, ticket: str) -> None:
        """Nobody will ask for this pilot any more."""
        if self.find(sandbox, ticket) is not None:
            del self._pilots[sandbox]

    async def _serve(self, line: Line) -> None:
        """Who does not say HELLO soon is not listened to."""
        ended = asyncio.create_task(line.wait_ended())
        try:
            await asyncio.wait({ended}, timeout=_HELLO_DEADLINE_S)
            if line in self._of_line or ended.done():
                await ended
        finally:
            ended.cancel()
            if (pilot := self._of_line.pop(line, None)) is not None:
                pilot.lost(line)

    async def _heard(self, line: Line, method: str, params: Mapping[str, Any]) -> Any:
        pilot = self._of_line.get(line)
        if method == "HELLO" and pilot is None:
            return await self._hello(line, parse(Hello, method, params))
        if pilot is None:
            raise bad_parameters(method, "a pilot says HELLO first")
        if method == "TELL":
            await pilot.heard(line, parse(Tell, method, params))
            return {}
        raise no_such_method(method)

    async def _hello(self, line: Line, hello: Hello) -> dict[str, Any]:
        ticket = tickets.admit(hello.ticket, self._keys, bearer=line.peer, now_s=time.time())
        if self._claims is not None:
            self._claims.claim(ticket, hello.session)
        pilot = self._pilots.get(ticket.sandbox)
        if pilot is None or pilot.ticket.id != ticket.id:
            if pilot is not None and pilot.connected:
                raise RefusedError(f"sandbox {ticket.sandbox} has a pilot with another ticket")
            pilot = Pilot(ticket, hello.session, self._taker, collects=self._collects)
            if self._met is not None:
                self._met(pilot)
        welcome = pilot.hello(line, hello)
        self._pilots[ticket.sandbox] = pilot
        self._of_line[line] = pilot
        async with self._arrived:
            self._arrived.notify_all()
        if self._here is not None:
            self._here(pilot)
        return welcome.model_dump()
