"""A provider on the wire: what CRM and NRM have in common.

``Provider`` is the interface behind it. The embedded one (``Stored``) keeps everything in its own file; a
backend that asks a queueing system as well has the same methods and keeps the same promises
(tests/unit/test_grid_providers.py is what it must pass).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.grid.messages import coalloc
from virtgrid.grid.messages.coalloc import (
    PROVIDER_PARAMS,
    AskFit,
    AskOffer,
    Command,
    Fit,
    Hold,
    HoldAnswer,
    Offer,
    Promise,
    Standing,
)
from virtgrid.grid.messages.common import Model, parse
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises, Stock
from virtgrid.wire.endpoint import Endpoint, Listener, listen
from virtgrid.wire.line import Handler, Line
from virtgrid.wire.message import no_such_method

T = TypeVar("T")

SWEEP_EVERY_S: Final = 5.0
_log = logging.getLogger(__name__)


class Provider(Protocol):
    """Who has something to promise. owner: who asks, as ``caller`` names it.

    All but ``sweep`` may be said again with the same effect, and are one step: after a kill at any moment a
    hold is there with all it has, or not at all. Errors: RefusedError and its kin, nothing changed then.
    """

    party: str

    async def hold(self, asked: Hold, *, owner: str) -> HoldAnswer:
        """Keep it until ``ttl_s`` is over by the provider's clock, or say why not, and when it could be."""

    async def commit(self, key: str, *, owner: str) -> Standing:
        """Keep it until the window ends. Errors: RefusedError when it has lapsed, NotFoundError."""

    async def release(self, key: str, *, owner: str) -> None:
        """Keep nothing of it; also of a key nobody knows."""

    async def status(self, key: str, *, owner: str) -> Standing:
        """Errors: NotFoundError."""

    async def fit(self, asked: AskFit) -> Fit:
        """When it could be had."""

    async def offer(self, asked: AskOffer) -> Offer:
        """What is there. Errors: RefusedError by those who have no nodes."""

    async def sweep(self) -> None:
        """Clear away what has lapsed or ended, whoever left it."""


class Stored:
    """The embedded provider: one SQLite file, asked by one thread, so that nobody waits in the event loop."""

    def __init__(self, *, party: str, database: Database, stock: Stock, clock: Clock) -> None:
        self.party = party
        self._promises = Promises(database, party, stock)
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"store of {party}")
        #: Called when something was committed or released, before that is answered.
        self.changed: Callable[[], Awaitable[None]] | None = None

    async def hold(self, asked: Hold, *, owner: str) -> HoldAnswer:
        return await self._run(lambda: self._promises.hold(asked, owner=owner, now_s=self._now_s()))

    async def commit(self, key: str, *, owner: str) -> Standing:
        standing = await self._run(lambda: self._promises.commit(key, owner=owner, now_s=self._now_s()))
        await self._tell()
        return standing

    async def release(self, key: str, *, owner: str) -> None:
        await self._run(lambda: self._promises.release(key, owner=owner, now_s=self._now_s()))
        await self._tell()

    async def status(self, key: str, *, owner: str) -> Standing:
        return await self._run(lambda: self._promises.status(key, owner=owner, now_s=self._now_s()))

    async def fit(self, asked: AskFit) -> Fit:
        return await self._run(lambda: self._promises.fit(asked, now_s=self._now_s()))

    async def offer(self, asked: AskOffer) -> Offer:
        return await self._run(lambda: self._promises.offer(asked))

    async def sweep(self) -> None:
        while await self._run(lambda: self._promises.sweep(self._now_s())):
            pass

    async def committed(self, kind: str, *, ahead_s: int) -> list[Standing]:
        """Those that have units of a kind, and whose window is open now or in so long."""
        now_s = self._now_s()
        return await self._run(lambda: self._promises.committed(kind, until_s=now_s + ahead_s, now_s=now_s))

    def close(self) -> None:
        self._thread.shutdown()

    async def _tell(self) -> None:
        if self.changed is not None:
            await self.changed()

    def _now_s(self) -> int:
        return int(self._clock.utc().timestamp())

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


async def serve(
    *,
    party: str,
    database: Path,
    stock: Stock,
    where: Endpoint,
    ready: Callable[[], None],
    beside: Callable[[Stored], AbstractAsyncContextManager[object]] | None = None,
) -> None:
    """An embedded provider until SIGTERM or SIGINT. Errors: RefusedError (file, socket).

    beside: what puts its promises into effect, as long as it is there.
    """
    with Database(database) as opened:
        with opened.write() as connection:
            stock.prepare(connection)
        provider = Stored(party=party, database=opened, stock=stock, clock=SystemClock())
        try:
            async with contextlib.AsyncExitStack() as stack:
                if beside is not None:
                    await stack.enter_async_context(beside(provider))
                await stack.enter_async_context(Counter(provider, where))
                ready()
                await told_to_end()
        finally:
            provider.close()


async def told_to_end() -> None:
    """Until SIGTERM or SIGINT."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()


def caller(line: Line) -> str:
    """Who is at the other end, by the kernel's word. Errors: RefusedError when nobody vouches for it."""
    uid = line.peer_uid()
    if uid is None:
        raise RefusedError("nobody vouches for who you are", hint="ask over a unix socket")
    return f"uid:{uid}"


def hearing(
    models: Mapping[str, type[Model]], answer: Callable[[Model, str, str], Awaitable[Model | None]]
) -> Handler:
    """A handler for methods whose parameters have models; ``answer`` gets them, the method and the caller."""

    async def heard(line: Line, method: str, params: Mapping[str, Any]) -> Any:
        model = models.get(method)
        if model is None:
            raise no_such_method(method)
        told = await answer(parse(model, method, params), method, caller(line))
        return {} if told is None else told.model_dump(mode="json")

    return heard


class Counter:
    """A provider that listens. A context manager; sweeps as long as it is there."""

    def __init__(self, provider: Provider, where: Endpoint, *, mode: int = 0o666) -> None:
        self._provider, self._where, self._mode = provider, where, mode
        self._listener: Listener | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Counter:
        await self._provider.sweep()
        self._listener = await listen(
            self._where, hearing(PROVIDER_PARAMS, self._answer), name="a coordinator", mode=self._mode
        )
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        if self._listener is not None:
            await self._listener.close()

    async def _answer(self, asked: Model, method: str, owner: str) -> Model | None:
        match method, asked:
            case Command.HOLD, Hold():
                return await self._provider.hold(asked, owner=owner)
            case Command.COMMIT, Promise():
                return await self._provider.commit(asked.key, owner=owner)
            case Command.RELEASE, Promise():
                await self._provider.release(asked.key, owner=owner)
                return None
            case coalloc.STATUS, Promise():
                return await self._provider.status(asked.key, owner=owner)
            case coalloc.FIT, AskFit():
                return await self._provider.fit(asked)
            case coalloc.OFFER, AskOffer():
                return await self._provider.offer(asked)
        raise no_such_method(method)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self._provider.sweep()
            except VirtgridError as error:
                _log.warning("%s could not be swept: %s", self._provider.party, error)
