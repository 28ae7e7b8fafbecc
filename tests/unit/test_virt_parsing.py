"""What QEMU and libvirt say, in our words: units, missing parts, and XML that means harm."""

from __future__ import annotations

import pytest
from lxml import etree

from virtgrid.core.errors import VirtgridError
from virtgrid.virt import domxml
from virtgrid.virt.jobstats import parse_block_jobs, parse_migration

DOMAIN = """
<domain type='kvm' id='3'>
  <name>web1</name><uuid>1c6ac5d8-6a3e-4f7c-9a0e-5a4f0f3f5b11</uuid>
  <memory unit='MiB'>512</memory>
  <cpu mode='host-model'><model>EPYC</model></cpu>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/images/web1.qcow2'/>
      <backingStore type='file'><format type='raw'/><source file='/images/base.raw'/></backingStore>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>
    <interface type='bridge'>
      <mac address='52:54:00:AA:BB:CC'/><source bridge='br0'/><target dev='vnet0'/><model type='virtio'/>
    </interface>
    <interface type='user'/>
    <hostdev mode='subsystem' type='pci'/>
  </devices>
</domain>
"""


def test_a_domain_s_xml_is_read() -> None:
    found = domxml.parse(DOMAIN)
    assert (found.name, found.virt_type, found.memory_bytes) == ("web1", "kvm", 512 << 20)
    assert (found.arch, found.machine, found.cpu_mode) == ("x86_64", "pc-i440fx-7.2", "host-model")
    disk, cdrom = found.disks
    assert (disk.target, disk.alias, disk.format, disk.source) == (
        "vda", "virtio-disk0", "qcow2", "/images/web1.qcow2",
    )  # fmt: skip
    assert (disk.backing, disk.backing_format, disk.cache) == ("/images/base.raw", "raw", "none")
    assert (cdrom.device, cdrom.readonly, cdrom.source) == ("cdrom", True, None)
    nic, user = found.nics
    assert (nic.mac, nic.source, nic.tap) == ("52:54:00:aa:bb:cc", "br0", "vnet0")
    assert (user.mac, user.tap) == ("", None)
    assert found.host_devices == 1


LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 10))


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain>",
        "<network/>",
        "<domain xmlns='urn:x'/>",
        "\0",
        "<domain><name>\ud800</name></domain>",
        f"<!DOCTYPE domain [<!ENTITY l0 'ha'>{LAUGHS}]><domain><name>&l9;</name></domain>",
        "<!DOCTYPE domain [<!ENTITY f SYSTEM 'file:///etc/passwd'>]><domain><name>&f;</name></domain>",
        "<!DOCTYPE domain SYSTEM 'http://192.0.2.1/x.dtd'><domain><name>web1</name></domain>",
        "<domain><memory unit='parsec'>1</memory></domain>",
        "<domain><memory>many</memory></domain>",
        "<domain>" * 5000 + "</domain>" * 5000,
    ],
)
def test_xml_that_is_broken_or_means_harm_is_an_error_of_ours(xml: str) -> None:
    with pytest.raises(VirtgridError, match="cannot be read"):
        domxml.parse(xml)


def test_names_with_markup_stay_text_in_what_we_write() -> None:
    name = "a<b>&\"'/../c"
    assert etree.fromstring(domxml.pool_xml(name, "/x & <y>")).findtext("name") == name
    made = etree.fromstring(domxml.volume_xml(name, 8 << 30, "qcow2", "/base <1>", "raw"))
    assert made.findtext("name") == name
    assert made.findtext("capacity") == str(8 << 30)
    assert made.findtext("backingStore/path") == "/base <1>"
    assert domxml.volume_format(etree.tostring(made, encoding="unicode")) == "qcow2"


def test_query_migrate_comes_in_base_units() -> None:
    status = parse_migration(
        {
            "status": "active", "total-time": 1500, "expected-downtime": 300,
            "ram": {
                "remaining": 4096, "total": 1 << 30, "transferred": 17, "dirty-pages-rate": 100,
                "page-size": 4096,
                "mbps": 80.0, "dirty-sync-count": 3, "normal-bytes": 12,
            },
        }
    )  # fmt: skip
    assert status.copying_memory
    assert not status.switching
    assert status.total_time_s == 1.5
    assert status.downtime_s is None
    assert status.ram is not None
    assert status.ram.speed_bytes_s == 10e6
    assert status.ram.dirty_bytes_s == 409_600
    assert status.ram.sync_count == 3


@pytest.mark.parametrize("status", ["pre-switchover", "device", "completed"])
def test_a_stopped_guest_is_known_by_the_status(status: str) -> None:
    assert parse_migration({"status": status}).switching


def test_no_migration_is_a_status_too() -> None:
    nothing = parse_migration({})
    assert (nothing.status, nothing.ram, nothing.copying_memory, nothing.switching) == (
        "none",
        None,
        False,
        False,
    )


@pytest.mark.parametrize("value", ["12", None, True, [], {}, float("nan"), float("inf")])
def test_a_figure_that_is_none_is_an_error_of_ours(value: object) -> None:
    with pytest.raises(VirtgridError, match="malformed 'remaining'"):
        parse_migration({"status": "active", "ram": {"remaining": value}})


def test_mirrors_are_told_from_other_jobs() -> None:
    jobs = parse_block_jobs(
        [
            {
                "type": "mirror",
                "device": "drive-b",
                "offset": 5,
                "len": 10,
                "ready": False,
                "status": "running",
            },
            {"type": "backup", "device": "drive-x", "offset": 1, "len": 2},
            {
                "type": "mirror",
                "device": "drive-a",
                "offset": 10,
                "len": 10,
                "ready": True,
                "status": "ready",
            },
        ]
    )
    assert [(job.device, job.copied_bytes, job.ready) for job in jobs] == [
        ("drive-a", 10, True),
        ("drive-b", 5, False),
    ]
