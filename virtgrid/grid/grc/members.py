"""Sites that join a coordinator, and leave it, while it runs.

What has joined stands in a file beside the coordinator's database, one ``SITE=ENDPOINT`` a line as ``--crm``
takes it. Before a site is written there it has been spoken to: its certificate says that it is the CRM of
this site, the clocks agree, and it hears us. So nobody joins by asking for it, and no site is joined against
its will: the administrator of the coordinator names the site, that of the site has named the coordinator.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError, UsageError, VirtgridError
from virtgrid.core.files import replace_file
from virtgrid.grid.grc.coordinator import SITES_LIMIT, Coordinator, site_view
from virtgrid.grid.grc.parties import WireParty, parse_party
from virtgrid.grid.messages.coalloc import (
    OFFER,
    AskOffer,
    Empty,
    Join,
    Leave,
    Offer,
    SiteList,
    SiteView,
    Window,
)
from virtgrid.grid.messages.common import parse
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Role
from virtgrid.wire.message import BadMessageError
from virtgrid.wire.tls import Tls

_ASK_S: Final = 10.0
_FILE_LIMIT_BYTES: Final = 1 << 17
_HEAD: Final = "# Written by virtgrid site join and leave.\n"

_log = logging.getLogger(__name__)


def crm_of(site: str, where: Endpoint, tls: Tls | None) -> WireParty:
    """A site's CRM, which over the network must show that it is that."""
    return WireParty(site, where, tls=tls, role=Role.CRM, site=site)


def read(path: Path) -> dict[str, Endpoint]:
    """The sites of a file; none where there is no file. Errors: RefusedError naming the line."""
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RefusedError(f"{path} cannot be read", cause=error.strerror) from error
    found: dict[str, Endpoint] = {}
    lines = data.decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            site, where = parse_party(line.strip())
        except UsageError as error:
            raise RefusedError(f"{path}: line {number}: {error.what}", hint=error.hint) from None
        if site in found:
            raise RefusedError(f"{path}: line {number}: site {site} stands there twice")
        found[site] = where
    if len(data) > _FILE_LIMIT_BYTES or len(found) > SITES_LIMIT:
        raise RefusedError(f"{path} has more than {SITES_LIMIT} sites")
    return found


def text_of(sites: Mapping[str, Endpoint]) -> str:
    """What ``read`` reads."""
    return _HEAD + "".join(f"{site}={where}\n" for site, where in sorted(sites.items()))


class Members:
    """The sites of one coordinator. given: those it was started with, which neither join nor leave."""

    def __init__(
        self,
        path: Path,
        *,
        coordinator: Coordinator,
        parties: Mapping[str, WireParty],
        joined: Mapping[str, Endpoint],
        tls: Tls | None,
    ) -> None:
        self._path, self._coordinator, self._tls = path, coordinator, tls
        self._parties, self._joined = dict(parties), dict(joined)
        self._changing = asyncio.Lock()

    async def join(self, asked: Join) -> SiteView:
        """Errors: RefusedError, PeerUnreachableError, UsageError; nothing is changed then."""
        where = Endpoint.parse(asked.at)
        async with self._changing:
            known = self._parties.get(asked.site)
            if known is None:
                self._require_new(asked.site, where)
                party = crm_of(asked.site, where, self._tls)
                try:
                    offer = await self._offer(asked.site, party)
                    self._write({**self._joined, asked.site: where})
                    self._coordinator.take_in(asked.site, party)
                except BaseException:
                    await party.close()
                    raise
                self._parties[asked.site], self._joined[asked.site] = party, where
                _log.info("site %s joined: %s at %s", asked.site, party.who or "its CRM", where)
            elif asked.site in self._joined and known.where == where:
                offer = await self._offer(asked.site, known)  # said again: it has joined
            else:
                raise RefusedError(
                    f"there is a '{asked.site}' already, at {known.where}",
                    hint=f"virtgrid site leave {asked.site}, if it joined and is to be found elsewhere",
                )
            return self._whereabouts(site_view(asked.site, offer))

    async def leave(self, asked: Leave) -> Empty:
        """Errors: NotFoundError; RefusedError while it keeps anything, or when it never joined."""
        async with self._changing:
            if asked.site not in self._parties:
                raise NotFoundError(f"there is no site '{asked.site}'", hint="virtgrid site list")
            if asked.site not in self._joined:
                raise RefusedError(
                    f"'{asked.site}' did not join, this coordinator was started with it",
                    hint="start it without --crm for that site",
                )
            self._coordinator.require_unused(asked.site)
            self._write({site: where for site, where in self._joined.items() if site != asked.site})
            del self._joined[asked.site], self._parties[asked.site]
            await self._coordinator.let_go(asked.site)
            _log.info("site %s has left", asked.site)
        return Empty()

    def reach(self, site: str) -> WireParty:
        """Another line to a site. Errors: NotFoundError."""
        party = self._parties.get(site)
        if party is None:
            raise NotFoundError(f"there is no site '{site}' (any more)", hint="virtgrid site list")
        return crm_of(site, party.where, self._tls)

    def told(self, sites: SiteList) -> SiteList:
        """The list with where everybody is, and who answers there."""
        return SiteList(sites=tuple(map(self._whereabouts, sites.sites)))

    def _whereabouts(self, view: SiteView) -> SiteView:
        party = self._parties.get(view.party)
        if party is None:
            return view
        who = None if party.who is None else str(party.who)
        joined = view.party in self._joined
        return view.model_copy(update={"at": str(party.where), "who": who, "joined": joined})

    def _require_new(self, site: str, where: Endpoint) -> None:
        there = [name for name, party in self._parties.items() if party.where == where]
        if there:
            raise RefusedError(f"{where} is where {there[0]} is, and not another site")
        if where.is_network and self._tls is None:
            raise RefusedError(
                "this coordinator has no certificate to show over the network",
                hint="virtgrid pki request grc asks for one; then start it with --pki DIR",
            )
        self._coordinator.require_room(site)

    async def _offer(self, site: str, party: WireParty) -> Offer:
        """Speak to it. Errors: PeerUnreachableError, RefusedError, told as what the joining met."""
        now_s = int(time.time())
        asked = AskOffer(window=Window(begins_at_s=now_s, ends_at_s=now_s + 3600), prefix=30)
        try:
            return parse(Offer, OFFER, await party.call(OFFER, asked.model_dump(), deadline_s=_ASK_S))
        except VirtgridError as error:
            kind = PeerUnreachableError if isinstance(error, PeerUnreachableError) else RefusedError
            raise kind(
                f"site {site} cannot join: {error.what}", cause=error.cause, hint=error.hint
            ) from error
        except BadMessageError as error:
            raise RefusedError(f"site {site} cannot join: {error}") from error

    def _write(self, sites: Mapping[str, Endpoint]) -> None:
        try:
            replace_file(self._path, text_of(sites).encode())
        except OSError as error:
            raise RefusedError(f"{self._path} cannot be written", cause=error.strerror) from error
