"""Who is at the other end of a line, and what such a one may ask. Pure.

Over TLS it is what the peer's certificate says, as a URI: ``virtgrid://SITE/ROLE/NAME``. Over a unix socket
it is a user of this host, by the kernel's word. ``authorise`` decides from a table that each service writes
down for its methods; a method that is not in the table is nobody's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.wire.message import no_such_method


class Role(StrEnum):
    """What somebody is in the grid; stands in the certificate."""

    GRC = "grc"
    CRM = "crm"
    NRM = "nrm"
    HOST = "host"
    PILOT = "pilot"
    USER = "user"


_OF_USERS: Final = frozenset({Role.USER, Role.PILOT})
_SITE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME: Final = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,62}")
_URI: Final = re.compile(r"virtgrid://([^/]*)/([^/]*)/([^/]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Somebody of the grid, by certificate. site: whose; name: unique in the site among its role."""

    role: Role
    site: str
    name: str

    def __post_init__(self) -> None:
        if not _SITE.fullmatch(self.site):
            raise RefusedError(
                f"'{self.site[:80]}' is no name of a site",
                hint="small letters, digits and hyphens, at most 63",
            )
        if not _NAME.fullmatch(self.name):
            raise RefusedError(
                f"'{self.name[:80]}' is no name of a {self.role}",
                hint="small letters, digits, '_', '-' and '.', at most 63",
            )

    def __str__(self) -> str:
        return f"virtgrid://{self.site}/{self.role}/{self.name}"

    @staticmethod
    def parse(uri: str) -> Identity:
        """``virtgrid://SITE/ROLE/NAME``. Errors: RefusedError."""
        found = _URI.fullmatch(uri)
        if found is None or found[2] not in set(Role):
            raise RefusedError(
                f"'{uri[:200]}' is nobody of the grid",
                hint=f"virtgrid://SITE/ROLE/NAME, the role one of {', '.join(Role)}",
            )
        return Identity(role=Role(found[2]), site=found[1], name=found[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalUser:
    """A user of this host, at the other end of a unix socket.

    name: of the account, None when there is none. trusted: root, or whom we run as ourselves.
    """

    uid: int
    trusted: bool
    name: str | None = None

    def __str__(self) -> str:
        return f"user {self.uid} of this host"


Peer = Identity | LocalUser


def member(peer: Peer, *, site: str) -> Identity:
    """As whom of the grid a peer acts: a user is the same by certificate and on a host of the site.

    An account whose name the grid cannot write goes by its number.
    """
    if isinstance(peer, Identity):
        return peer
    name = peer.name or ""
    if not _NAME.fullmatch(name) or name.startswith("uid-"):
        name = f"uid-{peer.uid}"
    return Identity(role=Role.USER, site=site, name=name)


def called(peer: Peer, *, site: str | None = None) -> str:
    """A peer in one word, to be written down: its identity, or ``uid:N`` of this host.

    site: whose host this is, where that is known: then its users are members of that site (``member``), and
    only root, who is nobody's member, goes by number.
    """
    if isinstance(peer, Identity):
        return str(peer)
    if site is None or peer.uid == 0:
        return f"uid:{peer.uid}"
    return str(member(peer, site=site))


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """Who may ask a method. ours: roles of the service's own site; anybodys: roles of every site; named:
    these alone, as ``called`` calls them.

    Over a unix socket trusted users may ask everything, and others what a user or a pilot of the site may.
    """

    ours: frozenset[Role] = field(default_factory=frozenset)
    anybodys: frozenset[Role] = field(default_factory=frozenset)
    named: frozenset[str] = field(default_factory=frozenset)


Rights = Mapping[str, Right]


def authorise(peer: Peer, method: str, *, rights: Rights, site: str | None) -> None:
    """Whether this peer may ask this. site: the service's own.

    Errors: BadMessageError (nobody may), RefusedError (this one may not), with a sentence.
    """
    right = rights.get(method)
    if right is None:
        raise no_such_method(method)
    if called(peer) in right.named:
        return
    if isinstance(peer, LocalUser):
        if not peer.trusted and not _OF_USERS & (right.ours | right.anybodys):
            raise RefusedError(f"{peer} may not ask {method}", hint="root may, and who it was told of")
        return
    if peer.role in right.anybodys or (peer.role in right.ours and peer.site == site):
        return
    if right.named:
        raise RefusedError(
            f"{peer} may not ask {method}: it is not among those this service was told of",
            hint=f"it is when the service is started with --{peer.role} {peer}"
            if peer.role is Role.GRC
            else None,
        )
    if peer.role in right.ours:
        raise RefusedError(
            f"{peer} is of another site, and this is {site}: it may not ask {method} here",
            hint=f"a {peer.role} of {site} may",
        )
    others = " or ".join(f"a {role}" for role in sorted(right.ours | right.anybodys))
    raise RefusedError(
        f"{peer} may not ask {method}: a {peer.role} has no business with it",
        hint=f"{others or 'root'} may" + ("" if others else ", over the socket on its host"),
    )
