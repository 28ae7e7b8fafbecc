"""From a promise to what a host is told, and what the host keeps of it: rates, restarts, rubbish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from network_parts import standing
from wire_ends import listening, until

from virtgrid.core.errors import UsageError, VirtgridError
from virtgrid.grid.messages.coalloc import Hold, Paths, Window
from virtgrid.grid.messages.coalloc import Path as Way
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.network import SEGMENTS, Orders, bridge_of
from virtgrid.grid.nrm.hosts import Teller
from virtgrid.grid.nrm.orders import Host, Topology, orders, parse_host, parse_networks
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.store import units
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises
from virtgrid.host.networks import Networks
from virtgrid.host.wanted import Wanted
from virtgrid.wire.message import BadMessageError

A = Host(site="a", address="192.0.2.1", where="unix:/run/a")
B1 = Host(site="b", address="198.51.100.1", where="unix:/run/b1")
B2 = Host(site="b", address="198.51.100.2", where="unix:/run/b2")
C = Host(site="c", address="203.0.113.1", where="unix:/run/c")
WIRE = 125_000_000
TOPOLOGY = Topology(
    links={("a", "b"): WIRE, ("a", "c"): WIRE // 10}, hosts=(A, B1, B2, C), networks={"b": ("10.7.0.0/16",)}
)


def test_hosts_of_the_sites_have_the_segment_and_others_have_nothing() -> None:
    told = orders("net", TOPOLOGY, [standing()])
    assert [len(told[host].segments) for host in (A, B1, B2, C)] == [1, 1, 1, 0]
    (one,) = told[A].segments
    assert (one.segment, one.mtu, one.sites) == (1000, 1450, ("a", "b"))
    assert one.id not in standing().key, "what gives a promise back stays between who made it and us"
    assert told[A].hosts["b"] == (B1.address, B2.address)
    assert told[A].reach["b"].networks == ("10.7.0.0/16", "198.51.100.1/32", "198.51.100.2/32")
    for order in told.values():  # what is said can be heard
        assert parse(Orders, SEGMENTS, order.model_dump(mode="json")) == order


def test_a_promise_is_payload_and_its_guarantee_has_what_is_around_it() -> None:
    told = orders("net", TOPOLOGY, [standing()])
    # A full packet: 1398 bytes of payload, 52 of IP and TCP, 50 of VXLAN, 38 of Ethernet.
    assert told[A].segments[0].rates == {"b": 1_538_000}
    assert told[B1].segments[0].rates == {"a": 769_000}, "each of a site's hosts has its part"
    assert told[B1].reach["a"].rate_bytes_s == told[A].reach["b"].rate_bytes_s // 2


@pytest.mark.parametrize("mtu", [1500, 9000])
@pytest.mark.parametrize("wire", [1000, WIRE, 12_500_000_000])
def test_what_may_be_promised_of_a_link_fits_on_it(wire: int, mtu: int) -> None:
    topology = Topology(links={("a", "b"): wire}, hosts=(A, B1), path_mtu=mtu)
    most = topology.promised()["a", "b"]
    share = orders("net", topology, [])[A].reach["b"].rate_bytes_s
    assert topology.on_wire(most) <= share - share // 100
    assert most > 0.85 * wire
    assert Topology(links={("a", "b"): wire}).promised() == {("a", "b"): wire}, "a mere table promises all"


def test_tunnels_over_ipv6_leave_less() -> None:
    hosts = tuple(Host(site=s, address=f"2001:db8::{s}", where=f"unix:/run/{s}") for s in ("a", "b"))
    assert Topology(links={}, hosts=hosts).mtu == 1430


@pytest.mark.parametrize(
    "text",
    ["alpha", "alpha=", "alpha=192.0.2.1", "alpha=192.0.2.1@/run/x", "alpha=localhost@unix:/x",
     "=192.0.2.1@unix:/x", "alpha=127.0.0.1@unix:/x", "alpha=0.0.0.0@unix:/x", "alpha=224.0.0.1@unix:/x"],
)  # fmt: skip
def test_a_host_is_a_site_an_address_and_a_place(text: str) -> None:
    with pytest.raises(UsageError):
        parse_host(text)


def test_a_network_of_people_is_checked_as_a_whole() -> None:
    assert parse_networks(["a=10.0.0.0/8", "a=fd00::/64"]) == {"a": ("10.0.0.0/8", "fd00::/64")}
    for texts in (["a=10.0.0.1/8"], ["a"], ["A=10.0.0.0/8"]):
        with pytest.raises(UsageError):
            parse_networks(texts)
    for what, says in (
        ({"hosts": (A, A)}, "twice"),
        ({"hosts": (A,), "networks": {"b": ("10.0.0.0/8",)}}, "no --host"),
        ({"path_mtu": 100}, "--mtu"),
        ({"links": {("a", "b"): 10**13}}, "8000gbit"),
        ({"hosts": (A, Host(site="b", address="2001:db8::1", where="unix:/x"))}, "IPv6"),
    ):
        with pytest.raises(UsageError, match=says):
            Topology(**{"links": {}, **what})  # type: ignore[arg-type]


# -- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"address": "192.0.2.9"}, "not among the hosts"),
        ({"address": "not one"}, "address"),
        ({"hosts": {"a": ["192.0.2.1"]}}, "of which no host is told"),
        ({"reach": {}}, "there is no link"),
        ({"segments": [{}]}, "missing"),
        ({"segments": "twice"}, "the same id"),
        ({"network": "../../etc"}, "network"),
    ],
)
def test_orders_that_do_not_fit_together_are_refused(changes: dict[str, Any], why: str) -> None:
    said = orders("net", TOPOLOGY, [standing()])[A].model_dump(mode="json")
    if changes.get("segments") == "twice":
        changes = {"segments": said["segments"] * 2}
    with pytest.raises(BadMessageError, match=why):
        parse(Orders, SEGMENTS, {**said, **changes})


def test_a_bridge_is_called_after_its_segment() -> None:
    assert bridge_of(1000) == "br1000"
    assert bridge_of(16_777_215, "x{tag}") == "x16777215"


# -- the host ------------------------------------------------------------------------------------


class Recording:
    """A host that does everything at once, and remembers what it was to have."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []
        self.problems: dict[str, str] = {}
        self.broken = False

    def establish(self, want: Wanted) -> dict[str, str]:
        if self.broken:
            raise VirtgridError("the kernel is gone")
        self.wanted.append(want)
        return self.problems

    def last(self) -> list[int]:
        return [one.vni for one in self.wanted[-1].segments]


