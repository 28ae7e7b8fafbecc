"""Segments and guarantees of this host, as network managers want them (``virtgrid.grid.messages.network``).

What was said last is on the disk, one file per network manager, before it is done. So after a restart of
virtgridd, or of the host, everything is put back without anybody being asked; and what has ended meanwhile
is taken away. Whether it *is* there is looked at, in the kernel, again and again: what somebody removed by
hand comes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from pydantic import ValidationError

from virtgrid.core.errors import VirtgridError
from virtgrid.core.files import replace_file
from virtgrid.grid.messages.network import BRIDGE, Carried, Orders
from virtgrid.grid.node import root
from virtgrid.host.wanted import Wanted, next_change_s, wanted

DIRECTORY: Final = Path(root.sandboxes(), ".networks")
AGAIN_S: Final = 15.0
"""So often it is looked whether all is still there."""
_TICK_S: Final = 0.2
_log = logging.getLogger(__name__)


class Effects(Protocol):
    """How it becomes so."""

    def establish(self, want: Wanted) -> dict[str, str]:
        """Make it so, as far as it can be; what could not be, by id. Errors: VirtgridError."""


class Networks:
    """The segments of this host. A context manager: what was said before is put back, and kept so."""

    def __init__(self, effects: Effects, *, bridge: str = BRIDGE, directory: Path = DIRECTORY) -> None:
        self._effects, self._bridge, self._directory = effects, bridge, directory
        self._said: dict[str, Orders] = {}
        self._problems: dict[str, str] = {}
        self._turn = asyncio.Lock()
        self._due_s = 0.0
        self._stale = True
        self._keeping: asyncio.Task[None] | None = None
        # One thing at a time, also when who asked for it does not wait any more.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segments")

    async def __aenter__(self) -> Networks:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._directory.glob("*.json")):
            if (said := _read(path)) is not None:
                self._said[said.network] = said
        self._keeping = asyncio.create_task(self._keep(), name="segments")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Segments stay."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self._thread.shutdown()

    async def told(self, orders: Orders) -> Carried:
        """Keep what should be, and make it so. Errors: VirtgridError when it cannot be kept."""
        async with self._turn:
            if orders != self._said.get(orders.network):
                await asyncio.to_thread(self._write, orders)
                self._said[orders.network] = orders
                self._stale = True
            if self._stale:
                await self._establish()
        ids = {one.id for one in orders.segments}
        return Carried(problems={id_: why[:500] for id_, why in self._problems.items() if id_ in ids})

    async def _establish(self) -> None:
        now_s = time.time()
        want = wanted(self._said.values(), now_s, bridge=self._bridge)
        change_s = next_change_s(self._said.values(), now_s)
        # An order begins when its second does; a clock that is set is noticed at the next look.
        self._due_s = time.monotonic() + min(AGAIN_S, AGAIN_S if change_s is None else change_s - now_s)
        loop = asyncio.get_running_loop()
        problems = await loop.run_in_executor(self._thread, self._effects.establish, want)
        self._stale = False
        for id_, why in problems.items():
            if self._problems.get(id_) != why:
                _log.warning("segment %s: %s", id_ or "of nobody", why)
        self._problems = problems

    async def _keep(self) -> None:
        while True:
            async with self._turn:
                if time.monotonic() >= self._due_s:
                    try:
                        await self._establish()
                    except VirtgridError as error:
                        _log.warning("segments cannot be looked after: %s", error)
            await asyncio.sleep(_TICK_S)

    def _write(self, orders: Orders) -> None:
        try:
            replace_file(self._directory / f"{orders.network}.json", orders.model_dump_json().encode())
        except OSError as error:
            raise VirtgridError("virtgridd cannot write down its segments", cause=str(error)) from error


def _read(path: Path) -> Orders | None:
    """Half a file is none: the network manager says it again."""
    try:
        return Orders.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        _log.error("%s cannot be read and is left out: %s", path, error)
        return None
