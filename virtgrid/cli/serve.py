"""``virtgrid serve``: the programs that run for long, on hosts, nodes and sites and above them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.cli.output import run
from virtgrid.core.errors import RefusedError
from virtgrid.core.journal import state_dir
from virtgrid.core.units import parse_duration
from virtgrid.grid.messages.network import BRIDGE
from virtgrid.wire.endpoint import GRC, VIRTGRIDD, Endpoint
from virtgrid.wire.pki.places import SYSTEM, Places
from virtgrid.wire.seal import read_public_key

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run a part of the grid: on a host, on a node, for a site, for the network, above them all.",
)

Socket = Annotated[str, typer.Option(metavar="ENDPOINT", help="Where to listen.")]
Store = Annotated[
    Path | None, typer.Option("--database", metavar="FILE", help="What it must not forget; SQLite.")
]


def _log() -> None:
    """Lines for the person on call, on standard error."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


@app.command()
@run
def host(
    crm_key: Annotated[
        Path,
        typer.Option("--crm-key", metavar="FILE", help="Public key of the CRM whose tickets are good here."),
    ] = Path("/etc/virtgrid/crm.pub"),
    bridge: Annotated[
        str, typer.Option(metavar="NAME", help="Bridge of the network with a tag; {tag} stands for it.")
    ] = BRIDGE,
    socket: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Where pilots and network managers reach it.")
    ] = VIRTGRIDD,
    orphan_after: Annotated[
        str, typer.Option(metavar="TIME", help="Remove a sandbox whose pilot has been gone for so long.")
    ] = "60s",
    connect: Annotated[
        str, typer.Option("--connect", "-c", metavar="URI", help="libvirt.")
    ] = "lxc:///system",
) -> None:
    """Be virtgridd: make sandboxes for pilots that hold a ticket, and the segments they are in. As root."""
    from virtgrid.host.carrier import Kernel
    from virtgrid.host.daemon import Virtgridd, serve
    from virtgrid.host.guests import Libvirt
    from virtgrid.host.networks import Networks
    from virtgrid.host.tenancies import Tenancies

    if os.geteuid() != 0:
        raise RefusedError("virtgridd makes mounts and domains: it runs as root", hint="run it with sudo")
    _log()
    where = Endpoint.parse(socket)
    key = read_public_key(crm_key)
    orphan_s = parse_duration(orphan_after)

    async def main() -> None:
        daemon = Virtgridd(
            where=where,
            keys=[key],
            bridge=bridge,
            libvirt=Libvirt(connect),
            tenancies=Tenancies(),
            networks=Networks(Kernel(), bridge=bridge),
            orphan_s=orphan_s,
        )
        await serve(daemon, ready=lambda: logging.info("ready at %s", where))

    asyncio.run(main())


@app.command()
@run
def node(
    crm: Annotated[str, typer.Option(metavar="ENDPOINT", help="The CRM to dial.")],
    ticket: Annotated[
        Path, typer.Option(metavar="FILE", help="The ticket, a file of mode 0600.", envvar="VIRTGRID_TICKET")
    ],
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What it must not forget; each pilot has its own.")
    ] = None,
    host_socket: Annotated[str, typer.Option("--host", metavar="ENDPOINT", help="virtgridd.")] = VIRTGRIDD,
    pki: Annotated[
        Path, typer.Option(metavar="DIR", help="Whom this host trusts, for a CRM at tls://….")
    ] = SYSTEM,
) -> None:
    """Be the NodeManager of one reservation on this node: the pilot job. As the user it is for."""
    from virtgrid.grid.messages import ticket as tickets
    from virtgrid.grid.node.serve import serve

    _log()
    if directory is None:
        directory = state_dir() / "pilots" / tickets.read(ticket)[1].sandbox
    asyncio.run(
        serve(
            ticket_file=ticket,
            directory=directory,
            crm=Endpoint.parse(crm),
            host=Endpoint.parse(host_socket),
            pki=Places(pki),
        )
    )


