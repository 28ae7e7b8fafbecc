"""The NodeManager's line to virtgridd: dialled again whenever it drops, because virtgridd may be
restarted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from virtgrid.core.errors import PeerUnreachableError, VirtgridError
from virtgrid.grid.messages import frames
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.frames import End, Frame
from virtgrid.grid.messages.host import Ended, Entries, HelloHost, Prepare, View
from virtgrid.grid.messages.node import Exec, HostEntry, Init, Keys
from virtgrid.wire import message
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line, LineLostError

M = TypeVar("M", bound=BaseModel)

_NAME: Final = "virtgridd"
_MAKE_DEADLINE_S: Final = 60.0
_ASK_DEADLINE_S: Final = 10.0


class HostLine:
    """virtgridd, as the NodeManager sees it: see ``manager.Host``.

    seen: called with what is there whenever a line was made; ended: when virtgridd says that the sandbox
    ended.
    """

    def __init__(
        self, where: Endpoint, ticket: str, *, seen: Callable[[View], None], ended: Callable[[str], None]
    ) -> None:
        self._where, self._ticket = where, ticket
        self._seen, self._ended = seen, ended
        self._line: Line | None = None
        self._dialling = asyncio.Lock()

    async def watch(self) -> None:
        """For ever: have a line, so that the end of the sandbox is heard of and a restart is noticed."""
        wait_s = 0.05
        while True:
            try:
                line = await self._connected()
            except VirtgridError:
                await asyncio.sleep(wait_s)
                wait_s = min(2.0, wait_s * 2)
            else:
                wait_s = 0.05
                await line.wait_ended()

    async def close(self) -> None:
        if self._line is not None:
            await self._line.close()

    async def _connected(self) -> Line:
        async with self._dialling:
            if self._line is None or self._line.lost is not None:
                line, view = await self._greet()
                self._line = line
                self._seen(view)
            return self._line

    async def _greet(self) -> tuple[Line, View]:
        line = await dial(self._where, self._heard, name=_NAME)
        try:
            hello = HelloHost(ticket=self._ticket).model_dump(mode="json")
            answer = await line.call("hello", hello, deadline_s=_ASK_DEADLINE_S)
            return line, _model(View, answer)
        except BaseException:
            await line.close()
            raise

    async def _heard(self, line: Line, method: str, params: Mapping[str, Any]) -> None:
        if method != "ended":
            raise message.no_such_method(method)
        self._ended(parse(Ended, method, params).reason)

    async def _ask(self, method: str, params: BaseModel | None = None, *, deadline_s: float) -> Any:
        line = await self._connected()
        told = {} if params is None else params.model_dump(mode="json")
        return await line.call(method, told, deadline_s=deadline_s)

    async def look(self) -> View:
        return _model(View, await self._ask("look", deadline_s=_ASK_DEADLINE_S))

    async def prepare(self, init: Init) -> Keys:
        return _model(Keys, await self._ask("prepare", Prepare(init=init), deadline_s=_MAKE_DEADLINE_S))

    async def set_keys(self, hosts: tuple[HostEntry, ...]) -> None:
        await self._ask("set_keys", Entries(hosts=hosts), deadline_s=_ASK_DEADLINE_S)

    async def start(self) -> None:
        await self._ask("start", deadline_s=_MAKE_DEADLINE_S)

    async def stop(self) -> None:
        await self._ask("stop", deadline_s=_MAKE_DEADLINE_S)

    async def remove(self) -> None:
        await self._ask("remove", deadline_s=_MAKE_DEADLINE_S)

    @asynccontextmanager
    async def program(self, what: Exec) -> AsyncIterator[AsyncIterator[Frame | End]]:
        """Start a program; gives its output, and its end as the last thing. Leaving early ends the
        program.
        """
        try:
            reader, writer = await asyncio.open_unix_connection(self._where.path)
        except OSError as error:
            raise PeerUnreachableError(f"{_NAME} cannot be reached", cause=error.strerror) from error
        try:
            async with asyncio.timeout(_MAKE_DEADLINE_S):
                await _ask_raw(reader, writer, 1, "hello", HelloHost(ticket=self._ticket))
                await _ask_raw(reader, writer, 2, "exec", what)
            yield _frames(reader)
        except TimeoutError as error:
            raise PeerUnreachableError(f"{_NAME} did not start the program in time") from error
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise LineLostError(f"the line to {_NAME} dropped", cause=str(error)) from error
        finally:
            writer.transport.abort()


async def _ask_raw(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, method: str, params: BaseModel
) -> None:
    """One question and its answer, without a Line: what follows the answer is no message."""
    asked = message.Request(method=method, params=params.model_dump(mode="json"), id=number)
    writer.write(message.encode(asked))
    await writer.drain()
    answer = message.decode(await reader.readuntil(b"\n"))
    if not isinstance(answer, message.Response) or answer.id != number:
        raise LineLostError(f"{_NAME} answered something else")
    if answer.fault is not None:
        raise message.error_of(answer.fault)


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[Frame | End]:
    while header := await reader.read(1):
        header += await reader.readexactly(frames.HEADER.size - 1)
        kind, length = frames.unpack_header(header)
        data = await reader.readexactly(length)
        if kind == frames.END:
            yield frames.unpack_end(data)
            return
        yield Frame(kind, data)


def _model(model: type[M], answer: Any) -> M:
    """An answer as a model. Errors: VirtgridError: the two are not of one version."""
    try:
        return parse(model, "the answer", answer)
    except message.BadMessageError as error:
        raise VirtgridError(f"{_NAME} answered what nobody understands", cause=str(error)) from error
