"""What a migration is going to be: the user's words checked, the facts of both hosts, the estimate.

Pure. ``MigrationRequest`` is what was asked; ``Facts`` is what both hosts said; ``MigrationPlan``
is the two brought together. Nothing here touches anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

from virtgrid.core.errors import UsageError
from virtgrid.migration.naming import NameFacts, NameRequest
from virtgrid.migration.policy import PolicyConfig
from virtgrid.net.flip import Way
from virtgrid.net.share import Sharing, Uplink, payload
from virtgrid.virt.domain import Position
from virtgrid.virt.domxml import DomainXml, Nic
from virtgrid.virt.migrate import MigrateOptions
from virtgrid.virt.storagecopy import DiskCopy, TargetImage

#: libvirt's and QEMU's own default, so that a gated pause is no longer than a plain one.
DEFAULT_MAX_DOWNTIME_S: Final = 0.3
FLIPS: Final = ("auto", "off")
DRAINS: Final = ("auto", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRequest:
    """What the user asked for; option names are virsh's.

    timeout_s: the whole live phase; after it the guest is suspended so that it ends (as virsh).
    flip: ``auto`` sends the guest's frames to the destination while it is stopped, where there is a way;
    ``off`` never. drain: ``auto`` does so a little earlier where that lets requests end; ``off`` never.
    tls: memory and disks encrypted; tls_destination: the name the destination's certificate must have.
    service_share: the part of the link (bandwidth_bytes_s, on the wire then) that the migration leaves to the
    service until the release; None: it is not shared.
    stall_timeout_s: no byte moves for this long and the destination is silent: give up.
    """

    domain: str
    dest_uri: str
    source_uri: str
    policy: PolicyConfig
    copy_storage: str | None = None
    migrate_disks: tuple[str, ...] | None = None
    persistent: bool = False
    undefine_source: bool = False
    unsafe: bool = False
    abort_on_error: bool = False
    bandwidth_bytes_s: float | None = None
    service_share: float | None = None
    timeout_s: float | None = None
    max_downtime_s: float = DEFAULT_MAX_DOWNTIME_S
    migrate_uri: str | None = None
    listen_address: str | None = None
    destination_name: str | None = None
    destination_xml: str | None = None
    persistent_xml: str | None = None
    tls: bool = False
    tls_destination: str | None = None
    large_bytes: int = 4 << 20
    tap: str | None = None
    flip: str = "auto"
    drain: str = "auto"
    stall_timeout_s: float = 30.0
    verify_timeout_s: float = 10.0
    dns: NameRequest | None = None
    reason: str | None = None

    @property
    def gated(self) -> bool:
        """False for plain libvirt: nothing is held, connections are only watched."""
        return self.policy.name != "immediate"

    @property
    def sharing(self) -> Sharing | None:
        """How the link is shared; None when it is not."""
        if self.service_share is None or self.bandwidth_bytes_s is None:
            return None
        return Sharing(link_bytes_s=self.bandwidth_bytes_s, service=self.service_share)

    @property
    def precopy_bytes_s(self) -> float | None:
        """What QEMU may send a second before the release: what its class carries, or what was asked."""
        sharing = self.sharing
        return self.bandwidth_bytes_s if sharing is None else payload(sharing.migration_bytes_s)

    @property
    def release_bytes_s(self) -> float | None:
        """What it may send from the release on."""
        sharing = self.sharing
        return self.bandwidth_bytes_s if sharing is None else payload(sharing.link_bytes_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What one host says of itself. address_resolves: its announced name, resolved over here."""

    uri: str
    hostname: str
    host_uuid: str
    libvirt_version: int
    qemu_version: int
    round_trip_s: float
    address_resolves: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WanFacts:
    """The way to the destination. peers: addresses; uplink: where the link can be shared, or a problem."""

    peers: tuple[str, ...] = ()
    uplink: Uplink | None = None
    problem: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything preflight judges. ``None`` where a fact could not be had; the check says so.

    way: where the guest's frames can be sent while it is stopped; way_text: why or why not.
    targets: what the destination holds at the disks' paths; backings: at their backing files' paths.
    """

    source: HostFacts
    destination: HostFacts
    xml: DomainXml
    source_position: Position
    destination_position: Position
    destination_name_taken_by: str | None = None
    migrate_uri: str | None = None
    migrate_host_resolves: bool | None = None
    cpu_compatible: bool | None = None
    cpu_text: str = ""
    machine_known: bool | None = None
    disks: tuple[DiskCopy, ...] = ()
    disk_problems: tuple[str, ...] = ()
    targets: tuple[TargetImage, ...] = ()
    backings: tuple[TargetImage, ...] = ()
    tap: Nic | None = None
    tap_visible: bool = False
    tap_problem: str | None = None
    way: Way | None = None
    way_text: str = "not looked for"
    hook_text: str | None = None
    hook_warning: str | None = None
    other_migration: str | None = None
    name: NameFacts | None = None
    wan: WanFacts = field(default_factory=WanFacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the plan expects, in seconds and bytes; dirty memory is not foreseen."""

    storage_bytes: int
    memory_bytes: int
    bandwidth_bytes_s: float | None

    @property
    def storage_s(self) -> float | None:
        return self.storage_bytes / self.bandwidth_bytes_s if self.bandwidth_bytes_s else None

    @property
    def memory_s(self) -> float | None:
        return self.memory_bytes / self.bandwidth_bytes_s if self.bandwidth_bytes_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPlan:
    """A request brought together with the facts: what will be done."""

    request: MigrationRequest
    facts: Facts
    options: MigrateOptions
    to_create: tuple[DiskCopy, ...] = ()
    estimate: Estimate = field(
        default_factory=lambda: Estimate(storage_bytes=0, memory_bytes=0, bandwidth_bytes_s=None)
    )

    @property
    def uuid(self) -> str:
        return self.facts.xml.uuid

    @property
    def name(self) -> str:
        return self.facts.xml.name


