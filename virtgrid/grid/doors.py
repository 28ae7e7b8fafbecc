"""The doors of a coordinator or a provider: a socket on its host and, with a certificate, the network.

Behind both stands the same handler, and the same table says who may ask what.
"""

from __future__ import annotations

import logging
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.wire.certificates import exists
from virtgrid.wire.endpoint import Endpoint, listen
from virtgrid.wire.identity import Identity, LocalUser, Rights, Role, called
from virtgrid.wire.line import Handler, Line
from virtgrid.wire.pki.places import Places
from virtgrid.wire.tls import Tls

_log = logging.getLogger(__name__)

_LOCAL: Final = re.compile(r"uid:(0|[1-9][0-9]{0,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where a service is found over the network, and as whom."""

    where: Endpoint
    tls: Tls


class Doors:
    """A context manager: open while it lasts. network: what is listened at there, with the port that was
    free; None where only the socket is.
    """

    def __init__(
        self,
        socket: Endpoint,
        network: Network | None,
        handler: Handler,
        *,
        name: str,
        rights: Rights,
        mode: int = 0o666,
    ) -> None:
        self._socket, self._network, self._handler = socket, network, handler
        self._name, self._rights, self._mode = name, rights, mode
        self._open = AsyncExitStack()
        self.network: Endpoint | None = None

    async def __aenter__(self) -> Doors:
        """Errors: RefusedError; then none is open."""
        async with AsyncExitStack() as opening:
            here = await listen(
                self._socket, self._handler, name=self._name, mode=self._mode, rights=self._rights
            )
            opening.push_async_callback(here.close)
            if self._network is not None:
                there = await listen(
                    self._network.where,
                    self._handler,
                    name=self._name,
                    tls=self._network.tls,
                    rights=self._rights,
                )
                opening.push_async_callback(there.close)
                self.network = there.where
                _log.info("listening at %s as %s", there.where, self._network.tls.identity)
            self._open = opening.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()


def caller(line: Line, *, site: str | None = None) -> str:
    """Who is at the other end, by certificate or by the kernel's word (``called``).

    Errors: RefusedError when nobody vouches for it.
    """
    peer = line.peer
    if isinstance(peer, LocalUser) and peer.uid < 0:
        raise RefusedError("nobody vouches for who you are", hint="ask over a unix socket")
    return called(peer, site=site)


def identity(directory: Path, role: Role, *, site: str | None = None) -> Tls:
    """Who we are over the network: the certificate of this role below a directory.

    site: whose it must be. Errors: RefusedError.
    """
    places = Places(directory)
    if not exists(places.certificate(role)):
        at = " --at HOST" if role is not Role.USER else ""
        raise RefusedError(
            f"there is no certificate of a {role} below {directory}",
            hint=f"virtgrid pki request {role} --site {site or 'SITE'}{at} asks for one",
        )
    tls = Tls(places.files(role))
    who = tls.identity
    if who.role is not role or site not in (None, who.site):
        meant = role if site is None else f"{role} of site {site}"
        raise RefusedError(
            f"{places.certificate(role)} is the certificate of {who}, and a {meant} is to be here",
            hint="--pki names the directory where its own one is",
        )
    return tls


def told_of(text: str, role: Role = Role.GRC) -> str:
    """Who is to be heard, as ``caller`` calls it: ``virtgrid://SITE/grc/NAME``, or ``uid:N`` for one on the
    same host. role: theirs, the coordinator's where nothing is said. Errors: UsageError.
    """
    form = f"virtgrid://SITE/{role}/NAME"
    if _LOCAL.fullmatch(text):
        return text
    try:
        who = Identity.parse(text)
    except RefusedError as error:
        raise UsageError(f"--{role}: {error.what}", hint=f"{form}, or uid:N") from None
    if who.role is not role:
        raise UsageError(f"--{role}: {who} is a {who.role}, and not what is heard here", hint=form)
    return str(who)
