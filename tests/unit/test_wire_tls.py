"""Over TLS only who shows a good certificate is heard, and everybody else is refused in one sentence."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.wire_ends import Raw, nothing, until
from tests.wire_grid import CRM, GRC, Grid
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import NotAdmittedError, NotHeardError, PeerUnreachableError, RefusedError
from virtgrid.wire import reception
from virtgrid.wire.endpoint import Endpoint, HostPort, Listener, dial, listen
from virtgrid.wire.identity import Right, Role
from virtgrid.wire.line import Line, LineLostError
from virtgrid.wire.message import RemoteError
from virtgrid.wire.tls import Tls, TlsFiles

RIGHTS = {
    "WHO": Right(anybodys=frozenset({Role.GRC})),
    "REPORT": Right(ours=frozenset({Role.HOST})),
}
HERE = Endpoint(HostPort("127.0.0.1", 0))


class Service:
    """A CRM of site a that says who calls, and counts how often it was asked anything."""

    def __init__(self) -> None:
        self.asked = 0

    async def heard(self, line: Line, method: str, params: Mapping[str, Any]) -> Any:
        self.asked += 1
        return str(line.peer)


@contextlib.asynccontextmanager
async def serving(tls: Tls) -> AsyncIterator[tuple[Service, Listener]]:
    service = Service()
    listener = await listen(HERE, service.heard, name="a caller", tls=tls, rights=RIGHTS)
    try:
        yield service, listener
    finally:
        await listener.close()


@contextlib.asynccontextmanager
async def calling(where: Endpoint, tls: Tls, expect: Role = Role.CRM) -> AsyncIterator[Line]:
    line = await dial(where, nothing, name="the CRM", tls=tls, expect=expect)
    try:
        yield line
    finally:
        await line.close()


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "grid")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="virtgrid.wire")
    return caplog


def refusals(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "virtgrid.wire.reception"]


def said(log: pytest.LogCaptureFixture, sentence: str) -> bool:
    """Whether there was one refusal, in this sentence."""
    assert len(refusals(log)) <= 1, log.messages
    return any(sentence in text for text in refusals(log))


async def test_both_sides_know_each_other_by_their_certificates(grid: Grid) -> None:
    async with serving(grid.tls(CRM)) as (service, listener), calling(listener.where, grid.tls(GRC)) as line:
        assert str(line.peer) == CRM
        assert await line.call("WHO") == GRC
        assert service.asked == 1


async def test_what_the_table_does_not_allow_never_reaches_the_handler(grid: Grid, log: Any) -> None:
    async with serving(grid.tls(CRM)) as (service, listener), calling(listener.where, grid.tls(GRC)) as line:
        with pytest.raises(RemoteError, match="no method ELSE"):
            await line.call("ELSE")
        with pytest.raises(NotHeardError, match="a grc has no business with it"):
            await line.call("REPORT")
        assert service.asked == 0
    assert said(log, "is refused REPORT")


async def test_a_certificate_of_another_site_is_refused(grid: Grid, log: Any) -> None:
    async with serving(grid.tls(CRM)) as (service, listener):
        async with calling(listener.where, grid.tls("virtgrid://b/host/n1")) as line:
            with pytest.raises(RefusedError, match="is of another site, and this is a"):
                await line.call("REPORT")
        assert service.asked == 0
        async with calling(listener.where, grid.tls("virtgrid://a/host/n1")) as line:
            assert await line.call("REPORT")
    assert said(log, "is of another site")


async def test_a_caller_of_another_authority_is_refused(grid: Grid, tmp_path: Path, log: Any) -> None:
    other = Grid(tmp_path / "other")
    ours, theirs = grid.enrol(GRC), other.enrol(GRC)
    files = theirs.files(Role.GRC)
    # It trusts us; we do not trust it.
    tls = Tls(TlsFiles(certificate=files.certificate, key=files.key, trust=ours.trust))
    async with serving(grid.tls(CRM)) as (service, listener):
        with pytest.raises(PeerUnreachableError, match="does not let us in"):
            await dial(listener.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
        await until(lambda: bool(refusals(log)))
    assert said(log, "is not let in: its certificate is of an authority that is not trusted here")
    assert service.asked == 0


async def test_an_answerer_of_another_authority_is_not_spoken_to(grid: Grid, tmp_path: Path) -> None:
    other = Grid(tmp_path / "other")
    async with serving(other.tls(CRM)) as (_, listener):
        with pytest.raises(NotAdmittedError, match="of an authority that is not trusted here"):
            await dial(listener.where, nothing, name="the CRM", tls=grid.tls(GRC), expect=Role.CRM)


async def test_an_expired_certificate_is_refused_on_either_side(grid: Grid, log: Any) -> None:
    ago = {"ago": timedelta(days=3), "lifetime": timedelta(days=2)}
    good = FakeClock(grid.now - timedelta(days=2))
    async with serving(grid.tls(CRM)) as (service, listener):
        old = Tls(_as_it_was(grid, GRC, **ago), clock=good)
        with pytest.raises(PeerUnreachableError):
            await dial(listener.where, nothing, name="the CRM", tls=old, expect=Role.CRM)
        await until(lambda: bool(refusals(log)))
        assert said(log, "its certificate has expired")
        assert service.asked == 0
    async with serving(Tls(_as_it_was(grid, CRM, **ago), clock=good)) as (_, listener):
        with pytest.raises(PeerUnreachableError, match="its certificate has expired"):
            await dial(listener.where, nothing, name="the CRM", tls=grid.tls(GRC), expect=Role.CRM)


async def test_who_has_an_expired_certificate_is_told_at_home(grid: Grid) -> None:
    late = grid.tls(GRC, ago=timedelta(days=3), lifetime=timedelta(days=2))
    with pytest.raises(
        NotAdmittedError, match=r"is not called: our own certificate .* was good until"
    ) as told:
        await dial(Endpoint.parse("tls://127.0.0.1:9"), nothing, name="the CRM", tls=late, expect=Role.CRM)
    assert told.value.hint == "virtgrid pki request grc asks for another one"


def _as_it_was(grid: Grid, uri: str, **enrol: timedelta) -> TlsFiles:
    return grid.enrol(uri, **enrol).files(Role.GRC if uri == GRC else Role.CRM)


async def test_who_answers_in_a_wrong_role_is_not_spoken_to(grid: Grid) -> None:
    async with serving(grid.tls("virtgrid://a/nrm/nrm")) as (_, listener):
        with pytest.raises(NotAdmittedError, match=r"virtgrid://a/nrm/nrm answers, which is no crm"):
            await dial(listener.where, nothing, name="the CRM", tls=grid.tls(GRC), expect=Role.CRM)


async def test_who_answers_from_another_site_is_not_spoken_to(grid: Grid) -> None:
    tls = grid.tls(GRC)
    async with serving(grid.tls(CRM)) as (_, listener):
        ask = functools.partial(dial, listener.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
        with pytest.raises(PeerUnreachableError, match=r"virtgrid://a/crm/crm answers, .* no crm of site b"):
            await ask(site="b")
        await (await ask(site="a")).close()


async def test_who_answers_under_another_name_is_not_spoken_to(grid: Grid) -> None:
    async with serving(grid.tls(CRM)) as (_, listener):
        assert isinstance(listener.where.place, HostPort)
        elsewhere = Endpoint(HostPort("127.0.0.2", listener.where.place.port))
        relay = await asyncio.start_server(_relay_to(listener.where.place), elsewhere.place.host, 0)
        port = relay.sockets[0].getsockname()[1]
        with pytest.raises(PeerUnreachableError, match="its certificate is not for that address"):
            await dial(
                Endpoint(HostPort("127.0.0.2", port)), nothing, name="the CRM", tls=grid.tls(GRC),
                expect=Role.CRM,
            )  # fmt: skip
        relay.close()


def _relay_to(place: HostPort) -> Any:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far, back = await asyncio.open_connection(place.host, place.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(4096):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, back), pump(far, writer))

    return relay


@contextlib.asynccontextmanager
async def plain(where: Endpoint) -> AsyncIterator[Raw]:
    assert isinstance(where.place, HostPort)
    reader, writer = await asyncio.open_connection(where.place.host, where.place.port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "talk",
    [
        b'{"jsonrpc":"2.0","method":"WHO","params":{},"id":1}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
        b"\x80" * 4096,
    ],
)
async def test_plain_talk_is_refused(grid: Grid, log: Any, talk: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(reception, "HANDSHAKE_DEADLINE_S", 0.3)
    async with serving(grid.tls(CRM)) as (service, listener), plain(listener.where) as stranger:
        await stranger.say(talk)
        while await stranger.hear():
            pass
        await until(lambda: bool(refusals(log)))
        assert service.asked == 0
    assert said(log, "a caller at 127.0.0.1 is not let in: ")


async def test_tls_1_2_is_refused(grid: Grid, log: Any) -> None:
    files = grid.enrol(GRC).files(Role.GRC)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.trust)
    context.load_cert_chain(files.certificate, files.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(grid.tls(CRM)) as (_, listener):
        assert isinstance(listener.where.place, HostPort)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(listener.where.place.host, listener.where.place.port, ssl=context)
        await until(lambda: bool(refusals(log)))
    assert said(log, "it speaks no TLS 1.3")


async def test_who_shows_no_certificate_is_refused(grid: Grid, log: Any) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(grid.enrol(GRC).trust)
    async with serving(grid.tls(CRM)) as (service, listener):
        assert isinstance(listener.where.place, HostPort)
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", listener.where.place.port, ssl=context
            )
            writer.write(b'{"jsonrpc":"2.0","method":"WHO","params":{},"id":1}\n')
            assert await reader.read() == b""
        await until(lambda: bool(refusals(log)))
        assert service.asked == 0
    assert said(log, "it shows no certificate")


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_half_a_handshake_and_silence_end_at_the_deadline(
    grid: Grid, log: Any, first: bytes, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reception, "HANDSHAKE_DEADLINE_S", 0.1)
    async with serving(grid.tls(CRM)) as (_, listener), plain(listener.where) as stranger:
        if first:
            await stranger.say(first)
        assert await stranger.hear() == b""
        await until(lambda: bool(refusals(log)))
    assert said(log, "it did not finish the handshake in time")


async def test_who_goes_silent_afterwards_is_hung_up_on(grid: Grid, monkeypatch: Any) -> None:
    monkeypatch.setattr(reception, "IDLE_S", 0.05)
    monkeypatch.setattr(reception, "_PING_DEADLINE_S", 0.1)
    tls = grid.tls(GRC)
    async with serving(grid.tls(CRM)) as (_, listener):
        assert isinstance(listener.where.place, HostPort)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", listener.where.place.port, ssl=tls.client_context()
        )
        assert b"PING" in await reader.readline()
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.transport.abort()


async def test_the_slow_cannot_keep_others_out(grid: Grid, monkeypatch: Any) -> None:
    monkeypatch.setattr(reception, "HANDSHAKES_LIMIT", 4)
    async with serving(grid.tls(CRM)) as (_, listener):
        assert isinstance(listener.where.place, HostPort)
        place = (listener.where.place.host, listener.where.place.port)
        loitering = [socket.create_connection(place) for _ in range(12)]
        async with calling(listener.where, grid.tls(GRC)) as line:
            assert await line.call("WHO") == GRC
        for sock in loitering:
            sock.close()


def client_hello() -> bytes:
    """The first bytes of an honest caller."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_strangers_send_leaves_nothing_behind(
    grid: Grid, log: Any, seed: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reception, "HANDSHAKE_DEADLINE_S", 0.2)
    dice, honest = random.Random(seed), client_hello()

    async def misbehave(where: Endpoint) -> None:
        said = bytearray(honest if dice.random() < 0.7 else dice.randbytes(dice.randrange(3000)))
        for _ in range(dice.randrange(6)):
            if said:
                said[dice.randrange(len(said))] = dice.randrange(256)
        async with plain(where) as stranger:
            with contextlib.suppress(OSError):
                await stranger.say(bytes(said[: dice.randrange(len(said) + 1)]))
                if dice.random() < 0.5:
                    await stranger.hear()

    async with serving(grid.tls(CRM)) as (service, listener):
        await asyncio.gather(*(misbehave(listener.where) for _ in range(50)))
        await until(lambda: not listener._reception._tasks)
        assert service.asked == 0
        async with calling(listener.where, grid.tls(GRC)) as line:
            assert await line.call("WHO") == GRC
    assert not [record for record in log.records if record.levelno >= logging.ERROR]


