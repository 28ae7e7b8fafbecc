"""One domain on one hypervisor: libvirt's verbs in our words, each with a deadline."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

import libvirt

from virtgrid.core.errors import NotFoundError, VirtgridError
from virtgrid.virt import domxml
from virtgrid.virt.connection import CALL_DEADLINE_S, Hypervisor

T = TypeVar("T")


class DomainState(StrEnum):
    """What a host says of a domain. ``absent``: the host knows no such domain."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUTOFF = "shut off"
    CRASHED = "crashed"
    OTHER = "other"
    ABSENT = "absent"


_STATES: Final = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.RUNNING,  # shutting down, but there
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.SHUTOFF,
    libvirt.VIR_DOMAIN_CRASHED: DomainState.CRASHED,
}

_PAUSE_REASONS: Final = {
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION: "migration",
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY: "postcopy",
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED: "postcopy failed",
    libvirt.VIR_DOMAIN_PAUSED_USER: "user",
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: "I/O error",
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP: "starting up",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """What one host says of one domain. reason: why it is paused, in a word; job: a job runs."""

    state: DomainState
    reason: str = ""
    persistent: bool = False
    job: bool = False

    @property
    def beginning(self) -> bool:
        """libvirt is about to start its QEMU, or died while it was."""
        return self.reason == _PAUSE_REASONS[libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]

    @property
    def active(self) -> bool:
        return self.state in (DomainState.RUNNING, DomainState.PAUSED, DomainState.CRASHED, DomainState.OTHER)

    def __str__(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else str(self.state)


class Scope(StrEnum):
    """Which of a domain's two definitions is meant, as virsh's options say it."""

    CURRENT = "current"
    LIVE = "live"
    CONFIG = "config"


_AFFECT: Final = {
    Scope.CURRENT: libvirt.VIR_DOMAIN_AFFECT_CURRENT,
    Scope.LIVE: libvirt.VIR_DOMAIN_AFFECT_LIVE,
    Scope.CONFIG: libvirt.VIR_DOMAIN_AFFECT_CONFIG,
}

ABSENT: Final = Position(state=DomainState.ABSENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a domain had done at a moment.

    used_s: what its processors ran or waited to run; got, sent: frames of one card, as the guest counts them.
    """

    at_s: float
    used_s: float
    vcpus: int
    got: int
    sent: int

    def busy_since(self, before: Activity) -> float:
        """The share of its processors' time it used since then, 0 to 1."""
        whole_s = (self.at_s - before.at_s) * max(1, self.vcpus)
        return min(1.0, max(0.0, (self.used_s - before.used_s) / whole_s)) if whole_s > 0 else 0.0


class Domain:
    """A domain found on a hypervisor. Its uuid is what identifies it on both hosts."""

    def __init__(self, hypervisor: Hypervisor, *, uuid: str, name: str) -> None:
        self.hypervisor = hypervisor
        self.uuid = uuid
        self.name = name

    @classmethod
    async def find(cls, hypervisor: Hypervisor, reference: str) -> Domain:
        """By UUID, by id (of a running domain), or by name, in the order virsh uses: id, UUID, name."""

        def look_up(raw: Any) -> tuple[str, str] | None:
            attempts: list[Callable[[], Any]] = [lambda: raw.lookupByName(reference)]
            if len(reference) == 36 and reference.count("-") == 4:
                attempts.insert(0, lambda: raw.lookupByUUIDString(reference))
            if reference.isascii() and reference.isdigit() and len(reference) < 10:
                attempts.insert(0, lambda: raw.lookupByID(int(reference)))
            for attempt in attempts:
                try:
                    found = attempt()
                except libvirt.libvirtError as error:
                    if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG):
                        raise
                else:
                    return found.UUIDString(), found.name()
            return None

        found = await hypervisor.call(look_up, f"cannot look up domain '{reference}'")
        if found is None:
            raise NotFoundError(
                f"no domain '{reference}' on {hypervisor.name}",
                hint=f"virsh -c '{hypervisor.uri}' list --all shows those it knows",
            )
        return cls(hypervisor, uuid=found[0], name=found[1])

    async def call(self, fn: Callable[[Any], T], what: str, *, deadline_s: float = CALL_DEADLINE_S) -> T:
        """Run ``fn(raw domain)`` in the connection's thread. ``what``: the sentence of an error."""
        return await self.hypervisor.call(
            lambda raw: fn(raw.lookupByUUIDString(self.uuid)), what, deadline_s=deadline_s
        )

    async def xml(self, *, inactive: bool = False) -> domxml.DomainXml:
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
        return domxml.parse(
            await self.call(lambda dom: str(dom.XMLDesc(flags)), f"cannot read the XML of {self.name}")
        )

    async def metadata(self, namespace: str, scope: Scope = Scope.CURRENT) -> str | None:
        """The element of this namespace in its <metadata>, without the namespace; None: there is none."""

        def ask(dom: Any) -> str | None:
            try:
                return str(dom.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, namespace, _AFFECT[scope]))
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    return None
                raise

        return await self.call(ask, f"cannot read the metadata of {self.name}")

    async def set_metadata(
        self, namespace: str, prefix: str, element: str | None, scopes: Sequence[Scope]
    ) -> None:
        """Replace that element, or remove it (None). element: without a namespace; libvirt puts it in."""
        flags = functools.reduce(operator.or_, (_AFFECT[scope] for scope in scopes), 0)
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        await self.call(
            lambda dom: dom.setMetadata(kind, element, prefix, namespace, flags),
            f"cannot set the metadata of {self.name}",
        )

    async def suspend(self) -> None:
        await self.call(lambda dom: dom.suspend(), f"cannot suspend {self.name}")

    async def resume(self) -> None:
        await self.call(lambda dom: dom.resume(), f"cannot resume {self.name}")

    async def destroy(self, *, deadline_s: float = 30) -> None:
        """Pull the plug; the domain's process ends."""
        await self.call(lambda dom: dom.destroy(), f"cannot destroy {self.name}", deadline_s=deadline_s)

    async def abort_job(self) -> None:
        """Cancel the migration job; no job is not an error (it may just have ended)."""

        def abort(dom: Any) -> None:
            try:
                dom.abortJob()
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    libvirt.VIR_ERR_NO_DOMAIN,
                ):
                    raise

        await self.call(abort, f"cannot abort the migration of {self.name}")

    async def max_downtime_s(self) -> float:
        return (
            int(await self.call(lambda dom: dom.migrateGetMaxDowntime(0), "cannot read the downtime limit"))
            / 1000
        )

    async def set_max_downtime(self, seconds: float) -> None:
        """The downtime limit QEMU completes within; libvirt counts whole milliseconds, at least 1."""
        milliseconds = max(1, round(seconds * 1000))
        await self.call(
            lambda dom: dom.migrateSetMaxDowntime(milliseconds, 0), "cannot set the downtime limit"
        )

    async def frames_from_guest(self, tap: str) -> int:
        """Frames the guest has sent on this tap so far (libvirt counts from the guest's side)."""
        stats = await self.call(lambda dom: dom.interfaceStats(tap), f"cannot read the counters of {tap}")
        return int(stats[5])

    async def set_link(self, mac: str, *, up: bool) -> None:
        """Plug the cable of an interface in or out, as virsh domif-setlink does. Errors: NotFoundError."""
        link = "up" if up else "down"

        def change(dom: Any) -> bool:
            device = domxml.interface_xml(str(dom.XMLDesc(0)), mac, link=link)
            if device is not None:
                dom.updateDeviceFlags(device, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            return device is not None

        if not await self.call(change, f"cannot put the link of {mac} {link}"):
            raise NotFoundError(f"{self.name} has no interface {mac}")

    async def activity(self, tap: str | None) -> Activity:
        """What it has done so far: see ``Activity``."""

        def ask(dom: Any) -> Activity:
            stats = dom.interfaceStats(tap) if tap else None
            [(_, told)] = dom.connect().domainListGetStats([dom], libvirt.VIR_DOMAIN_STATS_VCPU)
            vcpus = int(told.get("vcpu.current", 1))
            # What a processor of a busy host was kept waiting it would have used.
            used_ns = sum(told.get(f"vcpu.{n}.{of}", 0) for n in range(vcpus) for of in ("time", "delay"))
            return Activity(
                at_s=time.monotonic(),
                used_s=used_ns / 1e9,
                vcpus=vcpus,
                got=int(stats[1]) if stats else 0,
                sent=int(stats[5]) if stats else 0,
            )

        return await self.call(ask, f"cannot read what {self.name} does")

    async def completed_bytes(self) -> int | None:
        """Bytes the migration that brought the domain here sent: memory and disks. None: unknown."""

        def ask(dom: Any) -> int | None:
            stats = dom.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
            memory, disk = stats.get("memory_processed"), stats.get("disk_processed", 0)
            return None if memory is None else int(memory) + int(disk)

        return await self.call(ask, f"cannot read the statistics of {self.name}")

    async def disk_sizes(self, target: str) -> tuple[int, int]:
        """(virtual size, allocated on the host) of a disk in bytes."""
        info = await self.call(lambda dom: dom.blockInfo(target), f"cannot read the size of disk {target}")
        return int(info[0]), int(info[1])


async def running_domains(hypervisor: Hypervisor) -> list[Domain]:
    """All that run on this host, by name."""

    def ask(raw: Any) -> list[tuple[str, str]]:
        flags = libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE
        return [(dom.name(), dom.UUIDString()) for dom in raw.listAllDomains(flags)]

    found = await hypervisor.call(ask, f"cannot list the domains of {hypervisor.name}", deadline_s=30)
    return [Domain(hypervisor, uuid=uuid, name=name) for name, uuid in sorted(found)]


def _has_job(dom: Any) -> bool:
    try:
        return bool(dom.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
    except libvirt.libvirtError as error:
        # What arrives has a job too, only no figures: those are the other side's.
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return True
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:  # a driver that knows no jobs has none
            return False
        raise


async def position(hypervisor: Hypervisor, uuid: str) -> Position:
    """Where things stand for a domain on this host. Absent is an answer, not an error.

    Errors: PeerUnreachableError or DeadlineError: then nothing is known.
    """

    def look(raw: Any) -> Position:
        try:
            dom = raw.lookupByUUIDString(uuid)
            state, reason = dom.state()
            job = bool(dom.isActive()) and _has_job(dom)
            persistent = bool(dom.isPersistent())
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                return ABSENT
            raise
        named = _PAUSE_REASONS.get(reason, "") if state == libvirt.VIR_DOMAIN_PAUSED else ""
        return Position(
            state=_STATES.get(state, DomainState.OTHER), reason=named, persistent=persistent, job=job
        )

    return await hypervisor.call(look, f"cannot ask {hypervisor.name} about the domain")


async def look(uri: str, uuid: str, *, deadline_s: float = 8.0) -> Position | None:
    """What a host says of the domain, over a fresh connection; None when it does not answer."""
    try:
        async with await Hypervisor.open(uri, name=uri, deadline_s=deadline_s) as hypervisor:
            return await position(hypervisor, uuid)
    except VirtgridError:
        return None
