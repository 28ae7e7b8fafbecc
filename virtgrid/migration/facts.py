"""Gathering what preflight judges, from both hosts; nothing is changed on either.

The one exception is a transient storage pool, made to look into a directory on the destination
and dropped again at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from virtgrid.core.errors import UsageError, VirtgridError
from virtgrid.migration.flip import look_for_way
from virtgrid.migration.guestname import name_facts
from virtgrid.migration.plan import Facts, HostFacts, MigrationRequest, WanFacts, migrate_uri_for
from virtgrid.migration.running import running_migration
from virtgrid.migration.share import look_at_wan
from virtgrid.net.flip import Way
from virtgrid.virt import host, storagecopy
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import ABSENT, Domain, position
from virtgrid.virt.domxml import Disk, DomainXml, Nic

_RESOLVE_DEADLINE_S: Final = 5.0
_HOOK: Final = Path("/etc/libvirt/hooks")


async def gather(
    request: MigrationRequest, source: Hypervisor, destination: Hypervisor, domain: Domain, *, own_id: str
) -> Facts:
    """Ask both hosts. Errors: PeerUnreachableError; NotFoundError; UsageError for an unknown disk."""
    token = own_id.partition("-")[0]
    other = running_migration(domain.uuid)
    xml = await domain.xml()
    source_facts, destination_facts = await asyncio.gather(
        _host_facts(source, local=True), _host_facts(destination, local=False)
    )
    source_position = await position(source, domain.uuid)
    migrate_uri = migrate_uri_for(request.dest_uri, request.migrate_uri)
    migrate_host = urlsplit(migrate_uri).hostname if migrate_uri else None
    machine_known, _ = await host.machine_known(destination, xml)
    cpu_compatible, cpu_text = await host.cpu_compatible(destination, xml)
    disks, problems = await _disks(request, domain, xml)
    same_host = source_facts.host_uuid == destination_facts.host_uuid
    targets, backings = [], []
    if not same_host:
        for disk in disks:
            targets.append(await storagecopy.inspect_target(destination, disk.path, token=token))
            if disk.backing:
                backings.append(await storagecopy.inspect_target(destination, disk.backing, token=token))
    tap, tap_problem = tap_of(xml, request.tap)
    way, way_text = await _way(request, tap if tap_problem is None else None, migrate_host, destination_facts)
    hook_text, hook_warning = hook_state()
    return Facts(
        source=source_facts,
        destination=destination_facts,
        xml=xml,
        source_position=source_position,
        destination_position=ABSENT if same_host else await position(destination, domain.uuid),
        destination_name_taken_by=await host.name_owner(destination, request.destination_name or xml.name),
        migrate_uri=migrate_uri,
        migrate_host_resolves=await resolves(migrate_host) if migrate_host else None,
        cpu_compatible=cpu_compatible,
        cpu_text=cpu_text,
        machine_known=machine_known,
        disks=tuple(disks),
        disk_problems=tuple(problems),
        targets=tuple(targets),
        backings=tuple(backings),
        tap=tap,
        tap_visible=tap_problem is None,
        tap_problem=tap_problem,
        way=way,
        way_text=way_text,
        hook_text=hook_text,
        hook_warning=hook_warning,
        other_migration=other if other != own_id else None,
        name=await name_facts(request.dns),
        wan=await _wan(request, migrate_host, destination_facts),
    )


async def resolves(name: str) -> bool:
    """Whether this host can turn a name into an address, within a deadline."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVE_DEADLINE_S):
            return bool(await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except (OSError, TimeoutError, UnicodeError):
        return False


async def _way(
    request: MigrationRequest, nic: Nic | None, migrate_host: str | None, destination: HostFacts
) -> tuple[Way | None, str]:
    """(How the guest's frames can get to the destination while it is stopped, why or why not)."""
    if request.flip == "off":
        return None, "not wanted (--flip off)"
    if not request.gated:
        return None, "plain libvirt (--policy immediate): nothing is let go, so nothing is flipped"
    if nic is None:
        return None, "its tap is not to be seen"
    hosts = tuple(name for name in (migrate_host, destination.hostname) if name)
    try:
        async with asyncio.timeout(_RESOLVE_DEADLINE_S):
            return await asyncio.to_thread(look_for_way, nic, hosts)
    except TimeoutError:
        return None, "the destination's name could not be resolved in time"


async def _wan(request: MigrationRequest, migrate_host: str | None, destination: HostFacts) -> WanFacts:
    """The way to the destination, and whether it can be shared."""
    hosts = tuple(name for name in (migrate_host, destination.hostname) if name)
    try:
        async with asyncio.timeout(_RESOLVE_DEADLINE_S):
            return await asyncio.to_thread(look_at_wan, request, hosts)
    except TimeoutError:
        return WanFacts(problem="the destination's name could not be resolved in time")


async def _host_facts(hypervisor: Hypervisor, *, local: bool) -> HostFacts:
    hostname = await hypervisor.hostname()
    libvirt_version, qemu_version = await host.versions(hypervisor)
    return HostFacts(
        uri=hypervisor.uri,
        hostname=hostname,
        host_uuid=await host.host_uuid(hypervisor),
        libvirt_version=libvirt_version,
        qemu_version=qemu_version,
        round_trip_s=await hypervisor.round_trip_s(),
        address_resolves=None if local else await resolves(hostname),
    )


async def _disks(
    request: MigrationRequest, domain: Domain, xml: DomainXml
) -> tuple[list[storagecopy.DiskCopy], list[str]]:
    if request.copy_storage is None:
        return [], []
    known = {disk.target for disk in xml.disks}
    for name in request.migrate_disks or ():
        if name not in known:
            raise UsageError(
                f"--migrate-disks: {xml.name} has no disk '{name}'",
                hint=f"it has: {', '.join(sorted(known))}",
            )
    chosen, problems = storagecopy.disks_to_copy(xml.disks, request.migrate_disks)
    copies = []
    for disk in chosen:
        copies.append(await _disk_copy(request, domain, disk))
    return copies, problems


async def _disk_copy(request: MigrationRequest, domain: Domain, disk: Disk) -> storagecopy.DiskCopy:
    capacity_bytes, allocated_bytes = await domain.disk_sizes(disk.target)
    incremental = request.copy_storage == "inc"
    return storagecopy.DiskCopy(
        target=disk.target,
        path=disk.source or "",
        format=disk.format,
        capacity_bytes=capacity_bytes,
        allocated_bytes=allocated_bytes,
        backing=disk.backing if incremental else None,
        backing_format=disk.backing_format if incremental else None,
    )


def tap_of(xml: DomainXml, device: str | None) -> tuple[Nic | None, str | None]:
    """The interface whose connections are followed -> (nic, problem). device: the tap asked for."""
    nics = [nic for nic in xml.nics if nic.tap]
    if device is not None:
        nics = [nic for nic in nics if nic.tap == device]
        if not nics:
            raise UsageError(f"--tap: {xml.name} has no interface with the device '{device}'")
    if not nics:
        return None, "the domain has no tap device"
    nic = nics[0]
    try:
        socket.if_nametoindex(nic.tap or "")
    except OSError:
        return nic, f"its tap {nic.tap} is not on this host"
    if os.geteuid() != 0:
        return nic, "capturing on its tap needs root"
    return nic, None


def hook_state() -> tuple[str | None, str | None]:
    """What stands in libvirt's hook directory for qemu -> (text, warning)."""
    scripts = [path for path in (_HOOK / "qemu", *sorted((_HOOK / "qemu.d").glob("*"))) if path.is_file()]
    if not scripts:
        return "no qemu hook on this host", None
    inert = [path.name for path in scripts if not os.access(path, os.X_OK)]
    if inert:
        return None, f"qemu hook(s) not executable, libvirt skips them: {', '.join(inert)}"
    return f"qemu hook(s) here: {', '.join(path.name for path in scripts)}", None


async def connect_both(request: MigrationRequest) -> tuple[Hypervisor, Hypervisor]:
    """Control connections to source and destination; both or none."""
    source = await Hypervisor.open(request.source_uri, name="the source")
    try:
        destination = await Hypervisor.open(request.dest_uri, name=f"the destination ({request.dest_uri})")
    except VirtgridError:
        await source.close()
        raise
    return source, destination
