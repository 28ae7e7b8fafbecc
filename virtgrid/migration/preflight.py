"""Preflight: every check a function of the facts, with a verdict, a sentence and a hint. Pure.

FAIL refuses the migration before anything is touched (exit 3; an unreachable peer is 8 and is
found while the facts are gathered). WARN is said and the migration goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtgrid.core.units import format_rate, format_size
from virtgrid.migration.naming import new_records, obstacle, warnings
from virtgrid.migration.plan import MigrationPlan
from virtgrid.virt.domain import DomainState
from virtgrid.wire.dns.records import shown


class CheckVerdict(StrEnum):
    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding: its name, verdict, one sentence, and what to do about it."""

    name: str
    verdict: CheckVerdict
    text: str
    hint: str | None = None


def _pass(name: str, text: str) -> Check:
    return Check(name=name, verdict=CheckVerdict.PASS, text=text)


def _warn(name: str, text: str, hint: str | None = None) -> Check:
    return Check(name=name, verdict=CheckVerdict.WARN, text=text, hint=hint)


def _fail(name: str, text: str, hint: str | None = None) -> Check:
    return Check(name=name, verdict=CheckVerdict.FAIL, text=text, hint=hint)


def preflight(plan: MigrationPlan) -> tuple[Check, ...]:
    """All checks, in the order a person would make them."""
    return tuple(found for check in _CHECKS for found in check(plan))


def failures(checks: tuple[Check, ...]) -> tuple[Check, ...]:
    return tuple(check for check in checks if check.verdict is CheckVerdict.FAIL)


def _hosts(plan: MigrationPlan) -> Iterator[Check]:
    source, destination = plan.facts.source, plan.facts.destination
    if source.host_uuid and source.host_uuid == destination.host_uuid:
        yield _fail(
            "hosts",
            f"{plan.request.dest_uri} is the host the domain already runs on ({source.hostname})",
            "give the URI of another host; every host needs its own host_uuid in libvirtd.conf",
        )
    else:
        yield _pass(
            "hosts",
            f"{source.hostname} → {destination.hostname}, control round trip"
            f" {destination.round_trip_s * 1000:.0f} ms",
        )


def _domain(plan: MigrationPlan) -> Iterator[Check]:
    position = plan.facts.source_position
    if plan.facts.other_migration:
        yield _fail(
            "domain",
            f"{plan.name} is being migrated already ({plan.facts.other_migration})",
            f"virtgrid migration show {plan.name}",
        )
    elif position.job:
        yield _fail(
            "domain",
            f"a job of somebody else is running on {plan.name}",
            f"virsh domjobinfo {plan.name} shows it, virsh domjobabort {plan.name} ends it",
        )
    elif position.state is DomainState.RUNNING:
        yield _pass("domain", f"{plan.name} runs on {plan.facts.source.hostname}")
    else:
        yield _fail(
            "domain",
            f"{plan.name} is {position}, only a running domain can be migrated live",
            f"virsh start {plan.name}, or virsh resume {plan.name}",
        )


def _destination(plan: MigrationPlan) -> Iterator[Check]:
    host, position = plan.facts.destination.hostname, plan.facts.destination_position
    taken = plan.facts.destination_name_taken_by
    if position.active:
        yield _fail(
            "destination",
            f"{plan.name} is already {position} on {host}",
            f"virtgrid migration recover {plan.name} tells which of the two is the right one",
        )
    elif taken and taken != plan.uuid:
        yield _fail(
            "destination",
            f"{host} has another domain named {plan.name} (UUID {taken})",
            "rename one of them, or use --dname",
        )
    elif position.state is DomainState.SHUTOFF:
        yield _warn("destination", f"{host} has {plan.name} defined already; its definition will be replaced")
    else:
        yield _pass("destination", f"no {plan.name} on {host}")


def _address(plan: MigrationPlan) -> Iterator[Check]:
    facts = plan.facts
    announced = facts.destination.hostname
    if facts.migrate_uri is None:
        if facts.destination.address_resolves:
            yield _pass("address", f"{announced}, as the destination announces itself")
        else:
            yield _fail(
                "address",
                f"the destination announces '{announced}', which this host cannot resolve",
                "--migrateuri tcp://ADDRESS, or set migration_host in the destination's qemu.conf",
            )
    elif facts.migrate_host_resolves:
        yield _pass("address", f"{facts.migrate_uri}")
    else:
        yield _fail(
            "address",
            f"{facts.migrate_uri} cannot be resolved on this host",
            "--migrateuri tcp://ADDRESS names another one",
        )


def _tls(plan: MigrationPlan) -> Iterator[Check]:
    """Whether the certificates are there only QEMU can tell, when it is asked to use them."""
    if plan.request.tls:
        expected = plan.request.tls_destination or "its own name"
        yield _pass("tls", f"memory and disks go encrypted, to whoever has a certificate for {expected}")


def _machine(plan: MigrationPlan) -> Iterator[Check]:
    facts = plan.facts
    if facts.machine_known is False:
        yield _fail(
            "machine",
            f"{facts.destination.hostname} has no machine type {facts.xml.machine}",
            "a newer QEMU there, or an older machine type in the domain",
        )
    else:
        yield _pass("machine", facts.xml.machine)


