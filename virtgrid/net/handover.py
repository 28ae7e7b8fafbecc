"""A guest's old address, handed over to another host by routing: where no segment joins the two sites.

At the **old site** a cable (a veth pair) takes the guest's place: one end is a port of the guest's bridge,
the other has the guest's own hardware address. Neighbours go on sending to that address, so nothing they have
learned need change; the host takes their frames from the cable and routes them into the tunnel. Whoever asks
anew for the guest's address is answered by proxy (ARP, and neighbour discovery for IPv6).

At the **new site** a second cable takes the place of the guest's old gateway, with that gateway's hardware
address: what the guest sends from its old address there goes back through the tunnel, and nothing else
does (policy routing: a rule for the source and a table of its own).

Everything lives in the kernel. A table belongs to a cable, and is numbered after it. Everything may be said
twice. Source of the idea: Bradford et al. 2007, section 3.3.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import RefusedError
from virtgrid.net import forwarding
from virtgrid.net.forwarding import Entry
from virtgrid.net.link import Link, Links, Tunnel

OLD, NEW = "old", "new"
_NAMES: Final = {OLD: "vgo", NEW: "vgn"}
_TABLES: Final = 7_600_000
_RANK: Final = 7600  # before the main table's 32766
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_UNREACHABLE: Final = 7  # linux/fib_rules.h: FR_ACT_UNREACHABLE
#: The least an IPv6 link must carry (RFC 8200, section 5).
LEAST_MTU: Final = 1280
ADDRESSES_MAX: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A guest's old addresses on this host. side: ``old`` or ``new``; tunnel: the interface it goes through.

    standing: frames are routed; at the old side it is prepared before that. packets: what has come for the
    guest so far, at the new side; what it has sent from there, at the old one.
    """

    mac: str
    addresses: tuple[str, ...]
    side: str
    tunnel: str
    bridge: str
    cable: str
    standing: bool
    packets: int = 0


def cable_name(side: str, mac: str) -> str:
    """The host's end; the bridge's end is the same with a ``p``."""
    return _NAMES[side] + mac.replace(":", "")[2:]


def check_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """Canonical, each once. Errors: ValueError: no address, not one of a host, or too many."""
    found = tuple(dict.fromkeys(str(ipaddress.ip_address(address)) for address in addresses))
    for address in found:
        one = ipaddress.ip_address(address)
        if one.is_multicast or one.is_unspecified or one.is_loopback or one.is_link_local:
            raise ValueError(f"{address} is not an address that can be routed")
    if not 1 <= len(found) <= ADDRESSES_MAX:
        raise ValueError(f"between 1 and {ADDRESSES_MAX} addresses can be handed over, not {len(found)}")
    return found


def hops(tunnel: Link) -> tuple[int, dict[int, str], dict[int, str], str]:
    """Inside a tunnel -> (which end is ours, our addresses, the other's by family, its MAC). Pure.

    The end with the lower outer address is the first.
    """
    assert tunnel.tunnel is not None
    outer = [ipaddress.ip_address(str(a)) for a in (tunnel.tunnel.local, tunnel.tunnel.remote)]
    end = 1 if int(outer[0]) < int(outer[1]) else 2
    vni = tunnel.tunnel.vni

    def of(which: int) -> dict[int, str]:
        four = ipaddress.IPv4Address("169.254.64.0") + (vni << 2) + which
        return {4: str(four), 6: f"fe80::{vni:x}:{which}"}

    return end, of(end), of(3 - end), hop_mac(vni, 3 - end)


def hop_mac(vni: int, end: int) -> str:
    return f"02:76:67:{vni >> 8:02x}:{vni & 0xFF:02x}:{end:02x}"


def sysctl(links: Links, values: dict[str, str]) -> None:
    """Write settings in the links' namespace; those that the kernel lacks are left out."""

    def write() -> None:
        for key, value in values.items():
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/sys/net", key).write_text(value)

    links.run(write)


def can_forward_ipv6(links: Links, interface: str) -> bool:
    """Let this interface's IPv6 be forwarded; False where that is one switch for all of them, and off."""

    def ask() -> bool:
        one = Path("/proc/sys/net/ipv6/conf", interface, "force_forwarding")  # since Linux 6.17
        with contextlib.suppress(FileNotFoundError):
            one.write_text("1")
            return True
        with contextlib.suppress(FileNotFoundError):
            return Path("/proc/sys/net/ipv6/conf/all/forwarding").read_text().strip() == "1"
        return False

    return links.run(ask)


