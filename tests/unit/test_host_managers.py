"""Network managers reach a host over the network: those it was told of, and only for segments."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from network_parts import standing
from wire_ends import until
from wire_grid import Grid

from virtgrid.core.errors import UsageError
from virtgrid.grid.doors import Network, told_of
from virtgrid.grid.messages.network import SEGMENTS, Orders
from virtgrid.grid.nrm.hosts import Teller
from virtgrid.grid.nrm.orders import Host, Topology, orders
from virtgrid.host.daemon import Virtgridd
from virtgrid.host.guests import Libvirt
from virtgrid.host.networks import Networks
from virtgrid.host.tenancies import Tenancies
from virtgrid.host.wanted import Wanted
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import deaf
from virtgrid.wire.message import RemoteError

NRM, HOST = "virtgrid://hub/nrm/net", "virtgrid://a/host/h1"


class Recorded:
    """A host without a network: what it is to have is written down."""

    def __init__(self) -> None:
        self.segments: set[int] = set()

    def establish(self, want: Wanted) -> dict[str, str]:
        self.segments |= {one.vni for one in want.segments}
        return {}


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "grid")


def _daemon(grid: Grid, tmp_path: Path, effects: Recorded) -> Virtgridd:
    return Virtgridd(
        where=Endpoint(tmp_path / "host"),
        keys=[seal.new_key().public_key()],
        bridge="br{tag}",
        libvirt=Libvirt("test:///nowhere", state=str(tmp_path)),
        tenancies=Tenancies(tmp_path / "tenancies"),
        networks=Networks(effects, directory=tmp_path / "networks"),
        orphan_s=60,
        notices=tmp_path / "notice",
        network=Network(where=Endpoint.parse("tls://127.0.0.1:0"), tls=grid.tls(HOST)),
        managers=frozenset({NRM}),
    )


def _teller(grid: Grid, daemon: Virtgridd, who: str, *, site: str = "a") -> tuple[Host, Teller]:
    host = Host(site=site, address="192.0.2.1", where=str(daemon.network))
    return host, Teller(host, name="a host", tls=grid.tls(who))


def _orders(host: Host) -> Orders:
    topology = Topology(links={("a", "b"): 10**8}, hosts=(host,), networks={})
    return orders("net", topology, [standing()])[host]


async def test_a_manager_it_was_told_of_tells_it_over_tls(grid: Grid, tmp_path: Path) -> None:
    effects = Recorded()
    async with _daemon(grid, tmp_path, effects) as daemon:
        host, teller = _teller(grid, daemon, NRM)
        try:
            teller.say(_orders(host))
            await asyncio.wait_for(teller.told(), 20)
            await until(lambda: effects.segments == {1000})
            assert not teller.silent
        finally:
            await teller.close()


@pytest.mark.parametrize(
    ("who", "site"),
    [("virtgrid://hub/nrm/another", "a"), ("virtgrid://a/grc/grc", "a"), (NRM, "b")],
    ids=["another manager", "no manager", "the host of another site"],
)
async def test_others_are_not_heard(grid: Grid, tmp_path: Path, who: str, site: str) -> None:
    effects = Recorded()
    async with _daemon(grid, tmp_path, effects) as daemon:
        host, teller = _teller(grid, daemon, who, site=site)
        try:
            teller.say(_orders(host))
            await until(lambda: teller.silent)
            assert effects.segments == set()
        finally:
            await teller.close()


async def test_over_the_network_there_is_nothing_but_segments(grid: Grid, tmp_path: Path) -> None:
    async with _daemon(grid, tmp_path, Recorded()) as daemon:
        assert daemon.network is not None
        line = await dial(daemon.network, deaf, name="a host", tls=grid.tls(NRM), expect=Role.HOST)
        try:
            with pytest.raises(RemoteError, match="no method"):
                await line.call("look", {})
            with pytest.raises(RemoteError):
                await line.call(SEGMENTS, {"segments": "all of them"})
        finally:
            await line.close()


def test_who_is_heard_must_be_a_network_manager() -> None:
    assert told_of(NRM, Role.NRM) == NRM
    with pytest.raises(UsageError, match="--nrm: virtgrid://b/grc/grc is a grc"):
        told_of("virtgrid://b/grc/grc", Role.NRM)
