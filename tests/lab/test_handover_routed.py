"""A guest's old address handed over by routing: connections go on, new ones work, nothing is left of it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from migrating import until
from pair import BRIDGE, GUEST, Pair, Tap, at, send

from virtgrid.net import flip, handover, netns
from virtgrid.net.flip import Way
from virtgrid.net.forwarding import Entry, set_entry
from virtgrid.net.link import Links, Tunnel
from virtgrid.net.tap import open_tap

pytestmark = pytest.mark.lab

TUNNEL = "vgh2"
ADDRESSES = ("10.78.0.20", "fd78::20")
ROUTER_MAC = "02:00:00:00:00:fe"
CLIENT = ("10.79.0.9", "fd79::9")
BIG = 3_000_000


class Guest:
    """A network stack behind a tap of one host at a time; nothing is carried while it is stopped."""

    def __init__(self, namespace: str, tap: Tap) -> None:
        self.namespace = namespace
        self._inside = open_tap(namespace, "eth0", offload=False)
        self._outside = tap.end
        self._ended = threading.Event()
        self._runs = threading.Event()
        self._runs.set()
        self._idle = threading.Event()
        with Links(namespace) as links:
            links.up("lo")
            links.up("eth0", mtu=1500, mac=GUEST)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        while not self._ended.is_set():
            if not self._runs.is_set():
                self._idle.set()
                self._runs.wait(0.05)
                continue
            inside, outside = self._inside, self._outside
            for end in select.select([inside, outside], [], [], 0.05)[0]:
                try:
                    if end == inside:
                        os.write(outside, os.read(inside, 70000)[10:])
                    else:
                        os.write(inside, bytes(10) + os.read(outside, 70000))
                except OSError:
                    pass  # a queue is full, or nothing is there any more

    def stop(self) -> None:
        self._idle.clear()
        self._runs.clear()
        assert self._idle.wait(10)

    def run_at(self, tap: Tap) -> None:
        self._outside = tap.end
        self._runs.set()

    def end(self) -> None:
        self._ended.set()
        self._runs.set()
        self._thread.join(10)
        os.close(self._inside)


class Place:
    """left: the guest's site, with a router and a client behind it; right: who only the left one reaches."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.router, self.client, self.guest_at = (f"vgho{os.getpid()}{word}" for word in ("r", "c", "g"))
        for name in (self.router, self.client, self.guest_at):
            netns.create(name)
            netns.set_sysctl(name, {"net/ipv6/conf/default/accept_dad": "0"})
        for name in (pair.left, pair.right, self.router):
            netns.set_sysctl(name, {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
        netns.set_sysctl(pair.left, {f"net/ipv6/conf/{BRIDGE}/disable_ipv6": "0"})
        netns.set_sysctl(pair.left, {f"net/ipv6/conf/{BRIDGE}/accept_dad": "0"})
        with Links(pair.left) as links:
            links.veth("router", peer="in", peer_namespace=self.router)
            links.up("router")
            links.enslave("router", BRIDGE)
            links.address(BRIDGE, "fd78::1", 64)
        with Links(self.router) as links:
            links.veth("out", peer="eth0", peer_namespace=self.client)
            links.up("in", mac=ROUTER_MAC)
            links.up("out")
            for name, addresses in (("in", ("10.78.0.254", "fd78::fe")), ("out", ("10.79.0.1", "fd79::1"))):
                links.address(name, addresses[0], 24)
                links.address(name, addresses[1], 64)
        self.old = Tap(pair.left)
        self.guest = Guest(self.guest_at, self.old)
        for namespace, name, own, routers in (
            (self.client, "eth0", CLIENT, ("10.79.0.1", "fd79::1")),
            (self.guest_at, "eth0", ADDRESSES, ("10.78.0.254", "fd78::fe")),
            (pair.left, BRIDGE, (), ("10.78.0.254", "fd78::fe")),
        ):
            with Links(namespace) as links:
                links.up(name)
                for address in own:
                    links.address(name, address, 64 if ":" in address else 24)
                for router in routers:
                    family = socket.AF_INET6 if ":" in router else socket.AF_INET
                    to = "::/0" if ":" in router else "0.0.0.0/0"
                    links.call("route", "add", dst=to, gateway=router, oif=links.require(name), family=family)
        self.before = {name: self.told(name) for name in (pair.left, pair.right)}
        for host, local, remote in ((pair.left, 1, 2), (pair.right, 2, 1)):
            tunnel = Tunnel(vni=2, local=f"10.98.0.{local}", remote=f"10.98.0.{remote}")
            with Links(host) as links:
                handover.tunnel_up(links, TUNNEL, tunnel, mtu=1450, alias="test")
        self.way = Way(
            bridge=BRIDGE, port=handover.cable_name(handover.OLD, GUEST) + "p", tap="tap9", mac=GUEST
        )
        self.echo = netns.run_in(self.guest_at, _serve)

    def told(self, namespace: str) -> list[str]:
        """Everything a hand-over may leave: rules, routes of every table, proxies, links."""

        def ask(*words: str) -> list[str]:
            done = subprocess.run(
                ["ip", "-n", namespace, *words], capture_output=True, text=True, check=False
            )
            return sorted(line.replace("linkdown", "").strip() for line in done.stdout.splitlines())

        out = [line for family in ("-4", "-6") for line in ask(family, "rule")]
        for family in ("-4", "-6"):
            found = ask(family, "route", "show", "table", "all")
            out += [line for line in found if "multicast" not in line and "tap9" not in line]
            out += ask(family, "neigh", "show", "proxy")
        return out + [
            name for name in at(namespace, lambda links: [one.name for one in links.all()]) if name != "tap9"
        ]

    def connect(self, address: str) -> socket.socket:
        def connect() -> socket.socket:
            return socket.create_connection((address, 7), timeout=20)

        return netns.run_in(self.client, connect)

    def prepare(self) -> None:
        at(self.pair.left, lambda links: handover.prepare(links, TUNNEL, BRIDGE, GUEST, ADDRESSES))

    def accept(self) -> str | None:
        return at(
            self.pair.right,
            lambda links: handover.accept(links, TUNNEL, GUEST, ADDRESSES, ROUTER_MAC, ("fd78::fe",)),
        )

    def turn(self) -> None:
        def turn(links: Links) -> None:
            flip.turn(links, self.way)
            handover.stand(links, GUEST, ADDRESSES)

        at(self.pair.left, turn)

    def close(self) -> None:
        self.guest.end()
        for listener in self.echo:
            listener.close()
        for name in (self.client, self.router, self.guest_at):
            netns.delete(name)


def _serve() -> list[socket.socket]:
    """An echo server on every address, in the guest."""

    def answer(connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError):  # its network goes at the end
            while data := connected.recv(1 << 16):
                connected.sendall(data)

    def accept(listener: socket.socket) -> None:
        try:
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
        except OSError:
            pass  # closed

    made = []
    for family in (socket.AF_INET, socket.AF_INET6):
        listener = socket.create_server(("", 7), family=family)
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        made.append(listener)
    return made


def _echoed(connected: socket.socket, data: bytes) -> bool:
    sending = threading.Thread(target=connected.sendall, args=(data,))
    sending.start()
    got = bytearray()
    while len(got) < len(data):
        got += connected.recv(1 << 16)
    sending.join(20)
    return bytes(got) == data


@pytest.fixture
def place(pair: Pair) -> Iterator[Place]:
    place = Place(pair)
    yield place
    place.close()


def test_connections_of_both_families_survive_and_new_ones_work_and_nothing_is_left(place: Place) -> None:
    kept = [place.connect(address) for address in ADDRESSES]
    assert all(_echoed(one, b"here") for one in kept)
    place.prepare()
    assert place.accept() == "waiting", "libvirt has made no tap yet"
    new = Tap(place.pair.right)
    assert place.accept() is None
    assert place.accept() is None, "may be said twice"
    assert all(_echoed(one, b"still here") for one in kept)
    place.guest.stop()
    place.turn()
    waiting = [one.send(b"in the pause") for one in kept]
    until(new.waiting, "what comes in the pause waits at the new tap", deadline_s=10)
    place.guest.run_at(new)
    assert [one.recv(64) for one in kept] == [b"in the pause"] * len(waiting)
    # Longer than the tunnel carries at once, both ways.
    assert all(_echoed(one, os.urandom(BIG)) for one in kept)
    for address in ADDRESSES:
        with place.connect(address) as another:
            assert _echoed(another, b"new")

    # Who asks anew is answered as well, by proxy: the router for the guest, the guest for its gateway.
    for namespace, name in ((place.router, "in"), (place.guest_at, "eth0")):
        for family in ("-4", "-6"):
            subprocess.run(["ip", "-n", namespace, family, "neigh", "flush", "dev", name], check=True)
    assert all(_echoed(one, b"asked anew") for one in kept)
    for one in kept:
        one.close()
    _end(place)
    os.close(new.end)


def test_a_guest_that_goes_on_here_is_reached_as_before(place: Place) -> None:
    kept = [place.connect(address) for address in ADDRESSES]
    place.prepare()
    place.guest.stop()
    place.turn()

    def back(links: Links) -> None:
        assert handover.stand_back(links, GUEST)
        flip.put_back(links, place.way)

    at(place.pair.left, back)
    place.guest.run_at(place.old)
    assert all(_echoed(one, b"here") for one in kept)
    _end(place)
    assert all(_echoed(one, b"and after") for one in kept)
    for one in kept:
        one.close()


def test_a_guest_that_runs_there_already_is_not_taken_over(place: Place) -> None:
    new = Tap(place.pair.right)
    new.send(b"\xff" * 6 + bytes.fromhex(GUEST.replace(":", "")) + b"\x08\x06" + bytes(46))
    refused = place.accept()
    assert refused is not None
    assert "runs here already" in refused
    _end(place)
    os.close(new.end)


def test_what_would_cut_off_others_at_the_new_site_is_refused_and_changes_nothing(place: Place) -> None:
    new = Tap(place.pair.right)

    def refused(addresses: tuple[str, ...]) -> str | None:
        return at(
            place.pair.right,
            lambda links: handover.accept(links, TUNNEL, GUEST, addresses, ROUTER_MAC, ()),
        )

    assert "10.78.0.2 is an address of this host" in str(refused((*ADDRESSES, "10.78.0.2")))
    at(place.pair.right, lambda links: set_entry(links, ROUTER_MAC, Entry(port=links.require("tap9"))))
    assert "knows the old gateway" in str(refused(ADDRESSES))
    assert at(place.pair.right, handover.standing) == ()
    _end(place)
    os.close(new.end)


def _asks(mac: str, address: str, for_: str) -> bytes:
    """An ARP request, to everybody."""
    sender = bytes.fromhex(mac.replace(":", ""))
    head = b"\xff" * 6 + sender + bytes.fromhex("08060001080006040001")
    return head + sender + socket.inet_aton(address) + bytes(6) + socket.inet_aton(for_) + bytes(18)


def test_at_the_new_site_nobody_but_the_guest_is_answered_for_its_gateway(place: Place) -> None:
    new = Tap(place.pair.right)
    assert place.accept() is None
    # A stranger's answer would go to every port, and so to this tap too: nobody knows where it is.
    send(place.pair.right, _asks("02:00:00:00:00:77", "10.78.0.77", "10.78.0.254"))
    new.send(_asks(GUEST, ADDRESSES[0], "10.78.0.254"))
    seen: list[bytes] = []

    def answers() -> list[bytes]:
        seen.extend(new.read())
        return [frame for frame in seen if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x02"]

    until(answers, "the guest answered", deadline_s=10)
    assert [frame[:12].hex(":") for frame in answers()] == [f"{GUEST}:{ROUTER_MAC}"]
    _end(place)
    os.close(new.end)


def _end(place: Place) -> None:
    def end(links: Links) -> list[Any]:
        for side in (handover.OLD, handover.NEW):
            handover.remove(links, side, GUEST)
            assert not handover.remove(links, side, GUEST)
        links.delete(TUNNEL)
        return list(handover.standing(links))

    for host in (place.pair.left, place.pair.right):
        assert at(host, end) == []
        assert place.told(host) == place.before[host]
