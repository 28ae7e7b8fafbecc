"""A name's address records, a change of them as compare-and-swap, and what each refusal means. Pure.

A change carries its condition (RFC 2136, section 2.4.2): the server makes it only if the records are
exactly those it names, in one step. So nobody's change is ever overwritten unseen, and asking again
after a lost answer does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final

from virtgrid.core.errors import UsageError, VirtgridError

KINDS: Final = ("A", "AAAA")
PORT: Final = 53
_SHOWN_MAX: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One address record. kind: A or AAAA; ttl_s: how long a resolver may keep it, in seconds."""

    kind: str
    address: str
    ttl_s: int

    @staticmethod
    def of(address: str, ttl_s: int) -> Record:
        """The record of an address as people write it. Errors: ValueError."""
        parsed = ip_address(address)
        return Record(kind="AAAA" if parsed.version == 6 else "A", address=str(parsed), ttl_s=ttl_s)

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a journal."""
        return {"address": self.address, "ttl_s": self.ttl_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a server's zone holds under a name: its address records, or the name it is an alias of."""

    name: str
    zone: str
    records: tuple[Record, ...] = ()
    alias: str | None = None

    def of_kinds(self, kinds: Iterable[str]) -> tuple[Record, ...]:
        """The records of these kinds, in the order of the addresses' text."""
        wanted = frozenset(kinds)
        return in_order(record for record in self.records if record.kind in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Swap ``before`` for ``after`` if the records of those kinds are exactly ``before``.

    Both have the same kinds. Addresses are compared, times to live are not: RFC 2136 has no such condition.
    """

    name: str
    zone: str
    before: tuple[Record, ...]
    after: tuple[Record, ...]

    def made(self, entry: Entry) -> bool:
        """Whether the zone is as this change leaves it."""
        return entry.of_kinds(record.kind for record in self.after) == in_order(self.after)


def in_order(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records so that two equal sets are equal tuples."""
    return tuple(sorted(records, key=lambda record: (record.kind, record.address)))


def shown(records: Iterable[Record]) -> str:
    """Addresses for a sentence: ``10.0.0.9 and fd00::9``; ``no address``."""
    addresses = [record.address for record in in_order(records)]
    if not addresses:
        return "no address"
    more = len(addresses) - _SHOWN_MAX
    return " and ".join(addresses[:_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a name server takes questions and updates."""

    host: str
    port: int = PORT

    @staticmethod
    def parse(text: str) -> ServerAddress:
        """``HOST``, ``HOST:PORT``, an IPv6 address bare or in brackets. Errors: UsageError."""
        found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]{1,5}))?", text)
        if found is None and text.count(":") > 1:
            found = re.fullmatch(r"([0-9A-Fa-f:.]+)()", text)
        if found is None:
            found = re.fullmatch(r"([A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?", text)
        port = int(found[2] or PORT) if found else 0
        if found is None or not 0 < port < 65536:
            raise UsageError(
                f"'{text[:200]}' is no name server", hint="HOST or HOST:PORT; [2001:db8::53]:53 for IPv6"
            )
        return ServerAddress(found[1], port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORT else f"{host}:{self.port}"


# --- refusals -----------------------------------------------------------------------------


class Why(StrEnum):
    """Why a name server's answer is not the one that was hoped for."""

    AWAY = "it does not answer"
    KEY = "it does not know the key"
    CLOCK = "its clock and ours differ"
    NOT_AUTHORITATIVE = "it is not the primary server of the name's zone"
    FORBIDDEN = "the key may not change this name"
    STALE = "somebody else changed the record"
    BROKEN = "it answered something else"


#: What a person can do about it.
HINTS: Final[Mapping[Why, str]] = {
    Why.AWAY: "is it running, and does a firewall let TCP to its port through?",
    Why.KEY: "name, algorithm and secret must be those of a key statement in the server's named.conf",
    Why.CLOCK: "signatures hold for five minutes: set both hosts' clocks",
    Why.NOT_AUTHORITATIVE: "[dns] server in the configuration must be the zone's primary server",
    Why.FORBIDDEN: "in BIND: update-policy { grant KEY name NAME A AAAA; }; in the zone's statement",
    Why.STALE: "nothing was changed; find out who else changes this name",
    Why.BROKEN: "the server's log tells more",
}

#: Answers to an update (RFC 2136, section 2.2) -> what they mean. Others are BROKEN.
_UPDATE_ANSWERS: Final[Mapping[str, Why]] = {
    "NXRRSET": Why.STALE,
    "YXRRSET": Why.STALE,
    "NXDOMAIN": Why.STALE,
    "YXDOMAIN": Why.STALE,
    "REFUSED": Why.FORBIDDEN,
    "NOTIMP": Why.FORBIDDEN,
    "NOTAUTH": Why.NOT_AUTHORITATIVE,
    "NOTZONE": Why.NOT_AUTHORITATIVE,
}


class NameServerError(VirtgridError):
    """A name server did not do what was asked; ``why`` says in which way."""

    code = "VG-DNS"

    def __init__(
        self,
        what: str,
        *,
        why: Why = Why.BROKEN,
        where: str | None = None,
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, cause=cause, hint=hint)
        self.why = why


def refused(why: Why, name: str, server: ServerAddress, *, cause: str | None = None) -> NameServerError:
    """The error of a refusal, in a sentence with a hint."""
    return NameServerError(
        f"{name} at the name server {server}: {why.value}",
        why=why,
        cause=cause,
        hint=HINTS[why],
    )


def update_refused(answer: str, name: str, server: ServerAddress) -> NameServerError:
    """What an update's answer other than NOERROR means."""
    return refused(_UPDATE_ANSWERS.get(answer, Why.BROKEN), name, server, cause=answer)


def stale(change: Change, found: Entry) -> NameServerError:
    """Somebody else changed the record in between: what stands there now."""
    now = found.of_kinds(record.kind for record in change.before)
    return NameServerError(
        f"{change.name} does not point to {shown(change.before)} any more but to {shown(now)}:"
        f" {Why.STALE.value}",
        why=Why.STALE,
        hint=HINTS[Why.STALE],
    )