async def test_what_was_said_survives_and_half_a_file_is_none(tmp_path: Path) -> None:
    said = orders("net", TOPOLOGY, [standing()])[A]
    effects = Recording()
    async with Networks(effects, directory=tmp_path) as networks:
        assert (await networks.told(said)).problems == {}
        assert effects.last() == [1000]
        count = len(effects.wanted)
        await networks.told(said)
        assert len(effects.wanted) == count, "the same again is done already"
    after = Recording()
    async with Networks(after, directory=tmp_path):
        await until(lambda: bool(after.wanted))
        assert after.last() == [1000], "put back without anybody saying it"
    (tmp_path / "net.json").write_text('{"network": "net"')
    torn = Recording()
    async with Networks(torn, directory=tmp_path) as networks:
        await until(lambda: bool(torn.wanted))
        assert torn.last() == []
        await networks.told(said)
        assert torn.last() == [1000]


async def test_managers_do_not_undo_each_other(tmp_path: Path) -> None:
    effects = Recording()
    one = orders("one", TOPOLOGY, [standing()])[A]
    other = orders("two", TOPOLOGY, [standing("another-hold", segment=2000)])[A]
    clash = orders("two", TOPOLOGY, [standing("another-hold")])[A]
    async with Networks(effects, directory=tmp_path) as networks:
        await networks.told(one)
        await networks.told(other)
        assert effects.last() == [1000, 2000]
        await networks.told(clash)
        assert effects.last() == [1000]
        assert list(effects.wanted[-1].problems) == [clash.segments[0].id], "and who came later is told"


async def test_a_host_with_one_bridge_for_everybody_isolates_nobody_and_says_so(tmp_path: Path) -> None:
    said = orders("net", TOPOLOGY, [standing()])[A]
    effects = Recording()
    async with Networks(effects, bridge="br0", directory=tmp_path) as networks:
        await networks.told(said)
    assert effects.last() == []
    assert "one bridge for all" in effects.wanted[-1].problems[said.segments[0].id]


async def test_a_host_that_fails_tells_and_tries_again(tmp_path: Path) -> None:
    said = orders("net", TOPOLOGY, [standing()])[A]
    effects = Recording()
    effects.problems = {said.segments[0].id: "there is no room", "somebody-elses": "neither"}
    async with Networks(effects, directory=tmp_path) as networks:
        assert (await networks.told(said)).problems == {said.segments[0].id: "there is no room"}
        effects.broken = True
        with pytest.raises(VirtgridError, match="the kernel is gone"):
            await networks.told(orders("net", TOPOLOGY, [])[A])
        effects.broken = False
        await networks.told(orders("net", TOPOLOGY, [])[A])
        assert effects.last() == [], "what failed counts as not yet done"


