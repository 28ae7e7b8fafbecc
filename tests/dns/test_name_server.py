"""A name server is asked and changed as compare-and-swap, and every refusal is understood: on a real BIND."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from bind import NAME, NEW, NEW6, OLD, OLD6, OTHER, TTL_S, ZONE, Bind

from virtgrid.wire.dns.records import Change, Entry, NameServerError, Record, ServerAddress, Why, in_order
from virtgrid.wire.dns.server import NameServer


def records(*addresses: str, ttl_s: int = TTL_S) -> tuple[Record, ...]:
    return in_order(Record.of(address, ttl_s) for address in addresses)


def swap(before: str = OLD, after: str = NEW, *, ttl_s: int = 5) -> Change:
    return Change(name=NAME, zone=ZONE, before=records(before), after=records(after, ttl_s=ttl_s))


async def why(server: NameServer, change: Change | None = None) -> Why:
    """Why this is refused."""
    with pytest.raises(NameServerError) as caught:
        await (server.change(change) if change else server.look(NAME))
    assert caught.value.hint
    return caught.value.why


async def test_a_name_s_records_are_told_with_their_zone(bind: Bind) -> None:
    found = await bind.server().look(NAME)
    assert found == Entry(name=NAME, zone=ZONE, records=records(OLD, OLD6))
    assert (await bind.server().look(f"nobody.{ZONE}")).records == ()
    assert (await bind.server().look(ZONE)).zone == ZONE
    assert (await bind.server().look(f"alias.{ZONE}")).alias == NAME
    assert len((await bind.server().look(f"several.{ZONE}")).records) == 2


async def test_records_are_swapped_and_what_clients_see_follows(bind: Bind) -> None:
    await bind.server().change(swap())
    assert bind.resolve() == [(NEW, 5)]
    assert bind.resolve(kind="AAAA") == [(OLD6, TTL_S)], "a kind that is not named is not touched"


async def test_both_kinds_are_swapped_in_one_step_or_neither(bind: Bind) -> None:
    both = Change(name=NAME, zone=ZONE, before=records(OLD, OLD6), after=records(NEW, NEW6))
    await bind.stranger().change(swap(OLD, OTHER))
    assert await why(bind.server(), both) is Why.STALE
    assert bind.resolve(kind="AAAA") == [(OLD6, TTL_S)]
    await bind.stranger().change(swap(OTHER, OLD))
    await bind.server().change(both)
    assert (bind.resolve(), bind.resolve(kind="AAAA")) == ([(NEW, TTL_S)], [(NEW6, TTL_S)])


async def test_it_is_reached_over_ipv6_and_by_name(bind: Bind) -> None:
    for host in ("::1", "localhost"):
        server = NameServer(ServerAddress(host, bind.port), bind.key, deadline_s=10)
        assert (await server.look(NAME)).zone == ZONE


async def test_what_somebody_else_changed_is_not_overwritten(bind: Bind) -> None:
    await bind.stranger().change(swap(OLD, OTHER))
    with pytest.raises(NameServerError) as caught:
        await bind.server().change(swap())
    assert caught.value.why is Why.STALE
    assert f"does not point to {OLD} any more but to {OTHER}" in caught.value.what
    assert bind.resolve() == [(OTHER, 5)]


async def test_a_change_made_again_after_its_answer_was_lost_is_no_failure(bind: Bind) -> None:
    await bind.server().change(swap())
    serial = bind.serial()
    await bind.server().change(swap())
    assert (bind.resolve(), bind.serial()) == ([(NEW, 5)], serial)


async def test_whether_the_key_may_is_asked_without_changing_anything(bind: Bind) -> None:
    serial = bind.serial()
    server = bind.server()
    await server.permits(await server.look(NAME))
    locked = await server.look(f"locked.{ZONE}")
    with pytest.raises(NameServerError) as caught:
        await server.permits(locked)
    assert caught.value.why is Why.FORBIDDEN
    assert bind.serial() == serial


async def test_a_wrong_secret_or_an_unknown_key_is_told(bind: Bind) -> None:
    for key in (replace(bind.key, secret=bind.key.secret[::-1]), replace(bind.key, name="nobody")):
        server = NameServer(bind.address, key, deadline_s=10)
        assert await why(server) is Why.KEY
        assert await why(server, swap()) is Why.KEY
    assert bind.resolve() == [(OLD, TTL_S)]


async def test_clocks_that_differ_are_told_apart_from_a_wrong_key(
    bind: Bind, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert await why(bind.server()) is Why.CLOCK
    assert await why(bind.server(), swap()) is Why.CLOCK


async def test_a_zone_of_others_and_a_delegated_one_are_told(bind: Bind) -> None:
    for name in ("web.example.org", f"host.sub.{ZONE}"):
        with pytest.raises(NameServerError) as caught:
            await bind.server().look(name)
        assert caught.value.why is Why.NOT_AUTHORITATIVE
    foreign = replace(swap(), name="web.example.org", zone="example.org")
    assert await why(bind.server(), foreign) is Why.NOT_AUTHORITATIVE


async def test_a_server_that_is_gone_or_hangs_is_told_within_the_deadline(bind: Bind) -> None:
    with bind.frozen():
        hanging = bind.server(deadline_s=0.2)
        assert await why(hanging) is Why.AWAY
        assert await why(hanging, swap()) is Why.AWAY
    bind.kill()
    assert await why(bind.server()) is Why.AWAY
    assert await why(bind.server(), swap()) is Why.AWAY
    bind.start()
    assert (await bind.server().look(NAME)).records == records(OLD, OLD6)


async def test_a_host_that_does_not_resolve_is_away(bind: Bind) -> None:
    nowhere = NameServer(ServerAddress("name.invalid", 53), bind.key, deadline_s=10)
    assert await why(nowhere) is Why.AWAY


# --- what a real server does not do on demand ----------------------------------------------


@asynccontextmanager
async def relay(bind: Bind, *, losing: int) -> AsyncIterator[ServerAddress]:
    """Carries exchanges to BIND; the answers to the first ``losing`` of them are never delivered."""
    lost = iter(range(losing))

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(bind.address.host, bind.port)
        asked = await reader.readexactly(2)
        there_writer.write(asked + await reader.readexactly(int.from_bytes(asked)))
        length = await there_reader.readexactly(2)
        answer = length + await there_reader.readexactly(int.from_bytes(length))
        if next(lost, None) is None:
            writer.write(answer)
            await writer.drain()
        for one in (writer, there_writer):
            one.close()
            await one.wait_closed()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    async with server:
        yield ServerAddress("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_a_change_whose_answer_is_lost_counts_as_made_when_it_was(bind: Bind) -> None:
    async with relay(bind, losing=1) as address:
        await NameServer(address, bind.key, deadline_s=10).change(swap())
    assert bind.resolve() == [(NEW, 5)]


async def test_a_refusal_whose_answer_is_lost_does_not_count_as_made(bind: Bind) -> None:
    await bind.stranger().change(swap(OLD, OTHER))
    async with relay(bind, losing=1) as address:
        assert await why(NameServer(address, bind.key, deadline_s=10), swap()) is Why.AWAY
    assert bind.resolve() == [(OTHER, 5)]


@asynccontextmanager
async def saying(answer: bytes, bind: Bind) -> AsyncIterator[NameServer]:
    """A server that says this to everybody, with the question's id, and hangs up."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        said = asked[:2] + answer if answer else b""
        writer.write(len(said).to_bytes(2) + said if said else b"")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server:
        address = ServerAddress("127.0.0.1", server.sockets[0].getsockname()[1])
        yield NameServer(address, bind.key, deadline_s=10)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", Why.AWAY),  # hangs up
        (b"\x80\x05\0\0\0\0\0\0\0\0", Why.BROKEN),  # REFUSED, unsigned
        (b"\x84\0\0\1\0\0\0\0\0\0\3web\3svc\4test\0\0\6\0\1", Why.BROKEN),  # NOERROR, forged
        (b"\xff" * 40, Why.BROKEN),
        (b"\x84", Why.BROKEN),
    ],
)
async def test_an_answer_that_is_none_is_never_believed(bind: Bind, answer: bytes, expected: Why) -> None:
    async with saying(answer, bind) as server:
        assert await why(server) is expected
        assert await why(server, swap()) is expected


async def test_a_port_nobody_listens_on_is_away(bind: Bind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert await why(NameServer(ServerAddress("127.0.0.1", port), bind.key)) is Why.AWAY
