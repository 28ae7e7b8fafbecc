"""How a coordinator reaches a party: over whatever carries a question and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol

from virtgrid.core.errors import (
    DeadlineError,
    NotAdmittedError,
    NotHeardError,
    PeerUnreachableError,
    RefusedError,
)
from virtgrid.grid.messages.coalloc import Party
from virtgrid.grid.messages.common import require
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.line import Line, LineLostError, deaf
from virtgrid.wire.tls import Tls

IDLE_S: Final = 10.0
"""A party on the network that said nothing for so long is asked whether it is there: a line through a cable
that was cut would otherwise be believed in for a quarter of an hour.
"""
_PING_DEADLINE_S: Final = 10.0
_SAID_LIMIT: Final = 500


class Transport(Protocol):
    """One party. Errors: the party's own (RefusedError, …); PeerUnreachableError and its kin when it is not
    known whether the question arrived. NotAdmittedError among them: it did not, and will not.
    """

    async def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any: ...

    async def close(self) -> None: ...


class WireParty:
    """A party at an endpoint. The line is dialled when there is something to say, and again when it was
    lost.

    tls: who we are, for the network. role, site: what the party's certificate must say; site None: any.
    """

    def __init__(
        self,
        name: str,
        where: Endpoint,
        *,
        tls: Tls | None = None,
        role: Role = Role.CRM,
        site: str | None = None,
    ) -> None:
        self.where = where
        self._name, self._tls, self._role, self._site = name, tls, role, site
        self._line: Line | None = None
        self._alive: asyncio.Task[None] | None = None
        self._dialling = asyncio.Lock()

    @property
    def who(self) -> Identity | None:
        """Who answers there, by certificate; None when that is not known (yet)."""
        peer = None if self._line is None else self._line.peer
        return peer if isinstance(peer, Identity) else None

    async def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + deadline_s
        line, fresh = await self._dialled(until_s)
        while True:
            try:
                return await line.call(method, params, deadline_s=max(0.0, until_s - loop.time()))
            except LineLostError:
                await self._drop(line)
                raise
            except NotHeardError as error:
                await self._drop(line)
                if fresh:
                    raise NotAdmittedError(
                        f"{self._name} does not hear us: {error.what}", cause=error.cause, hint=error.hint
                    ) from error
            # What it has against us may be mended: a new line shows the certificate that is in use by now.
            line, _ = await self._dialled(until_s)
            fresh = True

    async def close(self) -> None:
        if self._line is not None:
            await self._drop(self._line)

    async def _drop(self, line: Line) -> None:
        if self._line is line:
            self._line = None
            if self._alive is not None:
                self._alive.cancel()
        await line.close()

    async def _dialled(self, until_s: float) -> tuple[Line, bool]:
        """The line, and whether it is a new one. until_s: by the loop's clock, also while another dials."""
        try:
            async with asyncio.timeout_at(until_s), self._dialling:
                return await self._dial(until_s - asyncio.get_running_loop().time())
        except TimeoutError as error:
            raise DeadlineError(f"{self._name} at {self.where} was not reached in time") from error

    async def _dial(self, deadline_s: float) -> tuple[Line, bool]:
        if self._line is not None and self._line.lost is None:
            return self._line, False
        if self._line is not None:
            await self._drop(self._line)
        try:
            self._line = await dial(
                self.where,
                deaf,
                name=self._name,
                tls=self._tls,
                expect=self._role,
                site=self._site,
                deadline_s=deadline_s,
            )
        except RefusedError as error:  # its clock, or ours
            raise NotAdmittedError(error.what, cause=error.cause, hint=error.hint) from error
        if self.where.is_network:
            self._alive = asyncio.create_task(
                self._line.keep_alive(idle_s=IDLE_S, deadline_s=_PING_DEADLINE_S)
            )
        return self._line, True


def said(error: Exception) -> str:
    """Why a party could not be asked, in one line for people."""
    if not isinstance(error, PeerUnreachableError):
        return str(error)[:_SAID_LIMIT]
    more = "; ".join(text for text in (error.cause, error.hint) if text)
    return (f"{error.what} ({more})" if more else error.what)[:_SAID_LIMIT]


def parse_party(text: str) -> tuple[str, Endpoint]:
    """``alpha=unix:/run/virtgrid/crm.sock``. Errors: UsageError."""
    name, _, where = text.partition("=")
    require(Party, "the name of a party", name)
    return name, Endpoint.parse(where)
