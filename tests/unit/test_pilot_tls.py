"""A pilot that dials its CRM over TLS: its ticket is its certificate, good once and for itself."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_host import INIT, Bench
from tests.wire_ends import nothing
from tests.wire_grid import CRM, Grid
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import PeerUnreachableError, RefusedError
from virtgrid.grid.claims import Claims
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.node import Init, State
from virtgrid.grid.node import uplink
from virtgrid.grid.node.uplink import Uplink
from virtgrid.grid.pilots import Pilots
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint, HostPort, dial
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.signing import key_pem, new_key, pem
from virtgrid.wire.tls import Tls, TlsFiles

KEY = seal.new_key()


class Site:
    """A CRM that listens on the loopback, and pilots with tickets of its."""

    def __init__(self, directory: Path, **crm: Any) -> None:
        self.directory, self.grid = directory, Grid(directory / "grid")
        self.trust = self.grid.enrol(CRM)
        self.tls = Tls(
            self.trust.files(Role.CRM), pilots=tickets.issuer(KEY, "a").certificate, clock=crm.get("clock")
        )
        self.pilots = self.crm()

    def crm(self) -> Pilots:
        """A CRM process, or the next one after its death."""
        return Pilots(
            Endpoint(HostPort("127.0.0.1", 0)), [KEY.public_key()], tls=self.tls,
            claims=Claims(self.directory / "claims"),
        )  # fmt: skip

    def bench(self, name: str, **ticket: Any) -> Bench:
        now_s = time.time()
        window = {"begins_at_s": now_s - 10, "ends_at_s": now_s + 600}
        return Bench(self.directory / name, **{"sandbox": name, **window, **ticket})

    def file(self, bench: Bench, *, key: Any = KEY, site: str = "a", ago: float = 0) -> Path:
        path = self.directory / f"{bench.ticket.sandbox}-{len(list(self.directory.iterdir()))}.ticket"
        now = datetime.now(UTC) - timedelta(seconds=ago)
        seal.write_private(path, tickets.issue_file(bench.ticket, key, site=site, now=now))
        return path

    def pilot_tls(self, file: Path) -> Tls:
        return Tls(TlsFiles(certificate=file, key=file, trust=self.trust.trust))

    def uplink(self, bench: Bench, file: Path, *, text: str | None = None) -> Uplink:
        said = text or tickets.read(file)[0]
        return Uplink(bench.manager, self.pilots.where, said, tls=self.pilot_tls(file))


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(uplink, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(uplink, "_LONGEST_WAIT_S", 0.005)
    made = Site(tmp_path)
    async with made.pilots:
        yield made


async def ended(site: Site, bench: Bench, link: Uplink) -> str:
    """Why the CRM did not want this pilot."""
    async with asyncio.timeout(20):
        assert not await link.run()
    assert bench.manager.state is State.DONE
    await bench.manager.close()
    return str(bench.told("state")[0]["reason"])


async def test_a_whole_life_over_tls(site: Site) -> None:
    bench = site.bench("n1")
    link = asyncio.create_task(site.uplink(bench, site.file(bench)).run())
    pilot = await site.pilots.pilot("n1")
    await pilot.init(Init(**INIT))
    await pilot.until(State.HOST_READY)
    await pilot.shut_down()
    await pilot.until(State.DONE)
    assert await asyncio.wait_for(link, 20)
    await bench.manager.close()


async def test_a_used_ticket_is_good_for_nobody_else_even_after_the_crm_died(site: Site) -> None:
    bench = site.bench("n1")
    file = site.file(bench)
    link = asyncio.create_task(site.uplink(bench, file).run())
    await site.pilots.pilot("n1")
    thief = Bench(site.directory / "thief", sandbox="n1", **_window(bench))
    assert "used by another pilot" in await ended(site, thief, site.uplink(thief, file))
    link.cancel()
    await asyncio.gather(link, return_exceptions=True)
    async with site.crm() as reborn:
        thief = Bench(site.directory / "thief2", sandbox="n1", **_window(bench))
        again = Uplink(thief.manager, reborn.where, tickets.read(file)[0], tls=site.pilot_tls(file))
        assert "used by another pilot" in await ended(site, thief, again)
        # Its own pilot goes on.
        own = Uplink(bench.manager, reborn.where, tickets.read(file)[0], tls=site.pilot_tls(file))
        link = asyncio.create_task(own.run())
        pilot = await reborn.pilot("n1")
        await pilot.shut_down()
        assert await asyncio.wait_for(link, 20)
    await bench.manager.close()


def _window(bench: Bench) -> dict[str, float]:
    return {"begins_at_s": bench.ticket.begins_at_s, "ends_at_s": bench.ticket.ends_at_s}


async def test_a_ticket_of_another_pilot_is_refused(site: Site) -> None:
    other, bench = site.bench("n2"), site.bench("n1")
    stolen = tickets.read(site.file(other))[0]
    link = site.uplink(bench, site.file(bench), text=stolen)
    assert "is of the pilot n2, and virtgrid://a/pilot/n1 brings it" in await ended(site, bench, link)


async def test_an_expired_ticket_is_refused(site: Site) -> None:
    now_s = time.time()
    bench = site.bench("n1", begins_at_s=now_s - 100, ends_at_s=now_s - 50)
    link = site.uplink(bench, site.file(bench, ago=100))
    assert "has ended" in await ended(site, bench, link)


async def test_a_forged_ticket_does_not_get_as_far_as_a_word(site: Site) -> None:
    bench = site.bench("n1")
    with pytest.raises(PeerUnreachableError, match="does not let us in"):
        await _dial(site, site.file(bench, key=seal.new_key()))


async def test_a_pilot_of_another_site_is_refused(site: Site) -> None:
    bench = site.bench("n1")
    link = site.uplink(bench, site.file(bench, site="b"))
    async with asyncio.timeout(20):
        with pytest.raises(PeerUnreachableError):
            await link._one_line()
    await bench.manager.close()


async def test_the_program_itself_dials_with_nothing_but_its_ticket_s_file(site: Site) -> None:
    bench = site.bench("n1")
    words = [
        "serve", "node", "--crm", str(site.pilots.where), "--ticket", str(site.file(bench)),
        "--directory", str(site.directory / "state"), "--host", f"unix:{site.directory}/no-host",
        "--pki", str(site.trust.directory),
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "virtgrid.cli.main", *words)
    try:
        pilot = await site.pilots.pilot("n1")
        assert (await pilot.get_status()).state is State.INITIAL
    finally:
        process.kill()
        await process.wait()


async def _dial(site: Site, file: Path) -> None:
    await dial(site.pilots.where, nothing, name="the CRM", tls=site.pilot_tls(file), expect=Role.CRM)


async def test_the_tickets_key_vouches_for_pilots_only(site: Site) -> None:
    """A CRM whose key was stolen cannot make coordinators of other sites believe in a GRC."""
    signer = tickets.issuer(KEY, "a")
    own, now = new_key(), datetime.now(UTC)
    who = Identity(role=Role.GRC, site="a", name="king")
    made = signer.identify(own.public_key(), who, ["127.0.0.1"], now=now, until=now + timedelta(hours=1))
    file = site.directory / "king.pem"
    seal.write_private(file, pem(made).decode() + key_pem(own).decode())
    with pytest.raises(PeerUnreachableError) as refused:
        await _dial(site, file)
    assert "cannot vouch for a grc" in (refused.value.cause or "")


async def test_other_members_of_the_grid_are_no_pilots(site: Site) -> None:
    tls = site.grid.tls("virtgrid://a/host/n1")
    line = await dial(site.pilots.where, nothing, name="the CRM", tls=tls, expect=Role.CRM)
    with pytest.raises(RefusedError, match="may not ask HELLO"):
        await line.call("HELLO", {})
    await line.close()


async def test_a_pilot_whose_clock_is_wrong_shuts_down_and_says_why(tmp_path: Path) -> None:
    site = Site(tmp_path, clock=FakeClock(datetime.now(UTC) - timedelta(minutes=2)))
    async with site.pilots:
        bench = site.bench("n1")
        assert "behind ours" in await ended(site, bench, site.uplink(bench, site.file(bench)))


def test_claims_outlive_their_holder_and_old_ones_go(tmp_path: Path) -> None:
    now_s = time.time()
    ticket = Bench(tmp_path / "p", begins_at_s=now_s - 10, ends_at_s=now_s + 10).ticket
    Claims(tmp_path / "c").claim(ticket, "session-1")
    Claims(tmp_path / "c").claim(ticket, "session-1")
    with pytest.raises(RefusedError, match="another pilot"):
        Claims(tmp_path / "c").claim(ticket, "session-2")
    old = Bench(tmp_path / "q", id="ticket-0002", begins_at_s=1.0, ends_at_s=2.0).ticket
    Claims(tmp_path / "c").claim(old, "session-3")
    Claims(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [ticket.id]
