"""``virtgrid serve``: the programs that run for long, on hosts, nodes and sites and above them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from virtgrid.cli.output import run
from virtgrid.config import load
from virtgrid.core.errors import PeerUnreachableError, RefusedError, UsageError
from virtgrid.core.journal import state_dir
from virtgrid.core.units import parse_duration, parse_size
from virtgrid.grid.doors import Network, identity, told_of
from virtgrid.grid.messages.network import BRIDGE
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Role
from virtgrid.wire.pki.places import SYSTEM, Places
from virtgrid.wire.seal import read_private_key, read_public_key
from virtgrid.wire.wellknown import GRC, VIRTGRIDD

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Run a part of the grid: on a host, on a node, for a site, for the network, above them all.",
)

Socket = Annotated[str, typer.Option(metavar="ENDPOINT", help="Where to listen on this host.")]
Listen = Annotated[
    str | None,
    typer.Option("--listen", metavar="ENDPOINT", help="Also over the network: tls://HOST:PORT."),
]
Pki = Annotated[
    Path, typer.Option("--pki", metavar="DIR", help="Where its certificate is (virtgrid pki); for tls://….")
]
Told = Annotated[
    list[str] | None,
    typer.Option(
        "--grc",
        metavar="WHO",
        help="A coordinator it hears: virtgrid://SITE/grc/NAME, uid:N on this host; may be said again.",
    ),
]
Store = Annotated[
    Path | None, typer.Option("--database", metavar="FILE", help="What it must not forget; SQLite.")
]


_CRM_KEY: Final = Path("/etc/virtgrid/crm.pub")


class Whose(StrEnum):
    """Whose nodes a site gives out."""

    EMBEDDED = "embedded"
    SLURM = "slurm"


def log() -> None:
    """Lines for the person on call, on standard error."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _in_network(listen: str) -> Endpoint:
    where = Endpoint.parse(listen)
    if not where.is_network:
        raise UsageError(
            f"--listen: {where} is no place in a network", hint="tls://0.0.0.0:7430, for instance"
        )
    return where


def _provider_network(
    listen: str | None,
    pki: Path,
    role: Role,
    told: frozenset[str],
    site: str | None = None,
    *,
    heard: Role = Role.GRC,
) -> Network | None:
    """Where a CRM, an NRM or a host is found, for whoever it hears. Errors: UsageError, RefusedError
    (certificate).
    """
    if listen is None:
        return None
    if not any(who.startswith("virtgrid:") for who in told):
        raise UsageError(
            f"--listen without a --{heard} that may call from the network",
            hint=f"--{heard} virtgrid://SITE/{heard}/NAME; virtgrid pki show says it where that one runs",
        )
    return Network(where=_in_network(listen), tls=identity(pki, role, site=site))