def prepare(links: Links, tunnel: str, bridge: str, mac: str, addresses: Sequence[str]) -> Handover:
    """At the old site, before the guest leaves: all but what turns its frames. Errors: RefusedError."""
    remove(links, OLD, mac)
    remove(links, NEW, mac)  # it came here so, and goes on
    there = _tunnel(links, tunnel)
    cable = cable_name(OLD, mac)
    try:
        table = _cable(links, cable, bridge, mac, OLD, tunnel, addresses)
        _permit(links, cable, addresses)
        _, _, theirs, _ = hops(there)
        for address in addresses:
            six = ":" in address
            _route(links, table, f"{address}/{128 if six else 32}", there.index, theirs[6 if six else 4])
        for family in _families(addresses):
            _rule(links, family, table, _RANK, iifname=cable)
            _rule(links, family, None, _RANK + 1, iifname=cable)
    except BaseException:
        remove(links, OLD, mac)
        raise
    return next(one for one in standing(links) if one.cable == cable)


def stand(links: Links, mac: str, addresses: Sequence[str]) -> None:
    """The guest has stopped here: this host answers for it. The bridge is told by ``flip``."""
    cable = cable_name(OLD, mac)
    index = links.require(cable)
    for address in addresses:
        six = ":" in address
        _rule(links, 6 if six else 4, _TABLES + index, _RANK, dst=address, dst_len=128 if six else 32)
        links.call(
            "neigh", "replace", dst=address, ifindex=index, flags=0x08, family=_FAMILIES[6 if six else 4]
        )


def stand_back(links: Links, mac: str) -> bool:
    """The guest goes on here: as before ``stand``. False when it did not stand."""
    index = links.index(cable_name(OLD, mac))
    if index is None:
        return False
    found = [rule for rule in _rules(links, _TABLES + index) if rule.get_attr("FRA_DST")]
    for rule in found:
        _delete_rule(links, rule)
    for family in _FAMILIES.values():
        for proxy in _proxies(links, family, index):
            links.call("neigh", "del", dst=proxy, ifindex=index, flags=0x08, family=family)
    return bool(found)


def accept(
    links: Links, tunnel: str, mac: str, addresses: Sequence[str], gateway: str, gateways: Sequence[str]
) -> str | None:
    """At the new site, before the guest runs: make its old addresses' way -> why not; None: it is there.

    gateway: the hardware address it sends to; gateways: that one's IPv6 addresses.
    Errors: RefusedError, OSError.
    """
    everything = links.all()
    tap = next((link for link in everything if is_tap_of(link, mac)), None)
    if tap is None or tap.master is None:
        return "waiting"  # libvirt has not made it yet
    cable = cable_name(NEW, mac)
    there = next((one for one in standing(links) if one.cable == cable), None)
    if there is not None and there.addresses == tuple(addresses) and there.tunnel == tunnel:
        return None
    if tap.rx_packets:
        return f"a guest with the hardware address {mac} runs here already"
    bridge = next(link for link in everything if link.index == tap.master)
    if (
        any(link.mac == gateway and link.master == bridge.index for link in everything)
        or bridge.mac == gateway
    ):
        return f"{gateway}, the old gateway's hardware address, is one of {bridge.name}'s own here"
    known = forwarding.entry(links, gateway, bridge.index)
    if known is not None and not (there is not None and known.port == links.index(cable + "p")):
        return f"{bridge.name} knows the old gateway's hardware address {gateway} here as well"
    own = {a.get_attr("IFA_ADDRESS") for a in links.call("get_addr")}
    if taken := own & set(addresses):
        return f"{', '.join(sorted(taken))} is an address of this host"
    remove(links, NEW, mac)
    remove(links, OLD, mac)  # it comes back: what was sent after it is sent here again
    try:
        table = _cable(links, cable, bridge.name, gateway, NEW, tunnel, addresses, guest=mac)
        _permit(links, cable, addresses)
        port, index = links.require(cable + "p"), links.require(cable)
        out = _tunnel(links, tunnel)
        _, _, theirs, _ = hops(out)
        sysctl(links, {f"ipv4/conf/{cable}/proxy_arp": "1"})
        for address in addresses:
            six = ":" in address
            length = 128 if six else 32
            links.call("neigh", "replace", dst=address, lladdr=mac, ifindex=index, state="permanent")
            _route(links, table, f"{address}/{length}", index, None)
            family = 6 if six else 4
            # Wherever it comes from: the kernel also asks it whether there is a way back (rp_filter).
            _rule(links, family, table, _RANK, src=address, src_len=length)
            _rule(links, family, table, _RANK, dst=address, dst_len=length)
        for family in _families(addresses):
            _route(links, table, "::/0" if family == 6 else "0.0.0.0/0", out.index, theirs[family])
            _rule(links, family, None, _RANK + 1, iifname=cable)
        for router in gateways:
            links.call("neigh", "replace", dst=router, ifindex=index, flags=0x08, family=socket.AF_INET6)
        forwarding.set_entry(links, gateway, Entry(port=port, static=True, sticky=True))
        forwarding.set_entry(links, mac, Entry(port=tap.index))
    except BaseException:
        remove(links, NEW, mac)
        raise
    return None


