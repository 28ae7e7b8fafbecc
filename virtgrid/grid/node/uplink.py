"""The NodeManager's line to its CRM: dialled until it stands, said HELLO on, and resumed when it drops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping
from typing import Any, Final

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.node import Acknowledge, Hello, Tell, Welcome
from virtgrid.grid.node.manager import NodeManager
from virtgrid.grid.node.states import Event
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import Line, LineLostError
from virtgrid.wire.message import BadMessageError, bad_parameters
from virtgrid.wire.outbox import OutOfStepError
from virtgrid.wire.tls import Tls

IDLE_S: Final = 10.0
"""After so much silence the CRM is asked whether it is there."""
_PING_DEADLINE_S: Final = 10.0
_FIRST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 5.0
_LINGER_S: Final = 30.0
"""How long a pilot that is DONE tries to tell its CRM so."""
_NAME: Final = "the CRM"

_log = logging.getLogger(__name__)


class Uplink:
    """Keeps a NodeManager in touch with its CRM until it is over."""

    def __init__(self, manager: NodeManager, where: Endpoint, ticket: str, *, tls: Tls | None = None) -> None:
        self._manager, self._where, self._ticket, self._tls = manager, where, ticket, tls

    async def run(self) -> bool:
        """Until the NodeManager is DONE. True: the CRM knows it; False: it could not be told in time."""
        wait_s = _FIRST_WAIT_S
        done_s: float | None = None
        loop = asyncio.get_running_loop()
        while not self._manager.over:
            if self._manager.state == "DONE":
                done_s = done_s or loop.time()
                if loop.time() - done_s > _LINGER_S:
                    return False
            try:
                await self._one_line()
                wait_s = _FIRST_WAIT_S
            except RefusedError as error:
                # It knows us no more, or never did: nobody will ever give us a command.
                self._manager.happened(Event.ENDED, f"the CRM refuses this pilot: {error.what}")
                if self._manager.state == "DONE":
                    return False
            except VirtgridError as error:
                _log.info("%s", error.what)
            if not self._manager.over:
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
                wait_s = min(_LONGEST_WAIT_S, wait_s * 2)
        return True

    async def _one_line(self) -> None:
        """One connection, from HELLO to its end. Errors: RefusedError for good, others for now."""
        site = self._tls.identity.site if self._tls else None
        line = await dial(self._where, self._heard, name=_NAME, tls=self._tls, expect=Role.CRM, site=site)
        try:
            standing = self._manager.standing
            hello = Hello(
                ticket=self._ticket,
                session=self._manager.session,
                incarnation=standing.incarnation,
                base=standing.base,
                acknowledged=standing.acknowledged,
                status=self._manager.status(),
            )
            answer = await line.call("HELLO", hello.model_dump(mode="json"))
            try:
                after = parse(Welcome, "HELLO", answer).after
                self._manager.acknowledged(after)
            except (BadMessageError, OutOfStepError) as error:
                raise RefusedError(f"the CRM's answer to HELLO makes no sense: {error}") from error
            await self._until_over_or_lost(line, after)
        finally:
            await line.close()

    async def _until_over_or_lost(self, line: Line, after: int) -> None:
        over = asyncio.create_task(self._manager.told.wait())
        lost = asyncio.create_task(line.wait_ended())
        beside = [
            asyncio.create_task(line.keep_alive(idle_s=IDLE_S, deadline_s=_PING_DEADLINE_S)),
            asyncio.create_task(self._tell(line, after)),
        ]
        try:
            await asyncio.wait({over, lost, beside[1]}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (over, lost, *beside):
                task.cancel()
            await asyncio.gather(over, lost, *beside, return_exceptions=True)

    async def _tell(self, line: Line, after: int) -> None:
        """Write every notification after this number, as they come; what is not taken makes us wait."""
        manager = self._manager
        with contextlib.suppress(LineLostError):
            while True:
                manager.changed.clear()
                for note in manager.outbox.after(after):
                    told = Tell.model_construct(number=note.number, kind=note.kind, body=dict(note.body))
                    await line.notify("TELL", told.model_dump(mode="json"))
                    after = note.number
                if not manager.outbox.after(after, limit=1):
                    await manager.changed.wait()

    async def _heard(self, line: Line, method: str, params: Mapping[str, Any]) -> Any:
        if method == "ACK":
            try:
                self._manager.acknowledged(parse(Acknowledge, method, params).number)
            except OutOfStepError as error:
                line.hang_up(str(error))
                raise bad_parameters(method, str(error)) from error
            return {}
        return await self._manager.command(method, params)
