"""The name clients find a guest by: what its records are at each step of a migration. Pure.

Theory: a migration brings the records through these states; addresses and times to live (TTL) tell
them apart, so whoever looks at the zone later knows how far it had come.

=========  =========  ===  =============================================================
state      addresses  TTL  when
=========  =========  ===  =============================================================
original   old        old  before; again after a failed migration
lowered    old        low  while disks and memory are copied
moved      new        low  as soon as the guest runs at the destination
settled    new        old  when it has been verified there
=========  =========  ===  =============================================================

The TTL is given back at once after the verification. What it bought is over by then: a resolver that
asked before it was lowered keeps the old address for its time whatever the zone says now, and one that
asks from now on may keep the new one as long as it likes.

Records that are in none of these states belong to somebody else and are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, Final

import dns.exception
import dns.name

from virtgrid.core.errors import UsageError
from virtgrid.core.units import format_duration
from virtgrid.wire.dns.records import Change, Entry, Record, ServerAddress, in_order, shown

#: Short against a pause's length, long enough that a resolver under load still keeps the record.
LOW_TTL_S: Final = 5
#: Resolvers that keep the old address for longer than this are worth a warning.
_LONG_TTL_S: Final = 60
_FORM: Final = "NAME=ADDRESS or NAME=ADDRESS,ADDRESS6: web.example.org=198.51.100.10,2001:db8::10"


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRequest:
    """A name that shall point to the guest's new addresses, one of a kind, and who is asked to do it."""

    name: str
    addresses: tuple[str, ...]
    server: ServerAddress
    key_file: str


def parse_request(text: str, *, server: str | None, key_file: str | None) -> NameRequest:
    """``NAME=ADDRESS[,ADDRESS6]`` with the configured server and key. Errors: UsageError."""
    name, equals, listed = text.partition("=")
    try:
        absolute = dns.name.from_text(name)
    except (dns.exception.DNSException, UnicodeError):
        absolute = dns.name.root
    if not equals or absolute == dns.name.root or absolute.is_wild():
        raise UsageError(f"--dns: '{text[:300]}' does not say which name gets which address", hint=_FORM)
    addresses = tuple(_address(part) for part in listed.split(","))
    kinds = [record.kind for record in (Record.of(address, 0) for address in addresses)]
    if len(set(kinds)) != len(kinds):
        raise UsageError("--dns: a name gets at most one IPv4 and one IPv6 address", hint=_FORM)
    if not server or not key_file:
        raise UsageError(
            "--dns: no name server and key are configured",
            hint='[dns] server = "HOST" and key = "FILE" in /etc/virtgrid/virtgrid.toml',
        )
    return NameRequest(
        name=absolute.to_text(omit_final_dot=True).lower(),
        addresses=addresses,
        server=ServerAddress.parse(server),
        key_file=key_file,
    )


def _address(text: str) -> str:
    try:
        parsed = ip_address(text.strip())
    except ValueError:
        raise UsageError(f"--dns: '{text[:100]}' is not an IP address", hint=_FORM) from None
    if parsed.is_unspecified or parsed.is_multicast or parsed.is_link_local:
        raise UsageError(f"--dns: no client can reach a guest at {parsed}", hint=_FORM)
    return str(parsed)


@dataclass(frozen=True, slots=True, kw_only=True)
class NameFacts:
    """What the name server said before anything was touched; ``problem``: why that is not enough."""

    entry: Entry | None = None
    problem: str | None = None
    hint: str | None = None


def obstacle(asked: NameRequest, entry: Entry) -> tuple[str, str] | None:
    """Why a name's records are not ones to be swapped -> (sentence, hint); None when they are."""
    if entry.alias is not None:
        return (
            f"{asked.name} is an alias of {entry.alias} (CNAME) and has no addresses of its own",
            f"--dns {entry.alias}={','.join(asked.addresses)}",
        )
    for wanted in new_records(asked.addresses, entry):
        have = entry.of_kinds([wanted.kind])
        if not have:
            return (
                f"{asked.name} has no {wanted.kind} record that could be changed",
                "is the name right? virtgrid changes records, it creates none",
            )
        if len(have) > 1:
            return (
                f"{asked.name} points to {shown(have)}: which of them is the guest's cannot be told",
                "a name of the guest's own, which the shared one may be an alias of",
            )
    return None


def new_records(addresses: tuple[str, ...], entry: Entry) -> tuple[Record, ...]:
    """The new addresses as records, each with the time to live its kind has now."""
    ttl_s = {record.kind: record.ttl_s for record in entry.records}
    bare = (Record.of(address, 0) for address in addresses)
    return in_order(replace(record, ttl_s=ttl_s.get(record.kind, 0)) for record in bare)


