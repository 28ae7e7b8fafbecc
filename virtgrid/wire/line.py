"""One connection that carries JSON-RPC lines both ways: deadlines, back-pressure, and a clean end.

Either side may ask and either may notify. What the other side asks is answered one after the other, in
the order it came. Whatever goes wrong with the connection is a LineLostError for everybody who waits on
it; whether the question was done then is not known, which is what idempotency keys are for (``answers``).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import pwd
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import DeadlineError, PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.core.process import peer_credentials
from virtgrid.wire import message
from virtgrid.wire.identity import Identity, LocalUser, Peer
from virtgrid.wire.lines import LineCutter, LineTooLongError
from virtgrid.wire.message import BadMessageError, Fault, Request, Response
from virtgrid.wire.skew import skew_s

WRITE_DEADLINE_S: Final = 20.0
"""A peer that takes nothing for this long is taken for dead."""
CALL_DEADLINE_S: Final = 20.0
WAITING_LIMIT: Final = 64
"""Requests that may wait for their turn on one line; more are refused as busy."""
BAD_LIMIT: Final = 8
"""Lines that are no message, before we hang up."""
_FAREWELL_S: Final = 1.0
"""How long what was written last may take to be taken."""
_FAREWELL_LIMIT: Final = 400
_CHUNK_BYTES: Final = 64 << 10
_BUFFER_BYTES: Final = 256 << 10

Handler = Callable[["Line", str, Mapping[str, Any]], Awaitable[Any]]
"""Answers a request or takes a notification: what it returns is the result, a VirtgridError or a
BadMessageError (``no_such_method``, ``bad_parameters``) the refusal."""


async def deaf(line: Line, method: str, params: Mapping[str, Any]) -> Any:
    """The handler of who only asks."""
    raise message.no_such_method(method)


_log = logging.getLogger(__name__)


class LineLostError(PeerUnreachableError):
    """The connection ended. Whether an unanswered question was done is not known."""

    code = "VG-LINE-LOST"


class HandedOverError(Exception):
    """Raised by a handler: another process has the socket now (``give_socket``) and answers there."""


class Line:
    """A connection with its reader running. ``lost`` says why it ended, None while it is there.

    PING is answered by the line itself, so that a peer is known to be alive whatever its program does; the
    answer tells the time.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handler: Handler,
        *,
        name: str,
        clock: Clock | None = None,
        peer: Identity | None = None,
        still_good: Callable[[], None] | None = None,
    ) -> None:
        """still_good: asked before every question of ours; its RefusedError ends the line."""
        self.name = name
        self._still_good = still_good
        self._clock: Clock = clock or SystemClock()
        self._peer = peer
        self.lost: str | None = None
        #: The id of the request its handler is at; for one that hands the socket over.
        self.answering: message.Id | None = None
        self.heard_s = asyncio.get_running_loop().time()
        self._reader, self._writer, self._handler = reader, writer, handler
        self._user: LocalUser | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._requests: asyncio.Queue[Request] = asyncio.Queue(WAITING_LIMIT)
        self._writing = asyncio.Lock()
        self._ended = asyncio.Event()
        self._bad = 0
        self._farewell = ""
        writer.transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        self._tasks = [
            asyncio.create_task(self._read(), name=f"read {name}"),
            asyncio.create_task(self._answer(), name=f"answer {name}"),
        ]

    # -- asking --------------------------------------------------------------------------------

    async def call(
        self, method: str, params: Mapping[str, Any] | None = None, *, deadline_s: float = CALL_DEADLINE_S
    ) -> Any:
        """Ask, and wait for the result. Errors: the other side's, LineLostError, DeadlineError."""
        self._look_at_peer()
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(deadline_s):
                await self._send(Request(method=method, params=params or {}, id=number))
                return await future
        except TimeoutError as error:
            raise DeadlineError(f"{self.name} did not answer {method} within {deadline_s:g} s") from error
        finally:
            self._waiting.pop(number, None)
            future.cancel()

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Tell, without an answer; waits while the peer is slow to take it. Errors: LineLostError."""
        await self._send(Request(method=method, params=params))

    async def _send(self, what: message.Message) -> None:
        data = message.encode(what)
        async with self._writing:
            self._require()
            self._writer.write(data)
            try:
                async with asyncio.timeout(WRITE_DEADLINE_S):
                    await self._writer.drain()
            except TimeoutError:
                self._end(f"{self.name} took nothing for {WRITE_DEADLINE_S:g} s", at_once=True)
            except OSError as error:
                self._end(f"the connection to {self.name} broke: {error.strerror or error}")
            self._require()

    def _look_at_peer(self) -> None:
        """A line outlives neither the certificate at its other end nor a revocation."""
        if self._still_good is not None and self.lost is None:
            try:
                self._still_good()
            except RefusedError as error:
                self._end(error.what)

    def _require(self) -> None:
        if self.lost is not None:
            raise LineLostError(f"the line to {self.name} is gone", cause=self.lost)

    async def keep_alive(self, *, idle_s: float, deadline_s: float) -> None:
        """Until the line ends: ask PING when nothing was heard for ``idle_s``, hang up without an answer."""
        loop = asyncio.get_running_loop()
        while self.lost is None:
            wait_s = self.heard_s + idle_s - loop.time()
            if wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._ended.wait()
                continue
            try:
                await self.call("PING", deadline_s=deadline_s)
            except LineLostError:
                return
            except DeadlineError as error:
                self._end(error.what)

    async def skew_s(self, *, deadline_s: float = CALL_DEADLINE_S) -> float:
        """How far the other side's clock is ahead of ours (``skew.skew_s``). Errors: as for ``call``."""
        loop = asyncio.get_running_loop()
        began_s, sent_s = loop.time(), self._clock.utc().timestamp()
        answer = await self.call("PING", deadline_s=deadline_s)
        at_s = answer.get("at") if isinstance(answer, dict) else None
        if isinstance(at_s, bool) or not isinstance(at_s, int | float):
            raise VirtgridError(f"{self.name} does not tell its time")
        return skew_s(sent_s=sent_s, at_s=at_s, received_s=sent_s + loop.time() - began_s)

    # -- the end -------------------------------------------------------------------------------

    async def wait_ended(self) -> str:
        """Wait until the line is gone; returns why."""
        await self._ended.wait()
        return self.lost or "closed"

    async def close(self, why: str = "closed by us") -> None:
        """Hang up and wait until everything of the line is over. May be said twice, but not by its
        handler.
        """
        self._end(why)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            self._abort()

    def hang_up(self, why: str) -> None:
        """The same without waiting: for handlers."""
        self._end(why)

    def give_socket(self) -> socket.socket:
        """A duplicate of the connection's socket, for a process that goes on with it; then hang up."""
        sock = self._writer.get_extra_info("socket")
        return socket.socket(fileno=socket.dup(sock.fileno()))

    def _end(self, why: str, *, at_once: bool = False) -> None:
        if self.lost is not None:
            return
        self.lost = why
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LineLostError(f"the line to {self.name} is gone", cause=why))
        if at_once:
            self._abort()
        else:
            self._writer.close()  # what was written still goes out
        self._ended.set()

    def _abort(self) -> None:
        # Python 3.11's TLS transport has let go of itself when it was closed twice, as after a reset.
        with contextlib.suppress(AttributeError):
            self._writer.transport.abort()

    @property
    def peer(self) -> Peer:
        """Who is at the other end: by certificate, or by the kernel's word."""
        if self._peer is not None:
            return self._peer
        if self._user is None:
            # Asked once: it does not change, and its name may be asked of a directory in the network.
            uid = self.peer_uid()
            self._user = LocalUser(uid=-1, trusted=False) if uid is None else local_user(uid)
        return self._user

    def peer_uid(self) -> int | None:
        """The user at the other end of a unix socket, by the kernel's word; None for other sockets."""
        sock = self._writer.get_extra_info("socket")
        if sock is None or sock.family != socket.AF_UNIX:
            return None
        try:
            return peer_credentials(sock).uid
        except OSError:  # it has hung up before it was asked
            return None

    # -- hearing -------------------------------------------------------------------------------

    async def _read(self) -> None:
        cutter = LineCutter()
        try:
            while data := await self._reader.read(_CHUNK_BYTES):
                self.heard_s = asyncio.get_running_loop().time()
                for line in cutter.feed(data):
                    await self._hear(line)
                    if self.lost is not None:
                        return
            half = f" in the middle of a line of {len(cutter.rest)} bytes" if cutter.rest else ""
            self._end(f"{self.name} hung up{half}{self._farewell}")
        except LineTooLongError as error:
            with contextlib.suppress(LineLostError):
                await self._send(_refusal(None, message.PARSE_ERROR, str(error)))
            self._end(f"{self.name} broke the rules: {error}")
        except LineLostError:
            pass
        except OSError as error:
            self._end(f"the connection to {self.name} broke: {error.strerror or error}")

    async def _hear(self, line: bytes) -> None:
        try:
            heard = message.decode(line)
        except BadMessageError as error:
            self._bad += 1
            await self._send(Response(id=error.id, fault=error.fault))
            if self._bad >= BAD_LIMIT:
                self._end(f"{self.name} sent {self._bad} lines that are no message")
            return
        if isinstance(heard, Response):
            if heard.id is None and heard.fault is not None:
                # Not an answer to anything we asked: why the other side will hang up.
                self._farewell = f": {heard.fault.message[:_FAREWELL_LIMIT]!r}"
            future = self._waiting.get(heard.id) if isinstance(heard.id, int) else None
            if future is not None and not future.done():
                if heard.fault is None:
                    future.set_result(heard.result)
                else:
                    future.set_exception(message.error_of(heard.fault))
            return
        if heard.method == "PING":
            if heard.id is not None:
                await self._send(Response(id=heard.id, result={"at": self._clock.utc().timestamp()}))
            return
        if heard.id is None:
            # A notification cannot be refused: what does not fit any more holds up the reading itself.
            await self._requests.put(heard)
            return
        try:
            self._requests.put_nowait(heard)
        except asyncio.QueueFull:
            await self._send(_refusal(heard.id, message.BUSY, "too many requests wait on this line"))

    async def _answer(self) -> None:
        while True:
            asked = await self._requests.get()
            try:
                answer = await self._handled(asked)
            except HandedOverError:
                self._end("handed over to another process")
                return
            if asked.id is None:
                continue
            try:
                await self._send(answer)
            except LineLostError:
                return
            except ValueError as error:
                with contextlib.suppress(LineLostError):
                    await self._send(_refusal(asked.id, message.INTERNAL_ERROR, str(error)))

    async def _handled(self, asked: Request) -> Response:
        try:
            self.answering = asked.id
            return Response(id=asked.id, result=await self._handler(self, asked.method, asked.params))
        except VirtgridError as error:
            return Response(id=asked.id, fault=message.fault_of(error))
        except BadMessageError as error:
            return Response(id=asked.id, fault=error.fault)
        except HandedOverError:
            raise
        except Exception:
            _log.exception("%s asked %s, and answering it failed", self.name, asked.method)
            return _refusal(asked.id, message.INTERNAL_ERROR, "answering failed; the log there says why")


def local_user(uid: int) -> LocalUser:
    """A user of this host, by number."""
    return LocalUser(uid=uid, trusted=uid in (0, os.geteuid()), name=_account(uid))


@functools.lru_cache(maxsize=256)
def _account(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _refusal(id: message.Id | None, code: int, text: str) -> Response:
    return Response(id=id, fault=Fault(code=code, message=text))