# -- the manager's end ---------------------------------------------------------------------------


@asynccontextmanager
async def _teller(path: Path) -> AsyncIterator[Teller]:
    made = Teller(Host(site="a", address="192.0.2.1", where=f"unix:{path}"), name="a host")
    try:
        yield made
    finally:
        await made.close()


async def test_a_host_is_told_when_it_comes_back_and_only_the_last(tmp_path: Path) -> None:
    heard: list[list[int]] = []

    async def hear(line: object, method: str, params: Any) -> Any:
        heard.append([one["segment"] for one in params["segments"]])
        return {"problems": {}}

    async with _teller(tmp_path / "host") as teller:
        teller.say(orders("net", TOPOLOGY, [standing()])[A])
        await until(lambda: teller.silent)
        teller.say(orders("net", TOPOLOGY, [standing(segment=7)])[A])
        async with listening(tmp_path / "host", hear):
            await asyncio.wait_for(teller.told(), 20)
            assert heard == [[7]]
            assert not teller.silent
            teller.say(orders("net", TOPOLOGY, [])[A])
            await asyncio.wait_for(teller.told(), 20)
            assert heard == [[7], []]
        async with listening(tmp_path / "host", hear):  # restarted: nobody knows what it remembers
            await until(lambda: len(heard) == 3, timeout_s=20)
            assert heard[-1] == []


async def test_a_host_that_answers_nonsense_harms_nobody(tmp_path: Path) -> None:
    answers: list[Any] = [7, {"problems": {"x": 7}}, {"problems": {}}]

    async def hear(line: object, method: str, params: Any) -> Any:
        return answers.pop(0)

    async with listening(tmp_path / "host", hear), _teller(tmp_path / "host") as teller:
        teller.say(orders("net", TOPOLOGY, [])[A])
        await asyncio.wait_for(teller.told(), 20)
        assert answers == []


# -- which promises there are to be kept now -----------------------------------------------------


@pytest.fixture
def promises(tmp_path: Path) -> Iterator[Promises]:
    stock = NetworkStock(links={("a", "b"): 1000}, segments=(1, 2))
    with Database(tmp_path / "net.db") as database:
        with database.write() as connection:
            stock.prepare(connection)
        yield Promises(database, "net", stock)


NOW_S = 1_800_000_000


def _promise(promises: Promises, key: str, begins: int, ends: int, *, commit: bool = True) -> int | None:
    """The segment; begins and ends are seconds from now."""
    asked = Hold(
        key=key,
        reservation="r",
        window=Window(begins_at_s=NOW_S + begins, ends_at_s=NOW_S + ends),
        ttl_s=30,
        asked_at_s=NOW_S,
        wanted=Paths(sites=("a", "b"), paths=(Way(between=("a", "b"), rate_bytes_s=10),)),
    )
    standing = promises.hold(asked, owner="me", now_s=NOW_S).standing
    assert standing is not None
    if commit:
        promises.commit(key, owner="me", now_s=NOW_S)
    return standing.grant.segment


def test_what_is_committed_and_open_now_or_soon_is_at_work(promises: Promises) -> None:
    for key, begins, ends in (("open-now", 0, 100), ("opens-soon", 250, 300), ("opens-later", 1000, 2000)):
        _promise(promises, key, begins, ends)
    _promise(promises, "only-held", 0, 50, commit=False)

    def at_work(now_s: int) -> list[str]:
        found = promises.committed(units.SEGMENT, until_s=now_s + 60, now_s=now_s)
        assert all(one.grant.sites == ("a", "b") and one.grant.paths for one in found)
        return [one.key for one in found]

    assert at_work(NOW_S) == ["open-now"]
    assert at_work(NOW_S + 200) == ["opens-soon"], "what has ended counts no more, swept or not"
    promises.release("opens-soon", owner="me", now_s=NOW_S)
    assert at_work(NOW_S + 250) == []
    assert at_work(NOW_S + 940) == ["opens-later"]


def test_a_segment_rests_between_two_reservations_while_there_are_others(promises: Promises) -> None:
    assert _promise(promises, "the-first", 0, 100) == 1
    assert _promise(promises, "right-after", 100, 200) == 2, "1 is free, but was just somebody's"
    assert _promise(promises, "long-after", 300, 400) == 1
    assert _promise(promises, "at-a-pinch", 200, 300) == 1, "no other is free at all that has rested"
