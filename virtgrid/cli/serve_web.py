"""``virtgrid serve web``: the page of this host, its REST interface and its metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import Annotated, Final

import typer

from virtgrid.cli.output import run
from virtgrid.cli.serve import Pki, app, log  # the same noun
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.grid.doors import identity
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.places import SYSTEM

_SOCKET: Final = "unix:/run/virtgrid/web.sock"


def _user(option: str, text: str) -> str:
    """Somebody with a user's certificate. Errors: UsageError."""
    form = "virtgrid://SITE/user/NAME; virtgrid pki show says it where that one is"
    try:
        who = Identity.parse(text)
    except RefusedError as error:
        raise UsageError(f"{option}: {error.what}", hint=form) from None
    if who.role is not Role.USER:
        raise UsageError(f"{option}: {who} is a {who.role}, and not what looks at a page", hint=form)
    return str(who)


@app.command()
@run
def web(
    listen: Annotated[
        str, typer.Option("--listen", metavar="ENDPOINT", help="unix:/PATH, or tls://HOST:PORT for HTTPS.")
    ] = _SOCKET,
    pki: Pki = SYSTEM,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHO",
            help="Who may look over the network: virtgrid://SITE/user/NAME; may be said again.",
        ),
    ] = None,
    operator: Annotated[
        list[str] | None,
        typer.Option(metavar="WHO", help="Who may release and abort as well; may be said again."),
    ] = None,
    grc: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="The coordinator whose jobs and reservations are shown."),
    ] = None,
) -> None:
    """Show the migrations of this host, and its grid's jobs, to browsers, programs and Prometheus.

    A page at /, the REST interface below /api/v1 (described at /api/v1/openapi.json), metrics at /metrics.
    The unix socket is root's: ssh -L 8080:/run/virtgrid/web.sock HOST brings it to a browser elsewhere.
    Over HTTPS everybody shows a certificate of the grid (virtgrid pki), and must be named here.
    """
    from virtgrid.host.web.grid import Grid
    from virtgrid.host.web.site import Web

    log()
    where = Endpoint.parse(listen)
    readers = frozenset(_user("--reader", who) for who in reader or [])
    operators = frozenset(_user("--operator", who) for who in operator or [])
    if where.is_network and not readers | operators:
        raise UsageError(
            "--listen over the network, and nobody who may look", hint="--reader virtgrid://SITE/user/NAME"
        )
    tls = identity(pki, Role.HOST) if where.is_network else None
    coordinator = None
    if grc is not None:
        at = Endpoint.parse(grc)
        coordinator = Grid(at, identity(pki, Role.USER) if at.is_network else None)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as stack:
            there = await stack.enter_async_context(
                Web(where, tls=tls, readers=readers, operators=operators, grid=coordinator)
            )
            logging.info("ready at %s", there.at)
            await stop.wait()

    asyncio.run(main())
