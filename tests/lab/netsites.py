"""Two lab sites as hosts of a network manager: real virtgridd, a real NRM, and namespaces for sandboxes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrating import until

from virtgrid.grid.messages.coalloc import Command, Hold, HoldAnswer, Paths, Window
from virtgrid.grid.messages.coalloc import Path as Way
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.network import bridge_of
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import WAN_INTERFACE
from virtgrid.lab.site import Site
from virtgrid.net import htb, netns, reserved, reserving
from virtgrid.net.guarantee import Tree
from virtgrid.net.link import Links
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import deaf

PORT = 7777


@dataclass
class Node:
    """What a sandbox is to a segment: a namespace with one cable into its bridge."""

    namespace: str
    address: str

    def reaches(self, other: Node, *, size: int = 64, timeout_s: float = 20.0) -> bool:
        """Whether a datagram in one IP packet of this size gets there."""
        payload = os.urandom(size - 28)

        def sockets() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
            return made

        with (
            netns.run_in(self.namespace, sockets) as sending,
            netns.run_in(other.namespace, sockets) as listening,
        ):
            listening.bind((other.address, 0))
            listening.settimeout(timeout_s)
            try:
                sending.sendto(payload, listening.getsockname())
                return listening.recv(4096) == payload
            except OSError:
                return False


@dataclass
class NetSites:
    """home: a directory everybody may enter, short enough for sockets."""

    lab: Lab
    home: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    namespaces: list[str] = field(default_factory=list)
    _keys: dict[int, str] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def sites(self) -> tuple[Site, Site]:
        alice, bob = self.lab.sites
        return alice, bob

    # -- programs --------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """``nrm``, or the virtgridd of a site; until it listens."""
        here = f"unix:{self.home}"
        if name == "nrm":
            hosts = [f"{site.name}={site.wan_address}@{here}/{site.name}.sock" for site in self.sites]
            argv = ["nrm", "--name", "net", "--link", "alice:bob=1gbit", "--socket", f"{here}/nrm.sock"]
            argv += ["--database", f"{self.home}/nrm.db", *(w for host in hosts for w in ("--host", host))]
            command = [sys.executable, "-m", "virtgrid.cli.main", "serve", *argv]
        else:
            site = next(site for site in self.sites if site.name == name)
            argv = ["host", "--crm-key", f"{self.home}/crm.pub", "--socket", f"{here}/{name}.sock"]
            command = site.argv([sys.executable, "-m", "virtgrid.cli.main", "serve", *argv])
        log = self.home / f"{name}.log"
        before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.running[name] = subprocess.Popen(command, stdout=file, stderr=file)

        def ready() -> bool:
            assert self.running[name].poll() is None, self.log(name)
            return b"ready at" in log.read_bytes()[before:]

        until(ready, f"{name} listens", deadline_s=60)

    def kill(self, name: str) -> None:
        """-9."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(30)

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    # -- the network manager ---------------------------------------------------------------------

    def reserve(
        self,
        key: str,
        *,
        rate_bytes_s: int | None = None,
        segment: int | None = None,
        begins_in_s: int = 0,
        lasts_s: int = 600,
    ) -> int:
        """Held and committed; its segment."""
        key = f"{key}-{next(self._numbers)}"
        at_s = int(time.time())
        way = ("alice", "bob")
        hold = Hold(
            key=key,
            reservation=key.lower(),
            window=Window(begins_at_s=at_s + begins_in_s, ends_at_s=at_s + begins_in_s + lasts_s),
            ttl_s=60,
            asked_at_s=at_s,
            wanted=Paths(
                sites=way,
                paths=() if rate_bytes_s is None else (Way(between=way, rate_bytes_s=rate_bytes_s),),
                segment=segment,
            ),
        )
        answer = parse(HoldAnswer, Command.HOLD, self._say(Command.HOLD, hold.model_dump(mode="json")))
        assert answer.standing is not None, answer
        self._say(Command.COMMIT, {"key": key})
        assert answer.standing.grant.segment is not None
        self._keys[answer.standing.grant.segment] = key
        return answer.standing.grant.segment

    def release(self, segment: int) -> None:
        self._say(Command.RELEASE, {"key": self._keys.pop(segment)})

    def _say(self, method: str, params: dict[str, Any]) -> Any:
        async def say() -> Any:
            line = await dial(Endpoint(self.home / "nrm.sock"), deaf, name="the NRM")
            try:
                return await line.call(method, params, deadline_s=30)
            finally:
                await line.close()

        return asyncio.run(say())

    # -- what is there ---------------------------------------------------------------------------

    def links(self, site: Site) -> set[str]:
        """Interfaces that virtgridd made."""
        with Links(site.netns) as links:
            return {link.name for link in links.all() if reserved.ours(link)}

    def free(self) -> bool:
        """Whether neither site's uplink has a tree of ours."""
        return all(self._tree(site) is None for site in self.sites)

    def _tree(self, site: Site) -> Tree | None:
        with Links(site.netns) as links:
            return htb.read(links, links.require(WAN_INTERFACE))

    def guaranteed(self, site: Site) -> list[int]:
        """Rates of the guaranteed segments at a site, in bytes per second on the wire."""
        tree = self._tree(site)
        classes = {} if tree is None else tree.classes
        return sorted(one.rate_bytes_s for one in classes.values() if one.prio == 1)

    def whole(self, segment: int) -> bool:
        """Whether a segment is at both sites, with the tunnel to the other one."""
        return all(self._peers(site, segment) == {other.wan_address} for site, other in self._pairs())

    def knows(self, site: Site, segment: int) -> bool:
        """Whether a site's virtgridd has written down that it should be there."""
        kept = site.plan.root / "sandboxes/.networks/net.json"
        return kept.exists() and f'"segment":{segment},' in kept.read_text()

    def absent(self, segment: int) -> bool:
        names = {bridge_of(segment), f"vgx{segment}"}
        return not any(names & self.links(site) for site in self.sites)

    def _pairs(self) -> list[tuple[Site, Site]]:
        alice, bob = self.sites
        return [(alice, bob), (bob, alice)]

    def _peers(self, site: Site, segment: int) -> set[str]:
        with Links(site.netns) as links:
            found = reserving.look(links)
        up = {link.name: link for link in found.links if link.up}
        bridge, port = up.get(bridge_of(segment)), up.get(f"vgx{segment}")
        if bridge is None or port is None or port.master != bridge.index:
            return set()
        return set(found.peers[port.name])

    # -- nodes -----------------------------------------------------------------------------------

    def node(self, site: Site, segment: int, address: str) -> Node:
        """Plugged into the segment's bridge, as a sandbox is: with the bridge's MTU."""
        number = next(self._numbers)
        name = f"vgnode{os.getpid()}x{number}"
        netns.create(name)
        self.namespaces.append(name)
        netns.set_sysctl(name, {"net/ipv6/conf/default/disable_ipv6": "1"})
        port, bridge = f"node{number}", bridge_of(segment)
        with Links(site.netns) as links:
            links.veth(port, peer="eth0", peer_namespace=name)
            mtu = next(link.mtu for link in links.all() if link.name == bridge)
            links.up(port, mtu=mtu)
            links.enslave(port, bridge)
        with Links(name) as links:
            links.up("eth0", mtu=mtu)
            links.address("eth0", address, 24)
        return Node(name, address)

    def towards(self, node: Node, site: Site, segment: int) -> Node:
        """The site itself, as a node that knows how to address it would reach it: past ARP."""
        with Links(site.netns) as links:
            mac = next(link.mac for link in links.all() if link.name == bridge_of(segment))
        with Links(node.namespace) as links:
            cable = links.require("eth0")
            links.call("route", "add", dst=f"{site.wan_address}/32", oif=cable)
            links.call("neigh", "add", dst=site.wan_address, lladdr=mac, ifindex=cable, state="permanent")
        return Node(site.netns, site.wan_address)

    # -- between two tests -----------------------------------------------------------------------

    def mend(self) -> None:
        """Everybody runs, and nobody has reserved anything."""
        for name in (*(site.name for site in self.sites), "nrm"):
            if name not in self.running:
                self.start(name)
        for segment in list(self._keys):
            self.release(segment)
        until(lambda: not any(self.links(site) for site in self.sites), "nothing is reserved")
        until(self.free, "nothing is guaranteed")

    # -- after -----------------------------------------------------------------------------------

    def end(self) -> None:
        for name in self.namespaces:
            netns.delete(name)
        for process in self.running.values():
            process.kill()
            process.wait(30)
        for site in self.sites:
            with Links(site.netns) as links:
                for link in links.all():
                    if reserved.ours(link):
                        links.delete(link.name)
            site.run(["tc", "qdisc", "del", "dev", WAN_INTERFACE, "root"], check=False)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(site.plan.root / "sandboxes/.networks")


@contextmanager
def net_sites(lab: Lab) -> Iterator[NetSites]:
    """Everybody runs; nothing of it is left."""
    home = Path(tempfile.mkdtemp(prefix=f"vg{os.getpid()}-"))
    home.chmod(0o755)
    (home / "crm.pub").write_text(seal.public_text(seal.new_key().public_key()))
    made = NetSites(lab, home)
    try:
        made.mend()
        yield made
    finally:
        made.end()
        shutil.rmtree(home)
