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
from virtgrid.core.errors import VirtgridError
from virtgrid.grid.doors import Doors, Network, caller
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
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Right
from virtgrid.wire.line import Handler, Line
from virtgrid.wire.message import no_such_method

T = TypeVar("T")

SWEEP_EVERY_S: Final = 5.0
_log = logging.getLogger(__name__)


Answer = Callable[[Model, str, str], Awaitable[Model | None]]
"""Gets the parameters, the method and the caller."""


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
        self._database, self._promises = database, Promises(database, party, stock)
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"store of {party}")
        #: Called when something was committed or released, before that is answered.
        self.changed: Callable[[], Awaitable[None]] | None = None

    async def hold(self, asked: Hold, *, owner: str, stock: Stock | None = None) -> HoldAnswer:
        """stock: as it is at this moment, where that changes. The same for ``fit`` and ``offer``."""
        promises = self._of(stock)
        return await self._run(lambda: promises.hold(asked, owner=owner, now_s=self._now_s()))

    async def commit(self, key: str, *, owner: str) -> Standing:
        standing = await self._run(lambda: self._promises.commit(key, owner=owner, now_s=self._now_s()))
        await self._tell()
        return standing

    async def release(self, key: str, *, owner: str) -> None:
        await self._run(lambda: self._promises.release(key, owner=owner, now_s=self._now_s()))
        await self._tell()

    async def status(self, key: str, *, owner: str) -> Standing:
        return await self._run(lambda: self._promises.status(key, owner=owner, now_s=self._now_s()))

    async def fit(self, asked: AskFit, *, stock: Stock | None = None) -> Fit:
        promises = self._of(stock)
        return await self._run(lambda: promises.fit(asked, now_s=self._now_s()))

    async def offer(self, asked: AskOffer, *, stock: Stock | None = None) -> Offer:
        promises = self._of(stock)
        return await self._run(lambda: promises.offer(asked))

    def _of(self, stock: Stock | None) -> Promises:
        return self._promises if stock is None else Promises(self._database, self.party, stock)

    async def standing(self) -> list[Standing]:
        """All holds that keep something."""
        return await self._run(lambda: self._promises.standing(self._now_s()))

    async def keeps(self, key: str) -> bool:
        """Whether something is kept for a hold, whoever's it is."""
        return await self._run(lambda: self._promises.keeps(key, now_s=self._now_s()))

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
    network: Network | None = None,
    told: frozenset[str] = frozenset(),
    more: tuple[Mapping[str, type[Model]], Answer] | None = None,
    beside: Callable[[Stored], AbstractAsyncContextManager[object]] | None = None,
) -> None:
    """An embedded provider until SIGTERM or SIGINT. network, told, more: as of ``Counter``.

    beside: what puts its promises into effect, as long as it is there. Errors: RefusedError (file, socket,
    port).
    """
    with Database(database) as opened:
        with opened.write() as connection:
            stock.prepare(connection)
        provider = Stored(party=party, database=opened, stock=stock, clock=SystemClock())
        try:
            async with contextlib.AsyncExitStack() as stack:
                if beside is not None:
                    await stack.enter_async_context(beside(provider))
                await stack.enter_async_context(
                    Counter(provider, where, network=network, told=told, more=more)
                )
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


def hearing(
    models: Mapping[str, type[Model]], answer: Answer, *, who: Callable[[Line], str] = caller
) -> Handler:
    """A handler for methods whose parameters have models; ``answer`` gets them, the method and the caller.

    What was begun is finished, whoever hangs up meanwhile: half an answer is one nobody knows of.
    """
    under_way: set[asyncio.Task[Model | None]] = set()

    def over(task: asyncio.Task[Model | None]) -> None:
        under_way.discard(task)
        if not task.cancelled():
            task.exception()  # who asked has been told, or has gone

    async def heard(line: Line, method: str, params: Mapping[str, Any]) -> Any:
        model = models.get(method)
        if model is None:
            raise no_such_method(method)
        asked = answer(parse(model, method, params), method, who(line))
        task = asyncio.ensure_future(asked)
        under_way.add(task)
        task.add_done_callback(over)
        told = await asyncio.shield(task)
        return {} if told is None else told.model_dump(mode="json")

    return heard


class Counter:
    """A provider that listens. A context manager; sweeps as long as it is there.

    told: the coordinators it hears (``doors.told_of``), besides root's and our own user's on this host.
    more: methods it has besides, with the models of their parameters, and who answers them.
    """

    def __init__(
        self,
        provider: Provider,
        where: Endpoint,
        *,
        mode: int = 0o666,
        network: Network | None = None,
        told: frozenset[str] = frozenset(),
        more: tuple[Mapping[str, type[Model]], Answer] | None = None,
    ) -> None:
        self._provider = provider
        self._more, self._answer_more = more or ({}, self._answer)
        models = {**PROVIDER_PARAMS, **self._more}
        self.doors = Doors(
            where,
            network,
            hearing(models, self._answer),
            name="a coordinator",
            rights=dict.fromkeys(models, Right(named=told)),
            mode=mode,
        )
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Counter:
        await self._provider.sweep()
        await self.doors.__aenter__()
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self.doors.__aexit__(kind, error, trace)

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
        if method in self._more:
            return await self._answer_more(asked, method, owner)
        raise no_such_method(method)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            try:
                await self._provider.sweep()
            except VirtgridError as error:
                _log.warning("%s could not be swept: %s", self._provider.party, error)