def _cpu(plan: MigrationPlan) -> Iterator[Check]:
    facts = plan.facts
    if facts.cpu_compatible is False:
        yield _fail("cpu", facts.cpu_text, "use a CPU model both hosts offer (virsh hypervisor-cpu-baseline)")
    elif facts.cpu_compatible is None:
        yield _warn("cpu", facts.cpu_text, "a named CPU model or host-model can be compared")
    else:
        yield _pass("cpu", facts.cpu_text)


def _devices(plan: MigrationPlan) -> Iterator[Check]:
    if plan.facts.xml.host_devices:
        yield _fail(
            "devices",
            f"{plan.name} has {plan.facts.xml.host_devices} host device(s) passed through",
            "detach them first: virsh detach-device",
        )
    if plan.request.copy_storage is None:
        local = [
            disk.target
            for disk in plan.facts.xml.disks
            if disk.device == "disk" and disk.kind == "file" and not disk.shareable and not disk.readonly
        ]
        if local:
            yield _warn(
                "storage",
                f"disk(s) {', '.join(local)} are files and will not be copied: both hosts must share them",
                "--copy-storage-all copies them",
            )


def _storage(plan: MigrationPlan) -> Iterator[Check]:
    host = plan.facts.destination.hostname
    for problem in plan.facts.disk_problems:
        yield _fail("storage", problem)
    for backing in plan.facts.backings:
        if not backing.exists:
            yield _fail(
                "storage",
                f"{host} has no backing file {backing.path}",
                "copy it there, or use --copy-storage-all",
            )
    targets = {target.path: target for target in plan.facts.targets}
    free: dict[int, int] = {}
    for disk in plan.facts.disks:
        target = targets.get(disk.path)
        if target is None:
            continue
        if target.problem:
            yield _fail(
                "storage",
                f"{disk.target}: {host} cannot open the directory of {disk.path} ({target.problem})",
                "create the directory there, or a storage pool over it",
            )
        elif (
            target.exists
            and target.capacity_bytes is not None
            and target.capacity_bytes < disk.capacity_bytes
        ):
            yield _fail(
                "storage",
                f"{disk.target}: {disk.path} on {host} is too small"
                f" ({format_size(target.capacity_bytes)} of {format_size(disk.capacity_bytes)})",
                f"remove it there, or: qemu-img resize {disk.path} {disk.capacity_bytes}",
            )
        elif target.exists and target.format and disk.format != target.format:
            yield _fail(
                "storage",
                f"{disk.target}: {disk.path} on {host} is {target.format}, the disk is {disk.format}",
                "remove it there and it will be created",
            )
        else:
            if not target.exists and target.free_bytes is not None:
                # Disks in the same file system see the same free space: count them together.
                free[target.free_bytes] = free.get(target.free_bytes, 0) + disk.allocated_bytes
            made = "there already, will be overwritten" if target.exists else "will be created"
            yield _pass("storage", f"{disk.target}: {format_size(disk.capacity_bytes)} {disk.format}, {made}")
    for free_bytes, needed_bytes in free.items():
        if needed_bytes > free_bytes:
            yield _fail(
                "space",
                f"{host} has {format_size(free_bytes)} free and the disks hold {format_size(needed_bytes)}",
                "make room there, or choose another destination",
            )


def _connections(plan: MigrationPlan) -> Iterator[Check]:
    facts = plan.facts
    if facts.tap_visible and facts.tap is not None:
        yield _pass("connections", f"followed on {facts.tap.tap} ({facts.tap.mac})")
    elif plan.request.gated:
        yield _fail(
            "connections",
            f"the guest's connections cannot be followed: {facts.tap_problem}",
            "run virtgrid on the source host as root, or use --policy immediate",
        )
    else:
        yield _warn("connections", f"the guest's connections are not followed: {facts.tap_problem}")


def _share(plan: MigrationPlan) -> Iterator[Check]:
    sharing, wan = plan.request.sharing, plan.facts.wan
    if sharing is None:
        return
    part = f"{format_rate(sharing.service_bytes_s)} of {format_rate(sharing.link_bytes_s)}"
    if wan.uplink is None:
        why = wan.problem or "the way to the destination is not known"
        yield _warn("share", f"only QEMU's own limit keeps {part} for the service: {why}", wan.hint)
    else:
        yield _pass("share", f"{part} are the service's, on {wan.uplink.interface}")


def _hooks(plan: MigrationPlan) -> Iterator[Check]:
    if plan.facts.hook_warning:
        yield _warn("hooks", plan.facts.hook_warning, "restart libvirtd to make it read its hooks again")
    elif plan.facts.hook_text:
        yield _pass("hooks", plan.facts.hook_text)


def _name(plan: MigrationPlan) -> Iterator[Check]:
    asked, facts = plan.request.dns, plan.facts.name
    if asked is None or facts is None:
        return
    if facts.entry is None:
        yield _fail("name", facts.problem or f"nothing is known of {asked.name}", facts.hint)
        return
    if found := obstacle(asked, facts.entry):
        yield _fail("name", *found)
        return
    wanted = new_records(asked.addresses, facts.entry)
    now = facts.entry.of_kinds(record.kind for record in wanted)
    yield _pass("name", f"{asked.name} {shown(now)} → {shown(wanted)}, at {asked.server}")
    for text, hint in warnings(asked, facts.entry):
        yield _warn("name", text, hint)


_CHECKS: Final[tuple[Callable[[MigrationPlan], Iterator[Check]], ...]] = (
    _hosts, _domain, _destination, _address, _tls, _machine, _cpu, _devices, _storage, _connections, _share,
    _hooks, _name,
)  # fmt: skip
