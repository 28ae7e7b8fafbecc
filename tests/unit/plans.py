"""Plans for tests: a healthy migration of web1 from alice to bob, and what to change of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from virtgrid.migration.plan import Facts, HostFacts, MigrationPlan, MigrationRequest, make_plan
from virtgrid.migration.policy import PolicyConfig
from virtgrid.virt.domain import ABSENT, DomainState, Position
from virtgrid.virt.domxml import Disk, DomainXml, Nic
from virtgrid.virt.storagecopy import DiskCopy, TargetImage

UUID = "1c6ac5d8-6a3e-4f7c-9a0e-5a4f0f3f5b11"
PATH = "/images/web1.qcow2"
MAC = "52:54:00:aa:bb:cc"

DISK = Disk(
    target="vda", alias="virtio-disk0", kind="file", device="disk", format="qcow2", source=PATH,
    readonly=False, shareable=False, cache="none", backing=None, backing_format=None,
)  # fmt: skip
NIC = Nic(mac=MAC, kind="bridge", source="br0", tap="vnet0", model="virtio")
XML = DomainXml(
    name="web1", uuid=UUID, virt_type="kvm", memory_bytes=1 << 28, arch="x86_64", machine="pc-i440fx-7.2",
    emulator=None, cpu_mode=None, cpu_xml=None, disks=(DISK,), nics=(NIC,), host_devices=0,
)  # fmt: skip
COPY = DiskCopy(target="vda", path=PATH, format="qcow2", capacity_bytes=8 << 30, allocated_bytes=1 << 30)
TARGET = TargetImage(path=PATH, exists=False, capacity_bytes=None, format=None, free_bytes=20 << 30)
RUNNING = Position(state=DomainState.RUNNING)


def host(name: str, **changes: Any) -> HostFacts:
    facts = HostFacts(
        uri=f"qemu+tls://{name}/system", hostname=name, host_uuid=f"uuid of {name}", libvirt_version=11003000,
        qemu_version=10000002, round_trip_s=0.1,
    )  # fmt: skip
    return replace(facts, **changes)


def request(**changes: Any) -> MigrationRequest:
    asked = MigrationRequest(
        domain="web1", dest_uri="qemu+tls://bob/system", source_uri="qemu:///system", policy=PolicyConfig(),
        copy_storage="all",
    )  # fmt: skip
    return replace(asked, **changes)


def facts(**changes: Any) -> Facts:
    found = Facts(
        source=host("alice"), destination=host("bob"), xml=XML, source_position=RUNNING,
        destination_position=ABSENT, migrate_uri="tcp://bob", migrate_host_resolves=True, cpu_compatible=True,
        cpu_text="x86_64", machine_known=True, disks=(COPY,), targets=(TARGET,), tap=NIC, tap_visible=True,
    )  # fmt: skip
    return replace(found, **changes)


def plan(asked: MigrationRequest | None = None, **changes: Any) -> MigrationPlan:
    return make_plan(asked or request(), facts(**changes))
