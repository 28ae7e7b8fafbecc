"""How a coordinator reaches a party: over whatever carries a question and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from virtgrid.grid.messages.coalloc import Party
from virtgrid.grid.messages.common import require
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line, LineLostError, deaf


class Transport(Protocol):
    """One party. Errors: the party's own (RefusedError, …); PeerUnreachableError and its kin when it is not
    known whether the question arrived.
    """

    async def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any: ...

    async def close(self) -> None: ...


class WireParty:
    """A party at an endpoint. The line is dialled when there is something to say, and again when it was
    lost.
    """

    def __init__(self, name: str, where: Endpoint) -> None:
        self._name, self._where = name, where
        self._line: Line | None = None
        self._dialling = asyncio.Lock()

    async def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any:
        line = await self._dialled(deadline_s)
        try:
            return await line.call(method, params, deadline_s=deadline_s)
        except LineLostError:
            if self._line is line:
                self._line = None
            await line.close()
            raise

    async def close(self) -> None:
        if self._line is not None:
            await self._line.close()
            self._line = None

    async def _dialled(self, deadline_s: float) -> Line:
        async with self._dialling:
            if self._line is None or self._line.lost is not None:
                self._line = await dial(self._where, deaf, name=self._name, deadline_s=deadline_s)
            return self._line


def parse_party(text: str) -> tuple[str, Endpoint]:
    """``alpha=unix:/run/virtgrid/crm.sock``. Errors: UsageError."""
    name, _, where = text.partition("=")
    require(Party, "the name of a party", name)
    return name, Endpoint.parse(where)