def warnings(asked: NameRequest, entry: Entry) -> tuple[tuple[str, str | None], ...]:
    """What is worth saying of records that can be swapped -> (sentence, hint) each."""
    wanted = new_records(asked.addresses, entry)
    kinds = {record.kind for record in wanted}
    current = entry.of_kinds(kinds)
    said: list[tuple[str, str | None]] = []
    if longest_s := max((record.ttl_s for record in current if record.ttl_s > _LONG_TTL_S), default=0):
        keep = format_duration(longest_s)
        said.append(
            (
                f"resolvers may go on giving the old address of {asked.name} for up to {keep}",
                f"set its time to live to {LOW_TTL_S} s by hand, {keep} before migrating",
            )
        )
    if rest := tuple(record for record in entry.records if record.kind not in kinds):
        said.append((f"{asked.name} goes on pointing to {shown(rest)} as well", "--dns takes both addresses"))
    if current == wanted:
        said.append((f"{asked.name} points to {shown(wanted)} already", None))
    return tuple(said)


class NameState(StrEnum):
    """Where on their way the records are: the table above."""

    ORIGINAL = "original"
    LOWERED = "lowered"
    MOVED = "moved"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMove:
    """One name's way through the states above, with all that is needed to take it up again later.

    original: the records before anything was touched; destination: those of the settled state.
    """

    name: str
    zone: str
    original: tuple[Record, ...]
    destination: tuple[Record, ...]
    low_ttl_s: int
    server: ServerAddress
    key_file: str

    @staticmethod
    def of(asked: NameRequest, entry: Entry) -> NameMove:
        """The move of records without an obstacle."""
        destination = new_records(asked.addresses, entry)
        return NameMove(
            name=asked.name,
            zone=entry.zone,
            original=entry.of_kinds(record.kind for record in destination),
            destination=destination,
            low_ttl_s=LOW_TTL_S,
            server=asked.server,
            key_file=asked.key_file,
        )

    def fields(self) -> dict[str, Any]:
        """As the journal keeps it."""
        return {
            "name": self.name,
            "zone": self.zone,
            "original": [record.as_dict() for record in self.original],
            "destination": [record.as_dict() for record in self.destination],
            "low_ttl_s": self.low_ttl_s,
            "server": str(self.server),
            "key_file": self.key_file,
        }

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> NameMove:
        """The inverse of ``fields``. Errors: KeyError, TypeError, ValueError, UsageError."""

        def records(listed: list[dict[str, Any]]) -> tuple[Record, ...]:
            return in_order(Record.of(str(one["address"]), int(one["ttl_s"])) for one in listed)

        return NameMove(
            name=str(fields["name"]),
            zone=str(fields["zone"]),
            original=records(fields["original"]),
            destination=records(fields["destination"]),
            low_ttl_s=int(fields["low_ttl_s"]),
            server=ServerAddress.parse(str(fields["server"])),
            key_file=str(fields["key_file"]),
        )

    def records(self, state: NameState) -> tuple[Record, ...]:
        """What stands in the zone in a state."""
        there = state in (NameState.MOVED, NameState.SETTLED)
        full = self.destination if there else self.original
        if state in (NameState.ORIGINAL, NameState.SETTLED):
            return full
        return tuple(replace(record, ttl_s=min(record.ttl_s, self.low_ttl_s)) for record in full)

    def change(self, before: NameState, after: NameState) -> Change:
        """From one state to another."""
        return self._swap(self.records(before), after)

    def text(self, state: NameState) -> str:
        """A state in a sentence."""
        records = self.records(state)
        ttl_s = max(record.ttl_s for record in records)
        return f"{self.name} points to {shown(records)}, time to live {ttl_s} s"

    def end(self, found: Entry, last: NameState) -> Change | str | None:
        """What brings the records found now to their last state, SETTLED or ORIGINAL.

        None: they are in it. A sentence: they are in no state of ours, and are left alone.
        """
        wanted = self.records(last)
        current = found.of_kinds(record.kind for record in wanted)
        if current == wanted:
            return None
        ours = [self.records(state) for state in NameState]
        if current in ours:
            return self._swap(current, last)
        if _addresses(current) in map(_addresses, ours):
            times = " and ".join(format_duration(record.ttl_s) for record in current)
            return f"{self.name} was left alone: somebody else has set its time to live to {times}"
        return f"{self.name} was left alone: it points to {shown(current)}, which somebody else has set"

    def _swap(self, before: tuple[Record, ...], after: NameState) -> Change:
        return Change(name=self.name, zone=self.zone, before=before, after=self.records(after))


def _addresses(records: tuple[Record, ...]) -> tuple[str, ...]:
    return tuple(record.address for record in records)
