"""A lab's namespaces, bridges and cables. Everything may be asked for twice; what was missing is told."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

from virtgrid.lab import control, daemon
from virtgrid.lab.layout import (
    BRIDGE,
    CLIENT_ADDRESS,
    CLIENT_BRIDGE,
    PREFIX,
    WAN_INTERFACE,
    WAN_MTU,
    LabConfig,
    Layout,
    LinkSpec,
    SitePlan,
)
from virtgrid.lab.site import Site
from virtgrid.net import netns
from virtgrid.net.link import Links

_SITE_SETTINGS: Final = {
    # One stream must fill 1 Gbit/s at 100 ms; the kernel's defaults end at some 280 Mbit/s.
    "net/ipv4/tcp_rmem": "4096 131072 67108864",
    "net/ipv4/tcp_wmem": "4096 131072 67108864",
    # Such buffers let QEMU think it has sent what still waits here; its downtime estimate goes wrong.
    "net/ipv4/tcp_notsent_lowat": "131072",
}
_SETTINGS: Final = {
    # Each measurement starts without what the one before it learned.
    "net/ipv4/tcp_no_metrics_save": "1",
    # Neighbour and router discovery on every bridge and tap would keep idle guests busy. Not on lo.
    "net/ipv6/conf/default/disable_ipv6": "1",
    # Bridged frames are not for the host's packet filter.
    "net/bridge/bridge-nf-call-iptables": "0",
    "net/bridge/bridge-nf-call-ip6tables": "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}
#: The command line of this very installation, whatever ``virtgrid`` is in somebody's PATH.
VIRTGRID: Final = (sys.executable, "-c", "from virtgrid.cli.main import main; main()")
_CLIENT_INTERFACE: Final = "client0"
"""The port of a site's bridge that leads to the client."""


def make_namespaces(layout: Layout) -> list[str]:
    """Network namespaces with their settings; returns those that were missing."""
    made = []
    for namespace in layout.namespaces:
        if netns.create(namespace):
            made.append(f"namespace {namespace}")
        settings = _SETTINGS if namespace == layout.client_namespace else {**_SETTINGS, **_SITE_SETTINGS}
        netns.set_sysctl(namespace, settings)
        with Links(namespace) as links:
            links.up("lo")
    return made


def make_client_side(layout: Layout, config: LabConfig) -> list[str]:
    """The client's bridge, every site's bridge and the cables between; returns what was missing."""
    made = []
    with Links(layout.client_namespace) as links:
        if links.bridge(CLIENT_BRIDGE, mac="02:76:67:77:00:01"):
            made.append(f"bridge {CLIENT_BRIDGE}")
        links.address(CLIENT_BRIDGE, CLIENT_ADDRESS, PREFIX)
        for site in layout.sites:
            with Links(site.namespace) as there:
                if there.bridge(BRIDGE, mac=site.bridge_mac):
                    made.append(f"bridge {BRIDGE} in {site.name}")
                there.address(BRIDGE, site.segment_address, PREFIX)
                if config.stretched and site.number > 1:
                    continue
                if _cable(layout, config, site, links):
                    made.append(f"cable client - {site.name}")
                there.enslave(_CLIENT_INTERFACE, BRIDGE)
                there.up(_CLIENT_INTERFACE)
            links.enslave(site.client_port, CLIENT_BRIDGE)
            links.up(site.client_port)
    return made


def _cable(layout: Layout, config: LabConfig, site: SitePlan, links: Links) -> bool:
    if config.client_rtt_s == 0:
        return links.veth(site.client_port, peer=_CLIENT_INTERFACE, peer_namespace=site.namespace)
    ends = [
        ("client", layout.client_namespace, site.client_port),
        (site.name, site.namespace, _CLIENT_INTERFACE),
    ]
    spec = LinkSpec(rate_bytes_s=0, rtt_s=config.client_rtt_s, queue_s=1.0)
    return start_link(layout, f"client-{site.name}", ends, spec)


def make_wan(layout: Layout, config: LabConfig) -> list[str]:
    """The WAN between all sites; returns what was missing. A running one takes over a changed rate."""
    made = []
    ends = [(site.name, site.namespace, WAN_INTERFACE) for site in layout.sites]
    if start_link(layout, "wan", ends, config.wan):
        made.append("wan")
    else:
        control.ask(layout.link_socket("wan"), {"do": "base", "spec": config.wan.as_dict()})
    for site in layout.sites:
        with Links(site.namespace) as links:
            links.up(WAN_INTERFACE, mtu=WAN_MTU, mac=site.wan_mac)
            links.address(WAN_INTERFACE, site.wan_address, PREFIX)
    return made


def make_segments(sites: Sequence[Site]) -> list[str]:
    """A segment from the first site's bridge to every other one's, as an administrator makes it; what was
    missing. The segment's number is the other site's."""
    hub, made = sites[0], []
    for site in sites[1:]:
        vni = str(site.plan.number)
        for here, there in ((hub, site), (site, hub)):
            with Links(here.netns) as links:
                missing = links.index(f"vgs{vni}") is None
            here.run([*VIRTGRID, "segment", "up", BRIDGE, there.wan_address, "--vni", vni])
            if missing:
                made.append(f"segment {here.name} - {there.name}")
    return made


def start_link(layout: Layout, name: str, ends: list[tuple[str, str, str]], spec: LinkSpec) -> bool:
    """Start a link's process over ends of (site, namespace, interface). False when it runs already."""
    where = layout.link_socket(name)
    if control.listener_pid(where) is not None:
        return False
    plan: dict[str, Any] = {
        "home": layout.client_namespace,
        "ports": [{"name": a, "namespace": b, "interface": c} for a, b, c in ends],
        "spec": spec.as_dict(),
    }
    daemon.start(
        "virtgrid.lab.wanlink",
        [os.fspath(where), daemon.order_argument(plan)],
        lab=layout.root,
        log=layout.root / f"link-{name}.log",
    )
    return True