@app.command()
@run
def host(
    crm_key: Annotated[
        Path | None,
        typer.Option(
            "--crm-key",
            metavar="FILE",
            help=f"Public key of the CRM whose tickets are good here ({_CRM_KEY}, if it is there).",
        ),
    ] = None,
    bridge: Annotated[
        str, typer.Option(metavar="NAME", help="Bridge of the network with a tag; {tag} stands for it.")
    ] = BRIDGE,
    socket: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Where pilots and network managers reach it.")
    ] = VIRTGRIDD,
    listen: Listen = None,
    pki: Pki = SYSTEM,
    nrm: Annotated[
        list[str] | None,
        typer.Option(
            "--nrm",
            metavar="WHO",
            help="A network manager it hears: virtgrid://SITE/nrm/NAME or uid:N; may be said again.",
        ),
    ] = None,
    orphan_after: Annotated[
        str, typer.Option(metavar="TIME", help="Remove a sandbox whose pilot has been gone for so long.")
    ] = "60s",
    connect: Annotated[
        str, typer.Option("--connect", "-c", metavar="URI", help="libvirt.")
    ] = "lxc:///system",
    qemu: Annotated[
        str, typer.Option("--qemu", metavar="URI", help="libvirt, whose domains are migrated away.")
    ] = "qemu:///system",
) -> None:
    """Be virtgridd: sandboxes for who holds a ticket, their segments, and a queue of migrations. As root."""
    from virtgrid.host.carrier import Kernel
    from virtgrid.host.daemon import Virtgridd, serve
    from virtgrid.host.entries import Entries
    from virtgrid.host.guests import Libvirt
    from virtgrid.host.mover import Mover
    from virtgrid.host.networks import Networks
    from virtgrid.host.tenancies import Tenancies

    if os.geteuid() != 0:
        raise RefusedError("virtgridd makes mounts and domains: it runs as root", hint="run it with sudo")
    log()
    where = Endpoint.parse(socket)
    if crm_key is None and _CRM_KEY.exists():
        crm_key = _CRM_KEY
    keys = [] if crm_key is None else [read_public_key(crm_key)]
    mover = Mover(load().config, Entries(), uri=qemu)
    orphan_s = parse_duration(orphan_after)
    managers = frozenset(told_of(who, Role.NRM) for who in nrm or [])
    network = _provider_network(listen, pki, Role.HOST, managers, heard=Role.NRM)

    async def main() -> None:
        daemon = Virtgridd(
            where=where,
            keys=keys,
            bridge=bridge,
            libvirt=Libvirt(connect),
            tenancies=Tenancies(),
            networks=Networks(Kernel(), bridge=bridge),
            orphan_s=orphan_s,
            network=network,
            managers=managers,
            mover=mover,
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

    log()
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
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Signs its pilots' tickets. Without: it promises, and runs no jobs."
        ),
    ] = None,
    pilots: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Where its pilots dial in.")
    ] = "unix:/run/virtgrid/pilots.sock",
    account: Annotated[
        list[str] | None,
        typer.Option(metavar="USER=ACCOUNT", help="A user who is called otherwise here; may be said again."),
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of each sandbox.")] = "512MiB",
    host_socket: Annotated[
        str, typer.Option("--host", metavar="ENDPOINT", help="Where pilots find virtgridd.")
    ] = VIRTGRIDD,
    backend: Annotated[
        Whose, typer.Option(help="Whose the nodes are: this very host's, or Slurm's.")
    ] = Whose.EMBEDDED,
    slurm_conf: Annotated[
        Path | None, typer.Option(metavar="FILE", help="slurm.conf, where Slurm would not find it itself.")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="For pilots; else Slurm's default partition.")
    ] = None,
    guard: Annotated[
        str, typer.Option(metavar="TIME", help="Reserved at Slurm beyond a window's end, to clear up.")
    ] = "1m",
    spool: Annotated[
        Path, typer.Option(metavar="DIR", help="For pilots' tickets and logs; Slurm's nodes share it.")
    ] = Path("/var/spool/virtgrid/pilots"),
    socket: Socket = "unix:/run/virtgrid/crm.sock",
    database: Store = None,
    listen: Listen = None,
    pki: Pki = SYSTEM,
    grc: Told = None,
) -> None:
    """Be the compute manager of a site: promise its nodes and addresses, and run jobs on them.

    Embedded, the nodes are places for sandboxes on this very host, and pilots ordinary processes of their
    user. With Slurm a promise is an advance reservation, and a pilot a job in it.
    """
    from virtgrid.grid.messages.coalloc import Party
    from virtgrid.grid.messages.common import HostName, require

    require(Party, "--site", site)
    for name in node:
        require(HostName, "--node", name)
    told = frozenset(map(told_of, grc or []))
    log()
    where, file = Endpoint.parse(socket), database or state_dir() / f"crm-{site}.db"
    network = _provider_network(listen, pki, Role.CRM, told, site)

    def ready() -> None:
        logging.info("ready at %s", where)

    if key is None and backend is Whose.SLURM:
        raise UsageError("--backend slurm needs a key", hint="virtgrid ticket new-key makes one")
    if backend is Whose.SLURM and os.geteuid() != 0:
        raise RefusedError(
            "with Slurm a site's manager makes reservations, and jobs of others: it runs as root",
            hint="run it with sudo",
        )
    if not 0 <= parse_duration(guard) <= 3600:
        raise UsageError("--guard: between 0 and an hour", hint="1m is the default")
    if key is None:
        from virtgrid.grid import provide
        from virtgrid.grid.crm.site import no_jobs
        from virtgrid.grid.crm.stock import SiteStock
        from virtgrid.grid.messages.job import CREW_PARAMS

        stock, more = SiteStock(nodes=node, ranges=addresses), (CREW_PARAMS, no_jobs)
        asyncio.run(
            provide.serve(
                party=site,
                database=file,
                stock=stock,
                where=where,
                ready=ready,
                network=network,
                told=told,
                more=more,
            )
        )
        return
    from virtgrid.core.process import allow_files
    from virtgrid.grid.crm.backend import Backend
    from virtgrid.grid.crm.crew import Terms
    from virtgrid.grid.crm.site import serve
    from virtgrid.grid.messages import ticket as tickets
    from virtgrid.grid.pilots import PILOTS_LIMIT
    from virtgrid.wire.tls import Tls

    allow_files(2 * PILOTS_LIMIT)
    signing, dialled = read_private_key(key), Endpoint.parse(pilots)
    tls = None
    if dialled.is_network:
        tls = Tls(Places(pki).files(Role.CRM), pilots=tickets.issuer(signing, site).certificate)
    terms = Terms(site=site, key=signing, crm=dialled, memory_bytes=parse_size(memory), processes=4096)
    accounts = dict(_account(text) for text in account or [])
    host, guard_s = Endpoint.parse(host_socket), round(parse_duration(guard))

    async def behind() -> Backend:
        if backend is Whose.EMBEDDED:
            from virtgrid.grid.crm.embedded import DIRECTORY, Embedded

            places = DIRECTORY if os.geteuid() == 0 else state_dir() / "pilots-of-crm"
            return Embedded(nodes=node, host=host, directory=places)
        from virtgrid.grid.crm.slurm.backend import SlurmBackend
        from virtgrid.grid.crm.slurm.tools import Slurm

        made = SlurmBackend(
            site=site, nodes=node, host=host, slurm=Slurm(slurm_conf), directory=spool, guard_s=guard_s,
            partition=partition,
        )  # fmt: skip
        try:
            await made.prepare()
        except PeerUnreachableError as error:
            logging.warning("%s; going on without it", error)
        return made

    async def main() -> None:
        await serve(
            party=site,
            database=file,
            backend=await behind(),
            ranges=addresses,
            terms=terms,
            directory=file.with_suffix(""),
            accounts=accounts,
            tls=tls,
            where=where,
            network=network,
            told=told,
            ready=ready,
        )

    asyncio.run(main())


