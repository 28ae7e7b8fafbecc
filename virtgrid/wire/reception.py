"""Taking calls: who may come in, how many at a time, and what each may ask.

An asyncio server is not used, because it says nothing about callers that fail their handshake and bounds
neither their number nor their patience.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from virtgrid.core.errors import NotHeardError, RefusedError
from virtgrid.wire import message, skew
from virtgrid.wire.identity import Rights, authorise
from virtgrid.wire.line import Handler, Line
from virtgrid.wire.message import Response
from virtgrid.wire.tls import Shown, Tls, peer_certificate, reason

HANDSHAKES_LIMIT: Final = 64
"""Callers that have not shown a certificate yet. When one more comes, the one that takes longest makes room:
an honest one takes milliseconds, so nobody keeps others out by being slow.
"""
HANDSHAKE_DEADLINE_S: Final = 10.0
EACH_LIMIT: Final = 32
"""Lines that one caller may have over the network, so that nobody keeps the others out."""
IDLE_S: Final = 20.0
"""A caller from the network that said nothing for so long is asked whether it is there."""
_PING_DEADLINE_S: Final = 10.0
_PAUSE_S: Final = 0.5
_COMPLAINTS: Final = 60
"""Sentences a minute in the log about those who were refused: strangers must not fill the disk."""

Serve = Callable[[Line], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How callers are served. rights None: the handler decides itself (unix sockets only)."""

    handler: Handler
    name: str
    limit: int
    serve: Serve | None
    tls: Tls | None
    rights: Rights | None


class Reception:
    """Takes the calls that come to a listening socket until it is closed."""

    def __init__(self, sock: socket.socket, manner: Manner) -> None:
        sock.setblocking(False)
        self._sock, self._manner = sock, manner
        self._lines: set[Line] = set()
        self._shaking: dict[asyncio.Task[None], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaints = _Complaints()
        self._accepting = asyncio.create_task(self._accept(), name=f"accept {manner.name}")

    async def close(self) -> None:
        """Take no more calls, and hang up on everybody."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._sock.close()
        shaking = list(self._shaking)
        for task in shaking:
            task.cancel()
        await asyncio.gather(*shaking, return_exceptions=True)
        for line in list(self._lines):
            await line.close("the other side is ending")

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._sock)
            except OSError as error:
                # No descriptors left, most likely; who hangs up gives one back.
                self._complaints.say(f"no call can be taken: {error.strerror}")
                await asyncio.sleep(_PAUSE_S)
                continue
            self._begin(sock, _caller(self._manner.name, address))

    def _begin(self, sock: socket.socket, caller: str) -> None:
        while len(self._shaking) >= HANDSHAKES_LIMIT:
            slowest = next(iter(self._shaking))
            self._complaints.say(f"{self._shaking.pop(slowest)} makes room: it has shown no certificate yet")
            slowest.cancel()
        task = asyncio.create_task(self._take(sock, caller), name=caller)
        self._shaking[task] = caller
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._shaking.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("serving %s failed", task.get_name(), exc_info=error)

    async def _take(self, sock: socket.socket, caller: str) -> None:
        """One call, from its handshake to its end."""
        try:
            reader, writer = await self._streams(sock)
        except OSError as error:
            self._complaints.say(f"{caller} is not let in: {reason(error)}")
            return
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._shaking.pop(task, None)
        try:
            line = self._line(reader, writer, caller)
        except RefusedError as error:
            self._complaints.say(f"{caller} is not let in: {error.what}")
            # By then it has our word that it is us, so it may hear why.
            writer.write(message.encode(Response(id=None, fault=message.fault_of(error))))
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
            return
        await self._serve(line)

    async def _streams(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        tls = self._manner.tls
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                sock,
                ssl=tls.server_context() if tls else None,
                ssl_handshake_timeout=HANDSHAKE_DEADLINE_S if tls else None,
            )
        except BaseException:
            sock.close()
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, caller: str) -> Line:
        """Errors: RefusedError: too many, or the certificate is nobody's."""
        manner = self._manner
        if len(self._lines) >= manner.limit:
            raise RefusedError(f"{len(self._lines)} callers are served already", hint="try again later")
        if manner.tls is None:
            return Line(reader, writer, self._guarded(None), name=caller)
        shown = manner.tls.examine(peer_certificate(writer.get_extra_info("ssl_object")))
        who = shown.identity
        if sum(line.peer == who for line in self._lines) >= EACH_LIMIT:
            raise RefusedError(f"{who} has {EACH_LIMIT} lines already", hint="hang up some of them")
        return Line(
            reader, writer, self._guarded(shown), name=f"{who} ({caller})", clock=manner.tls.clock, peer=who
        )

    async def _serve(self, line: Line) -> None:
        self._lines.add(line)
        manner = self._manner
        alive = None
        if manner.tls is not None:
            alive = asyncio.create_task(line.keep_alive(idle_s=IDLE_S, deadline_s=_PING_DEADLINE_S))
        try:
            if manner.serve is not None:
                await manner.serve(line)
            else:
                await line.wait_ended()
        finally:
            self._lines.discard(line)
            if alive is not None:
                alive.cancel()
            await line.close()

    def _guarded(self, shown: Shown | None) -> Handler:
        """The handler behind its guards: certificate still good, permitted to ask this, clocks agree."""
        manner = self._manner
        if manner.rights is None:
            return manner.handler
        rights, tls = manner.rights, manner.tls
        agreed = tls is None

        async def heard(line: Line, method: str, params: Mapping[str, Any]) -> Any:
            nonlocal agreed
            try:
                if tls is not None and shown is not None:
                    tls.require_good(shown)
                authorise(line.peer, method, rights=rights, site=tls.identity.site if tls else None)
                if tls is not None and not agreed:
                    skew.require_agreement(line.name, await line.skew_s(deadline_s=_PING_DEADLINE_S))
                    agreed = True
            except RefusedError as error:
                self._complaints.say(f"{line.name} is refused {method}: {error.what}")
                raise NotHeardError(error.what, cause=error.cause, hint=error.hint) from error
            return await manner.handler(line, method, params)

        return heard


def _caller(name: str, address: object) -> str:
    return f"{name} at {address[0]}" if isinstance(address, tuple) else name


class _Complaints:
    """Warnings in the log, so many a minute; how many more there were is said afterwards."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._said = self._kept = 0

    def say(self, text: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._since_s >= 60:
            if self._kept:
                _log.warning("%d more were refused within a minute", self._kept)
            self._since_s, self._said, self._kept = now_s, 0, 0
        if self._said < _COMPLAINTS:
            self._said += 1
            _log.warning("%s", text)
        else:
            self._kept += 1
