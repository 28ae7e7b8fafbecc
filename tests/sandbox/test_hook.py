"""Plain virsh makes and ends sandboxes, because of the hook; and other people's domains are left alone."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from hosting import STATE, SandboxHost, kill, wait_for

from virtgrid.core.errors import RefusedError
from virtgrid.grid.node import domain, root
from virtgrid.grid.node.hook import NOTICE_SOCKET
from virtgrid.grid.node.sandbox import Sandbox, SandboxState
from virtgrid.host.hooks import program
from virtgrid.lab import faults
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab

_BARE = """\
<domain type="lxc"><name>bare</name><memory unit="MiB">64</memory><vcpu>1</vcpu>
<os><type>exe</type><init>/bin/sleep</init><initarg>60</initarg></os>
<features><privnet/></features><devices><console type="pty"/></devices></domain>
"""


def _file(host: SandboxHost, tmp_path: Path, name: str = "box", base: int = 0x70000000) -> tuple[Path, str]:
    account = root.Account(name="ann", uid=4101, gid=4101, home=str(host.homes / "ann"))
    spec = host.spec(name)
    file = tmp_path / f"{name}.xml"
    uuid = "e3bfae3d-6a48-4b49-9a2f-1c8f5b5d7a11"
    file.write_text(domain.build(spec, account, base=base, uuid=uuid))
    return file, spec.ip


def _ready(host: SandboxHost, name: str = "box") -> Sandbox:
    box = host.inside(lambda sandboxes: sandboxes.find(name))
    host.inside(lambda sandboxes: sandboxes.wait_ready(box))
    return box


def test_the_xml_is_what_libvirts_schema_asks_for(host: SandboxHost, tmp_path: Path) -> None:
    for base in (0, 0x70000000):
        file, _ = _file(host, tmp_path, base=base)
        done = subprocess.run(
            ["virt-xml-validate", str(file), "domain"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_virsh_create_and_destroy_work_by_themselves(host: SandboxHost, tmp_path: Path) -> None:
    file, _ = _file(host, tmp_path)
    host.virsh("create", str(file))
    box = _ready(host)
    assert host.out(box, "id -un; hostname; cat .ssh/authorized_keys | wc -l").split() == ["grid", "box", "1"]
    assert host.out(box, "stat -c %U .ssh/id_ed25519 .ssh/authorized_keys").split() == ["grid", "grid"]
    assert host.inside(lambda sandboxes: sandboxes.keys("box")).host.startswith("ssh-ed25519 ")
    host.virsh("destroy", "box")
    host.wait_clean()


def test_a_defined_domain_starts_again_and_again(host: SandboxHost, tmp_path: Path) -> None:
    file, _ = _file(host, tmp_path)
    host.virsh("define", str(file))
    for number in range(2):
        host.virsh("start", "box")
        box = _ready(host)
        assert host.run(box, "test -e /var/tmp/mark", as_root=True, check=False).returncode != 0
        host.run(box, f"echo {number} > /var/tmp/mark", as_root=True)
        host.virsh("destroy", "box")
        wait_for(lambda: not (host.site.plan.root / "sandboxes/box").exists())
    host.virsh("undefine", "box")
    host.wait_clean()


def test_a_shutdown_from_inside_is_an_end_like_any_other(host: SandboxHost, tmp_path: Path) -> None:
    file, _ = _file(host, tmp_path)
    host.virsh("create", str(file))
    host.run(_ready(host), "kill -TERM 1", as_root=True, check=False)
    host.wait_clean()


def test_a_domain_that_is_not_ours_is_left_alone(host: SandboxHost, tmp_path: Path) -> None:
    (tmp_path / "bare.xml").write_text(_BARE)
    host.virsh("create", str(tmp_path / "bare.xml"))
    assert not host.traces().directories
    assert host.names() == []
    host.virsh("destroy", "bare")


@pytest.mark.parametrize("operation", ["prepare", "start", "started", "stopped", "release", "reconnect"])
def test_the_hook_says_nothing_about_others_and_reads_no_further_than_it_must(operation: str) -> None:
    head = "<domain type='lxc'>\n  <name>bare</name>\n  <memory unit='KiB'>1</memory>\n"
    text = f"{head}{'<x/>' * 100000}</domain>"
    done = subprocess.run(
        [program(), "bare", operation, "begin", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_words_of_ours_outside_metadata_make_no_sandbox() -> None:
    text = (
        "<domain type='lxc'>\n<name>bare</name>\n<description>https://virtgrid.example/xmlns/sandbox/1.0\n"
        "</description>\n<memory unit='KiB'>1</memory></domain>"
    )
    done = subprocess.run(
        [program(), "bare", "prepare", "begin", "-"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_release_of_what_never_was_is_no_error(host: SandboxHost) -> None:
    host.make()
    for _ in range(2):
        host.site.run(["sh", "-c", f"echo '{_BARE}' | {program()} nobody release end -"])
        # Named like ours, but not ours: not cleaned up.
        bare = _BARE.replace("bare", "box")
        host.site.run(["sh", "-c", f"echo '{bare}' | {program()} box release end -"])
    assert host.names() == ["box"]
    assert (host.site.plan.root / "sandboxes/box").exists()


def test_a_notice_is_sent_to_who_listens(host: SandboxHost, tmp_path: Path) -> None:
    place = host.site.plan.run / NOTICE_SOCKET.removeprefix("/run/")
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)  # of a virtgridd that a test before killed at this site
    file, _ = _file(host, tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(place))
        line.settimeout(20)
        try:
            host.virsh("create", str(file))
            heard = json.loads(line.recv(4096))
            assert (heard["domain"], heard["operation"]) == ("box", "prepare")
            host.virsh("destroy", "box")
            assert json.loads(line.recv(4096))["operation"] == "release"
        finally:
            place.unlink()


def test_a_cable_is_plugged_into_its_bridge_again_at_reconnect(host: SandboxHost) -> None:
    box = host.make()
    master = ["cat", f"/sys/class/net/{box.spec.port}/master/ifindex"]
    with Links(host.site.netns) as links:
        links.call("link", "set", index=links.require(box.spec.port), master=0)
    assert host.site.run(master, check=False).returncode != 0
    faults.kill_libvirtd(host.site)
    faults.restore_libvirtd(host.site)
    wait_for(lambda: host.site.run(master, check=False).returncode == 0)


def test_a_killed_libvirtd_leaves_sandboxes_running_and_cleans_up_later(host: SandboxHost) -> None:
    box = host.make()
    faults.kill_libvirtd(host.site)
    assert host.out(box, "hostname") == "box"
    faults.restore_libvirtd(host.site)
    again = host.inside(lambda sandboxes: sandboxes.find("box"))
    assert (again.state, again.init) == (SandboxState.RUNNING, box.init)
    assert host.destroy()
    host.wait_clean()


def test_a_sandbox_that_ended_while_libvirtd_was_away_leaves_nothing(host: SandboxHost) -> None:
    box = host.make()
    assert box.init is not None
    faults.kill_libvirtd(host.site)
    kill(box.init.pid)
    faults.restore_libvirtd(host.site)
    host.destroy()
    host.wait_clean()


def test_a_killed_libvirt_lxc_leaves_nothing(host: SandboxHost) -> None:
    host.make()
    (controller,) = host._processes()
    kill(int(controller))
    wait_for(lambda: not host.traces().domains)
    host.destroy()
    host.wait_clean()


def test_a_libvirtd_killed_while_sandboxes_begin_leaves_nothing(host: SandboxHost, tmp_path: Path) -> None:
    for number in range(3):
        file, _ = _file(host, tmp_path, f"box{number}", base=0x70000000 + number * 65536)
        creating = subprocess.Popen(host.site.argv(["virsh", "-q", "-c", "lxc:///", "create", str(file)]))
        there = host.site.plan.root / f"sandboxes/box{number}/root"
        if number:
            wait_for(there.exists)
        faults.kill_libvirtd(host.site)
        creating.wait(30)
        faults.restore_libvirtd(host.site)
        host.clear()


def test_prepared_and_never_started_is_removed_by_destroy(host: SandboxHost) -> None:
    spec = host.spec()
    host.inside(lambda sandboxes: sandboxes.prepare(spec))
    assert host.traces().mounts
    assert host.destroy()
    host.wait_clean()
    assert not list(Path(STATE).glob("box"))


def test_a_sandbox_whose_account_is_gone_can_be_seen_and_ended(host: SandboxHost) -> None:
    host.add_account("leaving", 4131)
    box = host.make(account="leaving")
    host.site.run(["sed", "-i", "/^leaving:/d", "/etc/passwd"])
    found = host.inside(lambda sandboxes: sandboxes.find("box"))
    assert (found.init, found.uid) == (box.init, -1)
    with pytest.raises(RefusedError, match="account 'leaving'"):
        host.run(found, "true")
    assert host.destroy()
    host.wait_clean()


def test_half_a_note_of_a_crash_is_cleaned_up_like_a_whole_one(host: SandboxHost) -> None:
    spec = host.spec()
    host.inside(lambda sandboxes: sandboxes.prepare(spec))
    note = host.site.plan.root / "sandboxes/box/note.xml"
    note.write_text(note.read_text()[:200])
    assert host.names() == []
    assert host.destroy()
    host.wait_clean()
