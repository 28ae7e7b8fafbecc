"""Guests as described: specification, domain XML, disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.lab.guest import GuestSpec, disk_cache_mode, domain_xml, make_disk
from virtgrid.lab.image import GuestImage


@pytest.fixture
def image(tmp_path: Path) -> GuestImage:
    directory = tmp_path / "small-0123"
    directory.mkdir()
    for name in ("kernel", "initrd"):
        (directory / name).write_bytes(b"x")
    (directory / "disk").write_bytes(b"content" + bytes(4089))
    return GuestImage(
        kind="small", key="0123", directory=directory, cmdline="console=ttyS0 quiet", disk_virtual_bytes=4096
    )


def test_the_mac_follows_the_address() -> None:
    assert GuestSpec(name="web").mac == "52:54:00:4d:00:0a"
    assert GuestSpec(name="web", address="10.77.1.255").mac == "52:54:00:4d:01:ff"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "../etc"},
        {"name": "Web"},
        {"name": "-web"},
        {"name": "w" * 33},
        {"name": "web", "image": "bsd"},
        {"name": "web", "memory_mib": 16},
        {"name": "web", "vcpus": 0},
        {"name": "web", "address": "10.77.0"},
        {"name": "web", "gateway": "gw"},
        {"name": "web", "prefix_length": 31},
        {"name": "web", "disk_format": "vmdk"},
        {"name": "web", "disk_size_bytes": 0},
        {"name": "web", "dirty_bytes_s": -1},
        {"name": "web", "memcheck_pages": -1},
    ],
)
def test_a_guest_that_cannot_be_is_refused_in_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as refusal:
        GuestSpec(**wrong)
    assert "\n" not in refusal.value.what


def test_the_domain_is_the_template_with_the_guests_values(image: GuestImage) -> None:
    spec = GuestSpec(
        name="web", memory_mib=256, vcpus=2, disk_format="qcow2", memcheck_pages=48, dirty_bytes_s=1000
    )
    root = etree.fromstring(domain_xml(spec, image, disk_cache="writeback"))
    assert root.findtext("name") == "web"
    assert root.findtext("memory") == str(256 * 1024)
    assert root.findtext("vcpu") == "2"
    assert root.findtext("os/kernel") == str(image.kernel)
    assert root.findtext("os/cmdline") == (
        "console=ttyS0 quiet vg.ip=10.77.0.10/24 vg.gw=10.77.0.1 vg.name=web vg.memcheck=48 vg.dirty=1000"
    )
    assert root.find("os/type").get("machine") == "pc-i440fx-7.2"  # type: ignore[union-attr]
    assert dict(root.find("devices/disk/driver").attrib) == {  # type: ignore[union-attr]
        "name": "qemu",
        "type": "qcow2",
        "cache": "writeback",
    }
    assert root.find("devices/disk/source").get("file") == "/var/lib/libvirt/images/web.qcow2"  # type: ignore[union-attr]
    assert root.find("devices/interface/mac").get("address") == spec.mac  # type: ignore[union-attr]
    assert root.findtext("on_crash") == "preserve"


def test_a_command_line_cannot_break_out_of_the_xml(image: GuestImage) -> None:
    spec = GuestSpec(name="web", extra_cmdline="a=<b>&'\"</cmdline>")
    root = etree.fromstring(domain_xml(spec, image))
    assert (root.findtext("os/cmdline") or "").endswith(" a=<b>&'\"</cmdline>")


def test_the_disk_is_a_copy_of_the_template(image: GuestImage, tmp_path: Path) -> None:
    target = tmp_path / "web.raw"
    make_disk(GuestSpec(name="web"), image, target)
    assert target.read_bytes() == image.disk.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small-0123", "web.raw"]


def test_a_disk_that_is_there_is_not_overwritten(image: GuestImage, tmp_path: Path) -> None:
    target = tmp_path / "web.raw"
    target.write_bytes(b"precious")
    with pytest.raises(RefusedError, match="exists already"):
        make_disk(GuestSpec(name="web"), image, target)
    assert target.read_bytes() == b"precious"


def test_a_disk_smaller_than_its_template_is_refused(image: GuestImage, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="too small"):
        make_disk(GuestSpec(name="web", disk_size_bytes=1024), image, tmp_path / "web.raw")
    assert not (tmp_path / "web.raw").exists()


def test_the_cache_mode_is_one_that_the_file_system_can_do(tmp_path: Path) -> None:
    assert disk_cache_mode(tmp_path) in ("none", "writeback")
    assert list(tmp_path.iterdir()) == []