@app.command()
@run
def crm(
    site: Annotated[str, typer.Option(metavar="NAME", help="What coordinators call the site.")],
    node: Annotated[
        list[str], typer.Option("--node", metavar="NAME", help="A node to give; may be said again.")
    ],
    addresses: Annotated[
        list[str],
        typer.Option(metavar="RANGE", help="Advertised for nodes: 10.77.1.0/24; may be said again."),
    ],
    socket: Socket = "unix:/run/virtgrid/crm.sock",
    database: Store = None,
) -> None:
    """Be the compute manager of a site: promise its nodes and addresses to coordinators."""
    from virtgrid.grid.crm.stock import SiteStock
    from virtgrid.grid.messages.coalloc import Party
    from virtgrid.grid.messages.common import HostName, require
    from virtgrid.grid.provide import serve

    require(Party, "--site", site)
    for name in node:
        require(HostName, "--node", name)
    _log()
    where = Endpoint.parse(socket)
    asyncio.run(
        serve(
            party=site,
            database=database or state_dir() / f"crm-{site}.db",
            stock=SiteStock(nodes=node, ranges=addresses),
            where=where,
            ready=lambda: logging.info("ready at %s", where),
        )
    )


@app.command()
@run
def nrm(
    link: Annotated[
        list[str],
        typer.Option(metavar="SITE:SITE=RATE", help="alpha:beta=1gbit, each way; may be said again."),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="What coordinators call it.")] = "network",
    segments: Annotated[
        str, typer.Option(metavar="FIRST-LAST", help="VLAN tags or VXLAN numbers it may give out.")
    ] = "1000-4094",
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=ADDRESS@ENDPOINT",
            help="A host that gets segments: its address for tunnels, and its virtgridd; may be said again.",
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=CIDR", help="What else of a site is reached over its links; may be said again."
        ),
    ] = None,
    mtu: Annotated[int, typer.Option(metavar="BYTES", help="What the networks between hosts carry.")] = 1500,
    socket: Socket = "unix:/run/virtgrid/nrm.sock",
    database: Store = None,
) -> None:
    """Be the network manager: promise segments, and bandwidth between sites; have hosts make them."""
    from virtgrid.grid.messages.coalloc import Party
    from virtgrid.grid.messages.common import require
    from virtgrid.grid.nrm.hosts import Hosts
    from virtgrid.grid.nrm.orders import Topology, parse_host, parse_networks
    from virtgrid.grid.nrm.stock import NetworkStock, parse_link, parse_segments
    from virtgrid.grid.provide import serve

    require(Party, "--name", name)
    links = dict(map(parse_link, link))
    topology = Topology(
        links=links,
        hosts=tuple(map(parse_host, host or [])),
        networks=parse_networks(network or []),
        path_mtu=mtu,
    )
    stock = NetworkStock(links=topology.promised(), segments=parse_segments(segments))
    _log()
    where = Endpoint.parse(socket)
    asyncio.run(
        serve(
            party=name,
            database=database or state_dir() / f"nrm-{name}.db",
            stock=stock,
            where=where,
            ready=lambda: logging.info("ready at %s", where),
            beside=(lambda promises: Hosts(name, topology, promises)) if topology.hosts else None,
        )
    )


@app.command()
@run
def grc(
    crm: Annotated[
        list[str],
        typer.Option(metavar="SITE=ENDPOINT", help="A site and its CRM; may be said again."),
    ],
    nrm: Annotated[
        str | None, typer.Option(metavar="NAME=ENDPOINT", help="The network manager, if there is one.")
    ] = None,
    socket: Socket = GRC,
    database: Store = None,
) -> None:
    """Be the coordinator: reserve at several sites and between them, all or nothing."""
    from virtgrid.grid.grc.desk import serve
    from virtgrid.grid.grc.parties import parse_party

    sites = dict(map(parse_party, crm))
    network = None if nrm is None else parse_party(nrm)
    _log()
    where = Endpoint.parse(socket)
    asyncio.run(
        serve(
            database=database or state_dir() / "grc.db",
            sites=sites,
            network=network,
            where=where,
            ready=lambda: logging.info("ready at %s", where),
        )
    )
