"""What is inside a sandbox sees of the host: its own, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hosting import STATE, SandboxHost

from virtgrid.grid.node.sandbox import Sandbox
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(params=[True, False], ids=["user namespace", "plain"])
def box(host: SandboxHost, request: pytest.FixtureRequest) -> Sandbox:
    return host.make("box", user_namespace=request.param)


def test_the_user_is_renamed_and_keeps_its_files(host: SandboxHost, box: Sandbox) -> None:
    (host.homes / "ann/from-host").write_text("here\n")
    os.chown(host.homes / "ann/from-host", 4101, 4101)
    assert host.out(box, "id -un; id -u; pwd; cat from-host").split() == [
        "grid",
        "4101",
        "/home/grid",
        "here",
    ]
    host.run(box, "echo there > from-inside")
    found = host.homes / "ann/from-inside"
    assert (found.read_text(), found.stat().st_uid) == ("there\n", 4101)
    assert "ann" not in host.out(box, "cat /etc/passwd")


def test_one_interface_only(host: SandboxHost, box: Sandbox) -> None:
    assert host.out(box, "ls /sys/class/net").split() == ["eth0", "lo"]
    shown = host.out(box, "ip -o addr")
    assert box.spec.ip in shown
    assert "10.99.0." not in shown
    assert host.run(box, "ip route get 10.99.0.1", check=False).returncode != 0
    assert "wan0" not in host.out(box, "cat /proc/net/dev")


def test_no_process_of_the_host(host: SandboxHost, box: Sandbox) -> None:
    numbers = [int(one) for one in host.out(box, "ls /proc | grep -E '^[0-9]+$'").split()]
    names = host.out(box, "cat /proc/[0-9]*/comm").split()
    assert len(numbers) < 8
    assert "libvirtd" not in names
    assert "sshd" in names
    assert host.run(box, f"kill -0 {os.getpid()}", check=False).returncode != 0


def test_no_files_of_others(host: SandboxHost, box: Sandbox) -> None:
    (host.homes / "bea/secret").write_text("bea's")
    assert host.out(box, "ls /home") == "grid"
    for place in (
        host.homes / "bea/secret",
        STATE,
        "/var/lib/libvirt",
        "/etc/libvirt",
        "/root/.ssh",
        "/boot",
    ):
        assert host.run(box, ["ls", str(place)], check=False).returncode != 0
    assert "virtgrid-test" not in host.out(box, "ls /tmp /var/tmp /run")


def test_the_hosts_ssh_directory_is_shadowed(host: SandboxHost, box: Sandbox) -> None:
    theirs = host.homes / "ann/.ssh"
    (theirs / "id_rsa").write_text("the host's private key")
    os.chown(theirs / "id_rsa", 4101, 4101)
    try:
        assert set(host.out(box, "ls -A .ssh").split()) == {
            "authorized_keys", "id_ed25519", "id_ed25519.pub", "known_hosts"
        }  # fmt: skip
        assert "host's" not in host.out(box, "cat .ssh/*")
        host.run(box, "echo mine > .ssh/config")
        assert [entry.name for entry in theirs.iterdir()] == ["id_rsa"]
    finally:
        (theirs / "id_rsa").unlink()


def test_writes_stay_in_the_layer(host: SandboxHost, box: Sandbox) -> None:
    tree = Path(f"/var/lib/virtgrid/templates/{host.template}/tree")
    before = (tree / "etc/hosts").read_text()
    host.run(
        box, "echo '1.2.3.4 evil' >> /etc/hosts; touch /var/lib/new /new; rm /etc/services", as_root=True
    )
    assert (tree / "etc/hosts").read_text() == before
    assert (tree / "etc/services").exists()
    assert not (tree / "new").exists()
    assert host.run(box, "touch /etc/by-the-user", check=False).returncode != 0
    for place in ("/usr/x", "/opt/x"):
        assert host.run(box, ["touch", place], as_root=True, check=False).returncode != 0
    other = host.make("other")
    assert "evil" not in host.out(other, "cat /etc/hosts")
    host.run(other, "test -e /etc/services; test ! -e /new")


_EFFECTIVE_USER = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
print(open(f"/proc/{child.pid}/status").read().split("Uid:")[1].split()[1])
child.kill()
"""


