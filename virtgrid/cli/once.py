"""One question to a service, and hanging up."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.common import Model, parse
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import deaf
from virtgrid.wire.message import RemoteError
from virtgrid.wire.tls import Tls

M = TypeVar("M", bound=Model)

_DEADLINE_S: Final = 40.0
"""A coordinator answers a reservation within some 20 s, known or not."""


def ask_once(
    where: Endpoint,
    name: str,
    method: str,
    asked: Model,
    answer: type[M],
    *,
    tls: Tls | None = None,
    expect: Role | None = None,
) -> M:
    """Dial, ask, hang up. name: of who is there; tls, expect: as of ``dial``.

    Errors: theirs; PeerUnreachableError.
    """

    async def main() -> Any:
        line = await dial(where, deaf, name=name, tls=tls, expect=expect)
        try:
            return await line.call(method, asked.model_dump(mode="json"), deadline_s=_DEADLINE_S)
        finally:
            await line.close()

    try:
        return parse(answer, method, asyncio.run(main()))
    except RemoteError as error:
        raise RefusedError(error.what) from error