def is_tap_of(link: Link, mac: str) -> bool:
    """Whether this is the tap libvirt made for the guest: the same address but for the first byte. Pure."""
    return link.kind == "tun" and link.up and link.mac.startswith(("fe:", "fa:")) and link.mac[2:] == mac[2:]


def remove(links: Links, side: str, mac: str) -> bool:
    """Take a guest's hand-over on this side down, all of it. False when there was none."""
    cable = cable_name(side, mac)
    index = links.index(cable)
    if index is None:
        return False
    for rule in _rules(links, _TABLES + index, cable):
        _delete_rule(links, rule)
    for family in _FAMILIES.values():  # those through the tunnel: the others go with the cable
        with contextlib.suppress(Exception):
            links.call("flush_routes", table=_TABLES + index, family=family)
    links.delete(cable)  # and with it the port, its entries, and the proxies
    return True


def standing(links: Links) -> tuple[Handover, ...]:
    """The hand-overs of this host, as the kernel has them."""
    everything = links.all()
    found = []
    for link in everything:
        side = next((side for side, name in _NAMES.items() if link.name.startswith(name)), None)
        if side is None or link.kind != "veth" or link.name.endswith("p"):
            continue
        try:
            note = json.loads(link.alias)
            if note["by"] != "virtgrid":
                continue
            addresses, mac = tuple(map(str, note["addresses"])), str(note["mac"])
            tunnel, bridge = str(note["tunnel"]), str(note["bridge"])
        except (ValueError, KeyError, TypeError):
            continue
        rules = _rules(links, _TABLES + link.index)
        found.append(
            Handover(
                mac=mac,
                addresses=addresses,
                side=side,
                tunnel=tunnel,
                bridge=bridge,
                cable=link.name,
                standing=any(rule.get_attr("FRA_DST") for rule in rules),
                packets=link.tx_packets if side == NEW else 0,
            )
        )
    return tuple(found)


# --- parts ----------------------------------------------------------------------------------------


def _tunnel(links: Links, name: str) -> Link:
    links.require(name)
    return next(link for link in links.all() if link.name == name)


def _families(addresses: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({6 if ":" in address else 4 for address in addresses}))


def _cable(
    links: Links,
    name: str,
    bridge: str,
    mac: str,
    side: str,
    tunnel: str,
    addresses: Sequence[str],
    *,
    guest: str | None = None,
) -> int:
    """A cable of which one end is a port of the bridge, the other the host's, with ``mac`` -> its table."""
    links.call("link", "add", ifname=name, kind="veth", peer={"ifname": name + "p"}, address=mac)
    index = links.require(name)
    keys = {"by": "virtgrid", "mac": guest or mac, "addresses": list(addresses)}
    links.call(
        "link",
        "set",
        index=index,
        ifalias=json.dumps(keys | {"tunnel": tunnel, "bridge": bridge}, separators=(",", ":")),
    )
    conf = {
        "rp_filter": "2",
        "forwarding": "1",
        "arp_ignore": "8",
        "accept_redirects": "0",
        "send_redirects": "0",
    }
    sysctl(links, {f"ipv4/conf/{name}/{key}": value for key, value in conf.items()})
    # No address made of its hardware address: that would be the guest's, or the gateway's.
    quiet = {
        "addr_gen_mode": "1",
        "accept_dad": "0",
        "accept_ra": "0",
        "forwarding": "1",
        "proxy_ndp": "1",
        "disable_ipv6": "0",
    }
    sysctl(links, {f"ipv6/conf/{name}/{key}": value for key, value in quiet.items()})
    sysctl(links, {f"ipv{v}/neigh/{name}/proxy_delay": "0" for v in (4, 6)})
    mtu = _tunnel(links, bridge).mtu
    links.up(name, mtu=mtu)
    # On an interface without an IPv4 address even a loose rp_filter drops everything; and a neighbour that
    # asks from a link-local address is only answered by one that has such an address.
    ours = hops(_tunnel(links, tunnel))[1]
    links.address(name, ours[4], 32)
    if 6 in _families(addresses):
        links.address(name, ours[6], 64)
    port = name + "p"
    sysctl(links, {f"ipv6/conf/{port}/disable_ipv6": "1"})
    links.enslave(port, bridge)
    # What the host says on the cable must not teach the bridge that the guest is there.
    links.call("brport", "set", index=links.require(port), learning=0)
    links.up(port, mtu=mtu)
    return _TABLES + index


