"""Asking a name server and changing its records: signed, over TCP, every exchange with a deadline."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import dns.tsig
import dns.update

from virtgrid.wire.dns.key import TsigKey
from virtgrid.wire.dns.records import (
    KINDS,
    Change,
    Entry,
    NameServerError,
    Record,
    ServerAddress,
    Why,
    in_order,
    refused,
    stale,
    update_refused,
)

#: Room for a lost SYN or two on the way.
DEADLINE_S: Final = 5.0
#: Addresses no service has. Removing one that is not there shows whether the key may change the name.
_NOBODY: Final = {"A": "0.0.0.0", "AAAA": "::"}  # noqa: S104 - a record's content, not where we listen


class NameServer:
    """The primary server of a zone, spoken to with a key. Errors of all methods: NameServerError."""

    def __init__(self, address: ServerAddress, key: TsigKey, *, deadline_s: float = DEADLINE_S) -> None:
        self.address = address
        self._key = dns.tsig.Key(key.name, key.secret, key.algorithm)
        self._deadline_s = deadline_s

    async def look(self, name: str) -> Entry:
        """What the zone holds under a name; no records when there is none."""
        start = await self._ask(name, "SOA")
        owner = dns.name.from_text(name)
        if alias := start.get_rrset(start.answer, owner, dns.rdataclass.IN, dns.rdatatype.CNAME):
            return Entry(name=name, zone="", alias=str(alias[0]).rstrip("."))
        soa = [part for part in (*start.answer, *start.authority) if part.rdtype == dns.rdatatype.SOA]
        if not soa or not owner.is_subdomain(soa[0].name):
            raise refused(Why.NOT_AUTHORITATIVE, name, self.address, cause="it names no zone of its own")
        answers = await asyncio.gather(*(self._ask(name, kind) for kind in KINDS))
        records = [
            Record.of(str(data), part.ttl)
            for kind, answer in zip(KINDS, answers, strict=True)
            if (part := _of_kind(answer, owner, kind)) is not None
            for data in part
        ]
        return Entry(name=name, zone=_text(soa[0].name), records=in_order(records))

    async def permits(self, entry: Entry) -> None:
        """Let the server check the key against a change of these records that changes nothing."""
        update = self._conditional(entry.name, entry.zone, entry.records)
        for kind in sorted({record.kind for record in entry.records}):
            update.delete(_absolute(entry.name), kind, _NOBODY[kind])
        await self._send(update, entry.name)

    async def change(self, change: Change) -> None:
        """Swap the records, once. Errors: ``Why.STALE`` when they are not those of ``before``.

        An answer that is lost after the change was made is no failure: what stands there then counts.
        """
        update = self._conditional(change.name, change.zone, change.before)
        for kind in sorted({record.kind for record in change.before}):
            update.delete(_absolute(change.name), kind)
        for record in change.after:
            update.add(_absolute(change.name), record.ttl_s, record.kind, record.address)
        try:
            await self._send(update, change.name)
        except NameServerError as error:
            if error.why not in (Why.STALE, Why.AWAY):
                raise
            found = await self.look(change.name)
            if change.made(found):
                return
            raise (stale(change, found) if error.why is Why.STALE else error) from error

    def _conditional(self, name: str, zone: str, records: tuple[Record, ...]) -> dns.update.UpdateMessage:
        """An update under the condition that these are all the records of their kinds."""
        update = dns.update.UpdateMessage(_absolute(zone))
        for record in records:
            update.present(_absolute(name), record.kind, record.address)
        return update

    async def _ask(self, name: str, kind: str) -> dns.message.Message:
        query = dns.message.make_query(_absolute(name), kind, flags=0)
        answer = await self._exchange(query, name)
        told = dns.rcode.to_text(answer.rcode())
        if told == "REFUSED" or (told in ("NOERROR", "NXDOMAIN") and not answer.flags & dns.flags.AA):
            raise refused(Why.NOT_AUTHORITATIVE, name, self.address, cause=told)
        if told not in ("NOERROR", "NXDOMAIN"):
            raise refused(Why.BROKEN, name, self.address, cause=told)
        return answer

    async def _send(self, update: dns.update.UpdateMessage, name: str) -> None:
        told = dns.rcode.to_text((await self._exchange(update, name)).rcode())
        if told != "NOERROR":
            raise update_refused(told, name, self.address)

    async def _exchange(self, message: dns.message.Message, name: str) -> dns.message.Message:
        message.use_tsig(self._key)
        try:
            async with asyncio.timeout(self._deadline_s):
                # dnspython checks the signature, and refuses an answer without one.
                return await self._over_tcp(message)
        except (dns.exception.Timeout, TimeoutError, OSError, EOFError) as error:
            late = isinstance(error, dns.exception.Timeout | TimeoutError)
            cause = f"no answer within {self._deadline_s:g} s" if late else str(error) or "it hung up"
            raise refused(Why.AWAY, name, self.address, cause=cause) from error
        except (dns.tsig.PeerBadTime, dns.tsig.BadTime) as error:
            raise refused(Why.CLOCK, name, self.address, cause=str(error)) from error
        except (dns.tsig.PeerError, dns.tsig.BadSignature, dns.tsig.BadKey, dns.tsig.BadAlgorithm) as error:
            raise refused(Why.KEY, name, self.address, cause=str(error)) from error
        except (dns.exception.DNSException, ValueError) as error:
            raise refused(Why.BROKEN, name, self.address, cause=str(error)[:200]) from error

    async def _over_tcp(self, message: dns.message.Message) -> dns.message.Message:
        """One exchange with the first of the server's addresses that takes the call."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.address.host, self.address.port, type=socket.SOCK_STREAM)
        for _, _, _, _, (host, *_) in found[:-1]:
            try:
                return await dns.asyncquery.tcp(message, str(host), port=self.address.port)
            except OSError:
                continue
        host = found[-1][4][0]
        return await dns.asyncquery.tcp(message, str(host), port=self.address.port)


def _absolute(name: str) -> dns.name.Name:
    return dns.name.from_text(name)


def _text(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True).lower()


def _of_kind(answer: dns.message.Message, owner: dns.name.Name, kind: str) -> dns.rrset.RRset | None:
    rdtype = dns.rdatatype.from_text(kind)
    return answer.get_rrset(answer.answer, owner, dns.rdataclass.IN, rdtype)