_URI_SCHEME: Final = re.compile(r"[a-z][a-z0-9]*(\+[a-z0-9]+)?")


def _split(uri: str) -> SplitResult | None:
    """The parts of a URI; None when there are none to be had (a port that is no number, half an IPv6)."""
    try:
        parts = urlsplit(uri)
        return parts if parts.port is None or parts.port else None
    except ValueError:
        return None


def check_request(request: MigrationRequest) -> None:
    """Refuse what cannot be meant. Errors: UsageError with the option's name."""
    parts = _split(request.dest_uri)
    if parts is None or not _URI_SCHEME.fullmatch(parts.scheme) or "://" not in request.dest_uri:
        raise UsageError(
            f"'{request.dest_uri}' is not a libvirt URI",
            hint="for instance qemu+tls://hostB/system or qemu+ssh://root@hostB/system",
        )
    if parts.scheme.partition("+")[0] != "qemu":
        raise UsageError(
            f"'{request.dest_uri}' is not a QEMU hypervisor", hint="only qemu domains can be migrated live"
        )
    if not request.domain.strip():
        raise UsageError("the domain's name is empty")
    ranges: tuple[tuple[str, float | None, float, float, str], ...] = (
        ("--bandwidth", request.bandwidth_bytes_s, 2**20, 2**43, "1 MiB/s to 8 TiB/s"),
        ("--service-share", request.service_share, 0.01, 0.9, "1% to 90%"),
        ("--timeout", request.timeout_s, 1, 30 * 86400, "1 second to 30 days"),
        ("--max-downtime", request.max_downtime_s, 0.02, 600, "20 ms to 10 min"),
        ("--large", float(request.large_bytes), 1, 2**50, "1 byte to 1 PiB"),
        ("--stall-timeout", request.stall_timeout_s, 5, 86400, "5 seconds to a day"),
        ("--verify-timeout", request.verify_timeout_s, 0, 600, "0 (no verification) to 10 min"),
    )
    for option, value, low, high, words in ranges:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{option} is out of range", hint=f"{words} can be given")
    if request.service_share is not None and request.bandwidth_bytes_s is None:
        raise UsageError(
            "--service-share is a part of --bandwidth, which is not given",
            hint="--bandwidth: what the link to the destination carries, for instance 100mbit",
        )
    if request.flip not in FLIPS:
        raise UsageError(f"--flip must be one of {', '.join(FLIPS)}, not '{request.flip}'")
    if request.drain not in DRAINS:
        raise UsageError(f"--drain must be one of {', '.join(DRAINS)}, not '{request.drain}'")
    if request.migrate_disks is not None and not request.copy_storage:
        raise UsageError("--migrate-disks goes with --copy-storage-all or --copy-storage-inc")
    if request.tls_destination is not None and not request.tls:
        raise UsageError("--tls-destination goes with --tls")
    if request.undefine_source and not request.persistent:
        raise UsageError(
            "--undefinesource without --persistent would leave the domain defined nowhere",
            hint="add --persistent",
        )
    where = _split(request.migrate_uri or "tcp://")
    if where is None or where.scheme != "tcp":
        raise UsageError(
            f"'{request.migrate_uri}' is not a migration URI", hint="tcp://HOST or tcp://HOST:PORT"
        )


def migrate_uri_for(dest_uri: str, asked: str | None) -> str | None:
    """Where the source's QEMU shall connect to: what was asked, else the host the user typed.

    libvirt's own default is the name the *destination* announces, which the source often cannot
    resolve; the host of the destination's URI is one we demonstrably reach. None (a URI without
    a host, such as a unix socket) leaves it to libvirt.
    """
    if asked:
        return asked
    host = urlsplit(dest_uri).hostname
    if not host:
        return None
    return f"tcp://[{host}]" if ":" in host else f"tcp://{host}"


def make_plan(request: MigrationRequest, facts: Facts) -> MigrationPlan:
    """Bring request and facts together. Nothing is judged here; that is preflight's work."""
    existing = {target.path for target in facts.targets if target.exists}
    creating = tuple(disk for disk in facts.disks if disk.path not in existing)
    storage_bytes = sum(
        disk.allocated_bytes
        if request.copy_storage == "inc" or disk.format == "qcow2"
        else disk.capacity_bytes
        for disk in facts.disks
    )
    return MigrationPlan(
        request=request,
        facts=facts,
        options=MigrateOptions(
            migrate_uri=facts.migrate_uri,
            listen_address=request.listen_address,
            copy_storage=request.copy_storage,
            disks=tuple(disk.target for disk in facts.disks),
            persistent=request.persistent,
            undefine_source=request.undefine_source,
            unsafe=request.unsafe,
            abort_on_error=request.abort_on_error,
            bandwidth_bytes_s=request.precopy_bytes_s,
            destination_name=request.destination_name,
            destination_xml=request.destination_xml,
            persistent_xml=request.persistent_xml,
            tls=request.tls,
            tls_destination=request.tls_destination,
        ),
        to_create=creating,
        estimate=Estimate(
            storage_bytes=storage_bytes,
            memory_bytes=facts.xml.memory_bytes,
            bandwidth_bytes_s=request.precopy_bytes_s,
        ),
    )