def _permit(links: Links, cable: str, addresses: Sequence[str]) -> None:
    if 6 in _families(addresses) and not can_forward_ipv6(links, cable):
        raise RefusedError(
            "this host does not forward IPv6, and its kernel cannot do so for single interfaces",
            hint="sysctl net.ipv6.conf.all.forwarding=1, or keep the IPv4 addresses only",
        )


def _route(links: Links, table: int, to: str, interface: int, hop: str | None) -> None:
    options: dict[str, Any] = {} if hop is None else {"gateway": hop, "flags": 4}  # RTNH_F_ONLINK
    links.call(
        "route",
        "replace",
        dst=to,
        oif=interface,
        table=table,
        family=_FAMILIES[6 if ":" in to else 4],
        **({"scope": 253} if hop is None and ":" not in to else {}),
        **options,
    )


def _rule(links: Links, family: int, table: int | None, rank: int, **match: Any) -> None:
    """A rule; without a table it says that there is no way."""
    from pyroute2.netlink.exceptions import NetlinkError

    what: dict[str, Any] = {"action": _UNREACHABLE} if table is None else {"table": table}
    try:
        links.call("rule", "add", family=_FAMILIES[family], priority=rank, **what, **match)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise


def _rules(links: Links, table: int, cable: str | None = None) -> list[Any]:
    found = []
    for family in _FAMILIES.values():
        for rule in links.call("get_rules", family=family):
            of_cable = cable is not None and rule.get_attr("FRA_IIFNAME") == cable
            if rule.get_attr("FRA_TABLE") == table or of_cable:
                found.append(rule)
    return found


def _delete_rule(links: Links, rule: Any) -> None:
    names = {"FRA_PRIORITY": "priority", "FRA_IIFNAME": "iifname", "FRA_DST": "dst", "FRA_SRC": "src"}
    match = {word: rule.get_attr(name) for name, word in names.items() if rule.get_attr(name)}
    lengths = {f"{word}_len": rule[f"{word}_len"] for word in ("dst", "src") if word in match}
    what: dict[str, Any] = (
        {"action": _UNREACHABLE} if rule["action"] == _UNREACHABLE else {"table": rule.get_attr("FRA_TABLE")}
    )
    links.call("rule", "del", family=rule["family"], **match, **lengths, **what)


def _proxies(links: Links, family: int, index: int) -> list[str]:
    found = links.call("get_neighbours", family=family, ifindex=index)
    return [n.get_attr("NDA_DST") for n in found if n["flags"] & 0x08]


def tunnel_up(links: Links, name: str, tunnel: Tunnel, *, mtu: int, alias: str) -> None:
    """A VXLAN that is a port of nothing, with an address of each family inside it. Undone by deleting it.

    Nothing is asked in it: each end knows the other's addresses from the outer ones and the VNI.
    """
    links.vxlan(name, tunnel, mtu=mtu, alias=alias)
    try:
        end, ours, theirs, mac = hops(_tunnel(links, name))
        index = links.require(name)
        conf = {"rp_filter": "2", "forwarding": "1", "accept_redirects": "0", "send_redirects": "0"}
        sysctl(links, {f"ipv4/conf/{name}/{key}": value for key, value in conf.items()})
        quiet = {
            "addr_gen_mode": "1",
            "accept_ra": "0",
            "forwarding": "1",
            "accept_dad": "0",
            "disable_ipv6": "0",
        }
        sysctl(links, {f"ipv6/conf/{name}/{key}": value for key, value in quiet.items()})
        can_forward_ipv6(links, name)
        links.up(name, mtu=mtu, mac=hop_mac(tunnel.vni, end))
        for family, length in ((4, 30), (6, 64)):
            links.address(name, ours[family], length)
            links.call("neigh", "replace", dst=theirs[family], lladdr=mac, ifindex=index, state="permanent")
    except BaseException:
        links.delete(name)
        raise
