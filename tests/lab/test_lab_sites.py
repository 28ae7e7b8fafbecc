"""What a site of the lab promises: its own libvirtd and world, and faults with a way back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from virtgrid.core.errors import LabError, NotFoundError
from virtgrid.lab import faults, processes
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab


def test_both_drivers_answer(lab: Lab) -> None:
    for site in lab.sites:
        for uri in (site.uri, site.lxc_uri):
            done = subprocess.run(
                ["virsh", "-c", uri, "list"], capture_output=True, text=True, timeout=60, check=True
            )
            assert "State" in done.stdout
        assert "State" in site.run(["virsh", "-c", "lxc:///", "list"]).stdout


def test_the_sites_are_two_hosts_to_libvirt(lab: Lab) -> None:
    texts = {site.run(["virsh", "capabilities"]).stdout.split("</uuid>")[0] for site in lab.sites}
    names = [site.run(["virsh", "hostname"]).stdout.strip() for site in lab.sites]
    assert len(texts) == len(lab.sites)
    assert names == [f"{site.name}.{lab.name}.lab" for site in lab.sites]


def test_a_site_has_its_own_world_and_the_callers_directory(lab: Lab, tmp_path: Path) -> None:
    alice = lab.site("alice")
    assert alice.run(["hostname"]).stdout.strip() == "alice"
    script = f"cd {tmp_path} && exec " + " ".join(alice.argv(["pwd"]))
    assert subprocess.check_output(["sh", "-c", script], text=True, timeout=60).strip() in (
        "/",
        str(tmp_path),
        str(Path.cwd()),
    )
    alice.run(["sh", "-c", "echo here > /etc/virtgrid-test && mkdir -p /etc/pki/more"])
    assert not Path("/etc/virtgrid-test").exists()
    assert lab.site("bob").run(["cat", "/etc/virtgrid-test"], check=False).returncode != 0
    alice.run(["touch", "/var/lib/libvirt/images/seen"])
    assert (alice.images / "seen").exists()


def test_sysfs_shows_the_sites_own_interfaces(lab: Lab) -> None:
    shown = set(lab.site("alice").run(["ls", "/sys/class/net"]).stdout.split())
    assert {"lo", "wan0", "br0"} <= shown
    assert "eth0" not in shown


def test_client_reaches_both_sites(lab: Lab) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], 16514), timeout=5)"
    for site in lab.sites:
        lab.client.run([sys.executable, "-c", script, site.segment_address])


def test_the_bridges_add_no_delay_and_no_noise(lab: Lab) -> None:
    for place, bridge in ((lab.client, "seg0"), (lab.site("alice"), "br0")):
        shown = json.loads(place.run(["ip", "-j", "-d", "link", "show", bridge]).stdout)[0]
        data = shown["linkinfo"]["info_data"]
        assert (data["stp_state"], data["forward_delay"], data["mcast_snooping"]) == (0, 0, 0)
        assert not place.run(["ip", "-6", "-o", "addr", "show", "dev", bridge]).stdout


def test_a_foreign_certificate_is_refused_and_the_right_one_accepted_again(mended_lab: Lab) -> None:
    alice, bob = mended_lab.site("alice"), mended_lab.site("bob")
    command = ["virsh", "-c", bob.tls_uri, "uri"]
    assert bob.tls_uri in alice.run(command).stdout
    faults.foreign_certificate(bob)
    try:
        refused = alice.run(command, check=False)
        assert refused.returncode != 0
        assert "certificate" in refused.stderr
    finally:
        faults.restore_certificate(mended_lab, bob)
    assert bob.tls_uri in alice.run(command).stdout


def test_exec_goes_on_when_libvirtd_is_killed(mended_lab: Lab) -> None:
    bob = mended_lab.site("bob")
    faults.kill_libvirtd(bob)
    assert bob.libvirtd_state() == "dead"
    assert bob.run(["hostname"]).stdout.strip() == "bob"
    with pytest.raises(NotFoundError):
        faults.kill_libvirtd(bob)
    assert faults.restore_libvirtd(bob)
    assert bob.libvirtd_state() == "running"


def test_a_hanging_libvirtd_is_shown_and_goes_on(mended_lab: Lab) -> None:
    bob = mended_lab.site("bob")
    faults.stop_libvirtd(bob)
    try:
        assert bob.libvirtd_state() == "hung"
    finally:
        faults.continue_libvirtd(bob)
    bob.wait_libvirtd(timeout_s=30)
    assert bob.libvirtd_state() == "running"


def test_a_site_can_be_entered_when_its_keeper_is_dead(mended_lab: Lab) -> None:
    alice = mended_lab.site("alice")
    keeper = alice.keeper_pid()
    assert keeper is not None
    assert processes.send(keeper, 9, wait_s=10)
    assert alice.keeper_pid() is None
    assert alice.run(["hostname"]).stdout.strip() == "alice"


def test_a_full_disk_is_full_for_new_images_only(mended_lab: Lab) -> None:
    bob = mended_lab.site("bob")
    old = bob.images / "old.img"
    old.write_bytes(b"x" * 8192)
    before = faults.disk_room(bob).free_bytes
    faults.limit_disk(bob, 1 << 20)
    try:
        assert 0 < faults.disk_room(bob).free_bytes <= 1 << 20
        full = bob.run(
            ["dd", "if=/dev/zero", "of=/var/lib/libvirt/images/new.img", "bs=64k", "count=64"], check=False
        )
        assert "No space left" in full.stderr
        assert bob.run(["wc", "-c", "/var/lib/libvirt/images/old.img"]).stdout.split()[0] == "8192"
        bob.run(["dd", "if=/dev/zero", "of=/var/lib/libvirt/images/old.img", "bs=64k", "count=64"])
    finally:
        assert faults.unlimit_disk(bob)
    assert old.stat().st_size == 64 * 65536
    assert not (bob.images / "new.img").exists()
    assert faults.disk_room(bob).free_bytes > before // 2
    assert not faults.unlimit_disk(bob)
    old.unlink()


def test_an_unknown_domain_has_no_qemu_to_kill(lab: Lab) -> None:
    with pytest.raises(NotFoundError, match="no QEMU of domain 'nobody'"):
        faults.kill_qemu(lab.site("alice"), "nobody")


def test_a_failing_command_tells_its_status_and_words(lab: Lab) -> None:
    with pytest.raises(LabError) as caught:
        lab.site("alice").run(["sh", "-c", "echo broken >&2; exit 3"])
    assert "status 3" in caught.value.what
    assert caught.value.cause == "broken"


def test_killing_a_qemu_finds_the_right_one(lab: Lab, tmp_path: Path) -> None:
    alice = lab.site("alice")
    for name in ("one", "onemore"):
        (tmp_path / f"{name}.xml").write_text(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>16</memory>"
            "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices/></domain>"
        )
        alice.run(["virsh", "create", "--paused", str(tmp_path / f"{name}.xml")])
    assert set(alice.domains()) == {"one", "onemore"}
    pid = alice.domains()["one"]
    assert faults.kill_qemu(alice, "one") == pid
    assert set(alice.domains()) == {"onemore"}
    alice.run(["virsh", "destroy", "onemore"])