async def test_a_caller_too_many_hears_why(grid: Grid) -> None:
    tls = grid.tls(GRC)
    listener = await listen(HERE, nothing, name="a caller", tls=grid.tls(CRM), rights=RIGHTS, limit=1)
    async with calling(listener.where, tls):
        with pytest.raises(PeerUnreachableError) as refused:
            await dial(listener.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
        assert "1 callers are served already" in (refused.value.cause or "")
    await listener.close()


async def test_a_revoked_certificate_is_refused_even_on_a_line_that_stands(grid: Grid) -> None:
    crm = grid.enrol(CRM)
    tls = grid.tls(GRC)
    async with serving(Tls(crm.files(Role.CRM))) as (service, listener):
        async with calling(listener.where, tls) as line:
            assert await line.call("WHO") == GRC
            grid.authority.revoke(GRC, now=grid.now)
            crm.revoked.write_bytes(grid.authority.revoked_file.read_bytes())
            with pytest.raises(RefusedError, match="has been revoked"):
                await line.call("WHO")
        with pytest.raises(PeerUnreachableError) as refused:
            await dial(listener.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
        assert "has been revoked" in (refused.value.cause or "")
        assert service.asked == 1


async def test_a_revoked_answerer_is_asked_nothing_more(grid: Grid) -> None:
    grc = grid.enrol(GRC)
    async with (
        serving(grid.tls(CRM)) as (service, listener),
        calling(listener.where, Tls(grc.files(Role.GRC))) as line,
    ):
        assert await line.call("WHO") == GRC
        grid.authority.revoke(CRM, now=grid.now)
        grc.revoked.write_bytes(grid.authority.revoked_file.read_bytes())
        with pytest.raises(LineLostError) as lost:
            await line.call("WHO")
        assert lost.value.cause == f"the certificate of {CRM} has been revoked"
        assert service.asked == 1


async def test_a_line_whose_other_side_was_killed_is_closed_all_the_same(
    grid: Grid, monkeypatch: Any
) -> None:
    async def reset() -> None:
        raise ConnectionResetError

    async with serving(grid.tls(CRM)) as (_, listener):
        line = await dial(listener.where, nothing, name="the CRM", tls=grid.tls(GRC), expect=Role.CRM)
        monkeypatch.setattr(line._writer, "wait_closed", reset)
        line._writer.close()
        line._writer.close()
        await line.close()
        assert line.lost


async def test_one_caller_cannot_have_all_the_lines(grid: Grid, monkeypatch: Any) -> None:
    monkeypatch.setattr(reception, "EACH_LIMIT", 2)
    greedy, other = grid.tls(GRC), grid.tls("virtgrid://c/grc/grc")
    async with serving(grid.tls(CRM)) as (_, listener), contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(calling(listener.where, greedy))
        with pytest.raises(PeerUnreachableError) as refused:
            await dial(listener.where, nothing, name="the CRM", tls=greedy, expect=Role.CRM)
        assert f"{GRC} has 2 lines already" in (refused.value.cause or "")
        async with calling(listener.where, other) as line:
            assert await line.call("WHO") == "virtgrid://c/grc/grc"


async def test_a_renewed_certificate_is_used_without_a_restart(grid: Grid, log: Any) -> None:
    crm = grid.enrol(CRM, lifetime=timedelta(days=40))
    async with serving(Tls(crm.files(Role.CRM))) as (_, listener):

        async def serial() -> bytes:
            async with calling(listener.where, tls) as line:
                return line._writer.get_extra_info("peercert")["serialNumber"]

        tls = grid.tls(GRC)
        before = await serial()
        # Half of a pair is no reason to stop: the old one stays in use until both are there.
        crm.key(Role.CRM).rename(crm.directory / "aside")
        assert await serial() == before
        grid.enrol(CRM)
        assert await serial() != before
    assert [text for text in log.messages if "the certificates from before stay in use" in text]


async def test_a_clock_that_is_two_minutes_off_is_refused_by_both(grid: Grid, log: Any) -> None:
    wrong = FakeClock(grid.now + timedelta(minutes=2))
    tls = grid.tls(GRC)
    async with serving(grid.tls(CRM, clock=wrong)) as (service, listener):
        with pytest.raises(
            RefusedError, match=r"the clock of the CRM at tls://.* is 1[12]\d s ahead of ours"
        ):
            await dial(listener.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
        # And by the listener, of one who does not look at the time itself.
        assert isinstance(listener.where.place, HostPort)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", listener.where.place.port, ssl=tls.client_context()
        )
        line = Line(reader, writer, nothing, name="the CRM")
        with pytest.raises(RefusedError, match=r"behind ours; at most 10 s are borne"):
            await line.call("WHO")
        await line.close()
        assert service.asked == 0
    assert said(log, "is refused WHO: the clock of")


async def test_without_a_certificate_nobody_dials_or_listens_on_the_network() -> None:
    with pytest.raises(RefusedError, match="needs a certificate"):
        await dial(Endpoint(HostPort("127.0.0.1", 1)), nothing, name="x")
    with pytest.raises(RefusedError, match="needs a certificate"):
        await listen(HERE, nothing, name="x")


async def test_nobody_there_and_a_name_of_nobody_are_unreachable(grid: Grid) -> None:
    tls = grid.tls(GRC)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        where = Endpoint(HostPort("127.0.0.1", sock.getsockname()[1]))
        with pytest.raises(PeerUnreachableError, match="cannot be reached at tls://"):
            await dial(where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
    with pytest.raises(PeerUnreachableError, match="cannot be reached"):
        await dial(Endpoint.parse("tls://nobody.invalid:1"), nothing, name="x", tls=tls, expect=Role.CRM)


def test_a_key_others_may_read_is_not_used(grid: Grid) -> None:
    files = grid.enrol(CRM).files(Role.CRM)
    files.key.chmod(0o644)
    with pytest.raises(RefusedError, match="may be read by others"):
        Tls(files)


def test_a_key_of_another_certificate_is_told(grid: Grid) -> None:
    crm, grc = grid.enrol(CRM).files(Role.CRM), grid.enrol(GRC).files(Role.GRC)
    with pytest.raises(RefusedError, match="are no pair"):
        Tls(TlsFiles(certificate=crm.certificate, key=grc.key, trust=crm.trust))