def _account(text: str) -> tuple[str, str]:
    user, found, account = text.partition("=")
    if not found or not user or not account:
        raise UsageError(f"--account: '{text[:80]}' is not USER=ACCOUNT", hint="ann=guest07, for instance")
    return user, account


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
    listen: Listen = None,
    pki: Pki = SYSTEM,
    grc: Told = None,
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
    far = any(Endpoint.parse(one.where).is_network for one in topology.hosts)
    us = identity(pki, Role.NRM) if far else None
    stock = NetworkStock(links=topology.promised(), segments=parse_segments(segments))
    told = frozenset(map(told_of, grc or []))
    log()
    where = Endpoint.parse(socket)
    there = _provider_network(listen, pki, Role.NRM, told)
    asyncio.run(
        serve(
            party=name,
            database=database or state_dir() / f"nrm-{name}.db",
            stock=stock,
            where=where,
            network=there,
            told=told,
            ready=lambda: logging.info("ready at %s", where),
            beside=(lambda promises: Hosts(name, topology, promises, tls=us)) if topology.hosts else None,
        )
    )


@app.command()
@run
def grc(
    crm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SITE=ENDPOINT", help="A site and its CRM, besides those that joined; may be said again."
        ),
    ] = None,
    nrm: Annotated[
        str | None, typer.Option(metavar="NAME=ENDPOINT", help="The network manager, if there is one.")
    ] = None,
    socket: Socket = GRC,
    database: Store = None,
    listen: Listen = None,
    pki: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where its certificate is, to dial and to listen over the network. Default then: /etc/pki.",
        ),
    ] = None,
) -> None:
    """Be the coordinator: reserve at several sites and between them, all or nothing."""
    from virtgrid.grid.grc.desk import serve
    from virtgrid.grid.grc.ledger import quotas_of
    from virtgrid.grid.grc.parties import parse_party

    sites = dict(map(parse_party, crm or []))
    if len(sites) < len(crm or []):
        raise UsageError("--crm: a site stands there twice", hint="each site has one CRM")
    network = None if nrm is None else parse_party(nrm)
    loaded = load()
    quotas = quotas_of(loaded.config.quota, loaded.path)
    log()
    where = Endpoint.parse(socket)
    asyncio.run(
        serve(
            database=database or state_dir() / "grc.db",
            journals=(database or state_dir() / "grc.db").with_suffix("") / "jobs",
            pki=pki,
            listen=None if listen is None else _in_network(listen),
            quotas=quotas,
            sites=sites,
            network=network,
            where=where,
            ready=lambda: logging.info("ready at %s", where),
        )
    )
