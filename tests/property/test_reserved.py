"""Whatever a host has and whatever it is told, the steps lead there, also when they are cut short."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtgrid.grid.messages.network import Ordered, Orders, Reach
from virtgrid.host.wanted import next_change_s, wanted
from virtgrid.net import guarantee, reserved
from virtgrid.net.guarantee import (
    AddFilter,
    Change,
    Class,
    DropClass,
    DropFilter,
    Fell,
    Flow,
    Match,
    Plant,
    SetClass,
    Share,
    Tree,
)
from virtgrid.net.link import Link, Tunnel
from virtgrid.net.reserved import (
    AddPeer,
    DropPeer,
    Join,
    MakeBridge,
    MakeTunnel,
    Present,
    Remove,
    Reserved,
    Step,
)

SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PEERS = ("192.0.2.1", "192.0.2.2", "192.0.2.3")

# -- guarantees ----------------------------------------------------------------------------------


class Discipline:
    """The kernel's tree: what it refuses is an error here."""

    def __init__(self) -> None:
        self.planted = False
        self.classes: dict[int, Class] = {}
        self.filters: dict[Match, int] = {}

    @property
    def tree(self) -> Tree | None:
        return Tree(classes=dict(self.classes), filters=dict(self.filters)) if self.planted else None

    def take(self, change: Change) -> None:
        match change:
            case Plant():
                assert not self.planted
                self.planted = True
            case Fell():
                assert self.planted
                self.planted, self.classes, self.filters = False, {}, {}
            case SetClass(minor, to):
                assert self.planted
                assert to.parent in (0, *self.classes)
                assert minor not in self.classes or self.classes[minor].parent == to.parent
                assert 0 < minor < 0xFFFF
                self.classes[minor] = to
            case DropClass(minor):
                assert minor not in self.filters.values(), "a class that a filter leads to is busy"
                assert all(one.parent != minor for one in self.classes.values())
                del self.classes[minor]
            case AddFilter(match, minor):
                assert match not in self.filters
                assert minor in self.classes
                self.filters[match] = minor
            case DropFilter(match):
                del self.filters[match]

    def require_no_more_than_there_is(self) -> None:
        for minor, link in self.classes.items():
            if not link.leaf:
                rates = [one.rate_bytes_s for one in self.classes.values() if one.parent == minor]
                assert sum(rates) <= link.rate_bytes_s + max(1, link.rate_bytes_s // 100)


def _flows(rate: int, first: int = 1) -> st.SearchStrategy[tuple[Flow, ...]]:
    """Of different numbers, and together no more than what may be promised."""
    flow = st.tuples(
        st.integers(first, first + 5), st.sets(st.sampled_from(PEERS), min_size=1), st.integers(1, rate // 4)
    )
    return st.lists(flow, max_size=3, unique_by=lambda one: one[0]).map(
        lambda found: tuple(Flow(vni=v, peers=tuple(sorted(p)), rate_bytes_s=r) for v, p, r in found)
    )


@st.composite
def _shares(draw: st.DrawFn) -> list[Share]:
    shares = []
    for number in range(draw(st.integers(0, 2))):
        rate = draw(st.sampled_from([1000, 10_000]))
        networks = (f"10.{number}.0.0/16", draw(st.sampled_from(["192.0.2.1/32", "fd00::/64"])))
        shares.append(Share(rate_bytes_s=rate, networks=networks, flows=draw(_flows(rate, 10 * number + 1))))
    return shares


def _rates(tree: Tree | None) -> dict[Match, int]:
    if tree is None:
        return {}
    return {m: tree.classes[c].rate_bytes_s for m, c in tree.filters.items() if m.rank == 10}


@SETTINGS
@given(st.lists(st.tuples(_shares(), st.integers(0, 40)), min_size=1, max_size=4))
def test_every_flow_has_its_rate_and_nobody_is_promised_too_much(
    told: list[tuple[list[Share], int]],
) -> None:
    kernel = Discipline()
    for shares, until in told:
        for cut in (until, None):  # killed after some steps; then looked at, and planned again
            steps = guarantee.plan(shares, kernel.tree)
            for step in steps[:cut]:
                kernel.take(step)
                kernel.require_no_more_than_there_is()
        assert guarantee.plan(shares, kernel.tree) == ()
        wanted_rates = {
            match: flow.rate_bytes_s for share in shares for flow in share.flows for match in flow.matches
        }
        assert _rates(kernel.tree) == wanted_rates


@SETTINGS
@given(_flows(1000), _flows(1000))
def test_a_flow_that_stays_is_never_without_its_class(
    before: tuple[Flow, ...], after: tuple[Flow, ...]
) -> None:
    share = Share(rate_bytes_s=1000, networks=("10.0.0.0/16",))
    kernel = Discipline()
    for step in guarantee.plan([replace(share, flows=before)], None):
        kernel.take(step)
    stays = {match for flow in before for match in flow.matches if flow.matches in {f.matches for f in after}}
    least = {match: min(f.rate_bytes_s for f in (*before, *after) if match in f.matches) for match in stays}
    for step in guarantee.plan([replace(share, flows=after)], kernel.tree):
        kernel.take(step)
        rates = _rates(kernel.tree)
        assert all(rates[match] >= least[match] for match in stays)


# -- segments ------------------------------------------------------------------------------------


class Machine:
    """A kernel's interfaces."""

    def __init__(self, strange: dict[str, Link]) -> None:
        self.links = dict(strange)
        self.peers: dict[str, set[str]] = {}
        self.next = 100

    @property
    def present(self) -> Present:
        return Present(
            links=tuple(self.links.values()),
            peers={name: frozenset(peers) for name, peers in self.peers.items()},
        )

    def add(self, name: str, kind: str, one: Reserved, tunnel: Tunnel | None = None) -> None:
        assert name not in self.links
        taken = [link for link in self.links.values() if tunnel and link.tunnel]
        assert all(link.tunnel.vni != tunnel.vni for link in taken if link.tunnel and tunnel)
        self.next += 1
        self.links[name] = _link(name, kind, index=self.next, alias=one.note, mtu=one.mtu, tunnel=tunnel)

    def take(self, step: Step) -> None:
        match step:
            case Remove(name):
                gone = self.links.pop(name)
                self.peers.pop(name, None)
                for other, link in self.links.items():
                    if link.master == gone.index:
                        self.links[other] = replace(link, master=None)
            case MakeBridge(one):
                self.add(one.bridge, "bridge", one)
            case MakeTunnel(one):
                self.add(one.port, "vxlan", one, Tunnel(vni=one.vni, local=one.local, remote=None))
                self.peers[one.port] = set()
            case AddPeer(one, address):
                self.peers[one.port].add(address)
            case DropPeer(one, address):
                self.peers[one.port].remove(address)
            case Join(one):
                bridge, port = self.links[one.bridge], self.links[one.port]
                self.links[one.port] = replace(port, master=bridge.index, up=True)
                self.links[one.bridge] = replace(bridge, up=True)

    def require_isolation(self) -> None:
        """A tunnel is in no bridge but that of its own reservation."""
        bridges = {link.index: link for link in self.links.values()}
        for link in self.links.values():
            if link.tunnel is not None and link.master is not None:
                assert bridges[link.master].alias == link.alias


def _link(name: str, kind: str, *, index: int = 1, alias: str = "", mtu: int = 1450,
          tunnel: Tunnel | None = None) -> Link:  # fmt: skip
    return Link(
        index=index, name=name, kind=kind, mac="", mtu=mtu, master=None, up=False, rx_packets=0, alias=alias,
        tunnel=tunnel,
    )  # fmt: skip


_reserved = st.builds(
    lambda vni, id_, peers, mtu: Reserved(
        id=id_, name="r", vni=vni, bridge=f"br{vni}", local="192.0.2.9", peers=frozenset(peers), mtu=mtu
    ),
    st.integers(1, 4),
    st.sampled_from(["one", "two"]),
    st.sets(st.sampled_from(PEERS), max_size=3),
    st.sampled_from([1400, 1450]),
)
_sets = st.lists(_reserved, max_size=4, unique_by=lambda one: one.vni)
_strange = st.sets(st.sampled_from(["br1", "vgx2", "br3", "eth0", "vxlan4"])).map(
    lambda names: {
        name: _link(
            name,
            "vxlan" if name == "vxlan4" else "bridge",
            index=number,
            alias="an administrator's",
            tunnel=Tunnel(vni=4, local=None, remote=None) if name == "vxlan4" else None,
        )
        for number, name in enumerate(sorted(names), start=1)
    }
)


@SETTINGS
@given(_strange, st.lists(st.tuples(_sets, st.integers(0, 20)), min_size=1, max_size=4))
def test_the_segments_that_can_be_are_there_and_nothing_else_is_touched(
    strange: dict[str, Link], told: list[tuple[list[Reserved], int]]
) -> None:
    machine = Machine(strange)
    for segments, until in told:
        for cut in (until, None):
            plan = reserved.plan(segments, machine.present)
            for step in plan.steps[:cut]:
                machine.take(step)
                machine.require_isolation()
        again = reserved.plan(segments, machine.present)
        assert again.steps == ()
        assert {name: machine.links[name] for name in strange} == strange
        good = {
            one.vni: one for one in segments if one.id not in again.problems or one.vni not in _hit(strange)
        }
        made = {name for name in machine.links if name not in strange}
        assert made == {name for one in good.values() for name in (one.bridge, one.port)}
        for one in good.values():
            bridge, port = machine.links[one.bridge], machine.links[one.port]
            assert (bridge.alias, port.alias, port.master) == (one.note, one.note, bridge.index)
            assert machine.peers[one.port] == one.peers
            assert bridge.up
            assert port.up


def _hit(strange: dict[str, Link]) -> set[int]:
    """Numbers that strangers stand in the way of."""
    return {int(name[-1]) for name in strange if name != "eth0"}


def test_what_was_being_made_when_we_were_killed_is_removed() -> None:
    half = _link("vgb7", "bridge"), _link("vgx7", "vxlan", tunnel=Tunnel(vni=7, local=None, remote=None))
    plan = reserved.plan([], Present(links=half, peers={}))
    assert set(plan.steps) == {Remove("vgb7"), Remove("vgx7")}
    administrators = _link("vgb7", "bridge", alias="mine")
    assert reserved.plan([], Present(links=(administrators,), peers={})).steps == ()


# -- what should be when -------------------------------------------------------------------------

_ordered = st.builds(
    lambda id_, segment, begins, lasts, rate: Ordered(
        id=f"id-{id_:06d}",
        reservation="r",
        segment=segment,
        begins_at_s=begins,
        ends_at_s=begins + lasts,
        mtu=1450,
        sites=("a", "b"),
        rates={} if rate is None else {"b": rate},
    ),
    st.integers(0, 50),
    st.integers(1, 3),
    st.integers(0, 20),
    st.integers(1, 20),
    st.none() | st.integers(1, 9),
)
_orders = st.lists(_ordered, max_size=5, unique_by=lambda one: one.id).map(
    lambda found: Orders(
        network="net",
        site="a",
        address="192.0.2.1",
        hosts={"a": ("192.0.2.1", "192.0.2.3"), "b": ("192.0.2.2",)},
        reach={"b": Reach(rate_bytes_s=100, networks=("10.2.0.0/16",))},
        segments=tuple(found),
    )
)


@SETTINGS
@given(_orders, st.floats(0, 45))
def test_a_segment_is_there_until_its_window_ends_and_its_rate_within_it(
    orders: Orders, now_s: float
) -> None:
    want = wanted([orders], now_s, bridge="br{tag}")
    by_id = {one.id: one for one in orders.segments}
    chosen = [by_id[one.id] for one in want.segments]
    assert len({one.segment for one in chosen}) == len(chosen), "one of each number"
    assert all(now_s < one.ends_at_s for one in chosen)
    for one in orders.segments:
        if now_s < one.ends_at_s and one not in chosen:
            rival = next(other for other in chosen if other.segment == one.segment)
            assert rival.begins_at_s <= one.begins_at_s
    rates = {flow.vni: flow.rate_bytes_s for flow in want.ways["net", "b"].flows}
    assert rates == {one.segment: one.rates["b"] for one in chosen if one.rates and one.begins_at_s <= now_s}
    assert all(one.peers == {"192.0.2.2", "192.0.2.3"} for one in want.segments), "all hosts but this one"
    # Between now and the next change it stays as it is.
    change_s = next_change_s([orders], now_s)
    later_s = now_s + 1000 if change_s is None else (now_s + change_s) / 2
    later = wanted([orders], later_s, bridge="br{tag}")
    assert (later.segments, later.ways) == (want.segments, want.ways)