def test_programs_with_setuid_are_inert(host: SandboxHost, box: Sandbox) -> None:
    assert host.site.run(["stat", "-c", "%A", "/usr/bin/passwd"]).stdout.startswith("-rws")
    host.run(box, "cp /usr/bin/sleep /var/tmp/own && chmod 4755 /var/tmp/own", as_root=True)
    key = "ssh -o BatchMode=yes box"
    for program in ("/usr/bin/passwd", "/var/tmp/own 60"):
        words = program.split()
        assert host.out(box, ["/usr/bin/python3", "-c", _EFFECTIVE_USER, *words]) == "4101"
        # The same when logged in, where nothing of ours has prepared the process.
        host.run(box, ["sh", "-c", 'printf %s "$1" > script.py', "sh", _EFFECTIVE_USER])
        assert host.out(box, f"{key} /usr/bin/python3 script.py {program}") == "4101"


def test_the_root_inside_is_nobody_outside(host: SandboxHost) -> None:
    box = host.make()
    assert box.init is not None
    fields = Path(f"/proc/{box.init.pid}/status").read_text().split("Uid:")[1].split()
    assert int(fields[0]) >= 0x70000000
    for command in (
        "mount -t tmpfs none /mnt && mount -o remount,rw /usr",
        "echo 1 > /proc/sys/kernel/sysrq",
        "mknod /var/tmp/disk b 254 0 && head -c 1 /var/tmp/disk",
        "exec 3>/proc/sysrq-trigger",
        "exec 3>/sys/power/state",
    ):
        assert host.run(box, command, as_root=True, check=False).returncode != 0


def test_sandboxes_do_not_see_each_other(host: SandboxHost) -> None:
    one, other = host.make("one"), host.make("other", account="bea")
    host.run(one, "echo secret > /dev/shm/memory; chmod 666 /dev/shm/memory; echo secret > /tmp/file")
    script = (
        "import ctypes,sys; c=ctypes.CDLL(None); c.shmget.restype=ctypes.c_int;"
        "print(c.shmget(0x4711, 4096, int(sys.argv[1], 8)))"
    )
    assert int(host.out(one, ["/usr/bin/python3", "-c", script, "1666"])) >= 0
    assert int(host.out(other, ["/usr/bin/python3", "-c", script, "0"])) == -1
    assert host.out(other, "ls -A /dev/shm /tmp | grep -e memory -e file || true") == ""
    assert len(host.out(other, "ls /proc | grep -E '^[0-9]+$'").split()) < 8
    assert one.init is not None
    assert other.init is not None
    kinds = ("mnt", "net", "pid", "ipc", "uts", "user")
    for kind in kinds:
        seen = {os.readlink(f"/proc/{box.init.pid}/ns/{kind}") for box in (one, other) if box.init}
        assert len(seen) == 2, kind
    maps = {Path(f"/proc/{box.init.pid}/uid_map").read_text() for box in (one, other) if box.init}
    assert len(maps) == 2


def test_a_host_user_cannot_look_into_a_sandbox(host: SandboxHost) -> None:
    box = host.make()
    host.run(box, "echo mine > /tmp/file")
    place = f"{STATE}/box/root/tmp/file"
    assert host.site.run(["cat", place]).stdout == "mine\n"
    for user in (4101, 4102):
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "cat", place]
        assert host.site.run(words, check=False).returncode != 0


def test_the_network_reaches_neighbours_and_not_the_wan(host: SandboxHost, lab: Lab) -> None:
    one, other = host.make("one"), host.make("other")
    script = "import socket,sys; s=socket.create_connection((sys.argv[1],22),5); print(s.recv(8).decode())"
    assert host.out(one, ["/usr/bin/python3", "-c", script, other.spec.ip]).startswith("SSH-2.0")
    wan = lab.site("bob").wan_address
    assert host.run(one, ["/usr/bin/python3", "-c", script, wan], check=False).returncode != 0
    assert lab.client.run(["/usr/bin/python3", "-c", script, one.spec.ip]).stdout.startswith("SSH-2.0")


def test_the_mtu_inside_is_the_one_asked_for(host: SandboxHost) -> None:
    box = host.make(mtu=1450)
    assert host.out(box, "cat /sys/class/net/eth0/mtu") == "1450"


def test_the_gateway_is_the_default_route(host: SandboxHost) -> None:
    box = host.make(gateway="10.77.0.1")
    assert "default via 10.77.0.1 dev eth0" in host.out(box, "ip route")


def test_the_mac_follows_from_the_address(host: SandboxHost) -> None:
    box = host.make(address="10.77.0.77/24")
    assert host.out(box, "cat /sys/class/net/eth0/address") == "52:54:0a:4d:00:4d"
