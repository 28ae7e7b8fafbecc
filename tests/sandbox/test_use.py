"""What the Sandboxes class promises whoever drives it: states, keys, programs, the end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest
from hosting import SandboxHost, wait_for

from virtgrid.core.errors import NotFoundError
from virtgrid.grid.node.keys import PublicKeys
from virtgrid.grid.node.layer import Trust
from virtgrid.grid.node.sandbox import Sandbox, Sandboxes, SandboxState

pytestmark = pytest.mark.lab


def _trust(boxes: list[tuple[Sandbox, PublicKeys]]) -> Trust:
    return Trust(
        known_hosts="".join(
            f"{box.name},{box.spec.ip} {' '.join(keys.host.split()[:2])}\n" for box, keys in boxes
        ),
        authorized_keys="".join(f"{keys.user}\n" for _, keys in boxes),
        hostfile="".join(f"{box.name} slots=1\n" for box, _ in boxes),
        hosts=tuple((box.spec.ip, box.name) for box, _ in boxes),
    )


def test_the_papers_order_prepare_keys_trust_start(host: SandboxHost) -> None:
    specs = [host.spec("one"), host.spec("two", account="bea")]

    async def work(sandboxes: Sandboxes) -> list[Sandbox]:
        prepared = []
        for spec in specs:
            keys = await sandboxes.prepare(spec)
            assert await sandboxes.prepare(spec) == keys
            prepared.append((await sandboxes.find(spec.name), keys))
        assert {box.state for box, _ in prepared} == {SandboxState.PREPARED}
        for spec in specs:
            await sandboxes.trust(spec.name, _trust(prepared))
        boxes = [await sandboxes.start(spec.name) for spec in specs]
        for box in boxes:
            await sandboxes.wait_ready(box)
        return boxes

    one, two = host.inside(work)
    assert host.out(one, "ssh -o BatchMode=yes two hostname") == "two"
    assert host.out(two, "ssh -o BatchMode=yes one id -un") == "grid"
    assert host.out(one, "cat /etc/virtgrid/hostfile").split() == ["one", "slots=1", "two", "slots=1"]


def test_a_stranger_is_refused(host: SandboxHost) -> None:
    one, two = host.make("one"), host.make("two")
    refused = host.run(one, f"ssh -o BatchMode=yes {two.spec.ip} true", check=False)
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr

    async def work(sandboxes: Sandboxes) -> None:
        keys = await sandboxes.keys("two")
        await sandboxes.trust("one", _trust([(two, keys)]))

    host.inside(work)
    refused = host.run(one, "ssh -o BatchMode=yes two true", check=False)
    assert "Permission denied" in refused.stderr


def test_private_keys_are_made_new_and_can_be_read_by_their_owners_only(host: SandboxHost) -> None:
    first = host.make("one")
    assert host.out(first, "stat -c '%a %U' .ssh/id_ed25519") == "600 grid"
    place = "/etc/ssh/ssh_host_ed25519_key"
    assert host.out(first, ["stat", "-c", "%a %U", place]) == "600 root"
    assert host.run(first, ["cat", place], check=False).returncode != 0
    keys = host.inside(lambda sandboxes: sandboxes.keys("one"))
    host.destroy("one")
    host.make("one")
    assert keys != host.inside(lambda sandboxes: sandboxes.keys("one"))


def test_a_staged_sandbox_has_no_network_until_it_is_started(host: SandboxHost) -> None:
    spec = host.spec("box")
    other = host.make("other")

    async def stage(sandboxes: Sandboxes) -> Sandbox:
        await sandboxes.prepare(spec)
        box = await sandboxes.stage("box")
        await sandboxes.wait_ready(box)
        assert (await sandboxes.find("box")).state is SandboxState.STAGED
        assert (await sandboxes.stage("box")).init == box.init
        return box

    host.inside(stage)
    script = "import socket,sys; socket.create_connection((sys.argv[1],22),0.3)"
    words = ["/usr/bin/python3", "-c", script, spec.ip]
    assert host.run(other, words, check=False).returncode != 0

    async def start(sandboxes: Sandboxes) -> Sandbox:
        return await sandboxes.start("box")

    assert host.inside(start).state is SandboxState.RUNNING
    wait_for(lambda: host.run(other, words, check=False).returncode == 0)


def test_a_program_has_input_output_and_status_of_the_caller(host: SandboxHost) -> None:
    box = host.make()
    child = host.start(box, ["cat"])
    assert child.communicate("there and back\n", timeout=20)[0] == "there and back\n"
    assert host.run(box, "exit 7", check=False).returncode == 7
    assert host.run(box, "kill -9 $$", check=False).returncode == 128 + signal.SIGKILL
    missing = host.run(box, ["no-such-program"], check=False)
    assert (missing.returncode, "No such file" in missing.stderr) == (127, True)
    assert host.out(box, "echo $COLOUR", env={"COLOUR": "blue"}) == "blue"
    assert host.out(box, "pwd", cwd="/usr") == "/usr"
    assert host.out(box, "id -u; ls /proc/self/fd | wc -l", as_root=True).split() == ["0", "4"]


def test_a_program_ends_with_the_process_that_runs_it(host: SandboxHost) -> None:
    box = host.make()
    child = host.start(box, ["sh", "-c", "echo up; exec sleep 600"])
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.kill()
    child.wait(10)
    wait_for(lambda: host.run(box, ["pgrep", "-x", "sleep"], check=False).returncode != 0)


def test_a_program_is_in_the_control_groups_of_its_sandbox(host: SandboxHost) -> None:
    box = host.make()
    assert box.init is not None
    groups = host.site.run(["cat", f"/proc/{box.init.pid}/cgroup"]).stdout.splitlines()
    theirs = host.out(box, "cat /proc/self/cgroup").splitlines()
    assert any("libvirt" in line for line in groups)
    assert {line for line in groups if "libvirt" in line} <= set(theirs)


def test_killed_means_no_process_and_no_frame(host: SandboxHost) -> None:
    box = host.make()
    child = host.start(box, ["sleep", "60"])
    probe = ["ping", "-c1", "-W1", box.spec.ip]
    assert host.site.run(probe, check=False).returncode in (0, 127)

    async def work(sandboxes: Sandboxes) -> float:
        began_s = time.monotonic()
        sandboxes.kill(box)
        sandboxes.kill(box)
        return time.monotonic() - began_s

    assert host.inside(work) < 1.0
    assert child.wait(5) != 0
    script = "import socket,sys; socket.create_connection((sys.argv[1],22),0.2)"
    assert host.site.run([sys.executable, "-c", script, box.spec.ip], check=False).returncode != 0
    host.destroy()
    host.wait_clean()


def test_destroyed_twice_and_made_again_at_once(host: SandboxHost) -> None:
    for _ in range(3):
        spec = host.make(address="10.77.0.88/24").spec
        assert host.out(host.inside(lambda sandboxes: sandboxes.find("box")), "hostname") == "box"
        assert host.destroy()
        assert not host.destroy()
    assert spec.ip == "10.77.0.88"
    host.wait_clean()


def test_ipv6_is_an_address_like_any_other(host: SandboxHost) -> None:
    one = host.make("one", address="fd00:77::1/64")
    two = host.make("two", address="fd00:77::2/64", mtu=1450)
    assert "fd00:77::1" in host.out(one, "ip -6 -o addr show dev eth0")
    script = "import socket,sys; s=socket.create_connection((sys.argv[1],22),5); print(s.recv(8).decode())"
    found = host.run(one, ["/usr/bin/python3", "-c", script, two.spec.ip])
    assert found.stdout.startswith("SSH-2.0")


def test_what_does_not_exist_is_not_found(host: SandboxHost) -> None:
    for name in ("nobody", "../x", ""):
        with pytest.raises(NotFoundError):
            host.inside(lambda sandboxes, name=name: sandboxes.find(name))


def test_the_command_line_makes_shows_enters_and_ends_one(host: SandboxHost) -> None:
    call = [sys.executable, "-c", "from virtgrid.cli.main import main; main()"]
    options = f"--user grid --account ann --address 10.77.0.90/24 --bridge br0 --template {host.template}"
    more = "--memory 96M --walltime 1h --json"
    made = host.site.run([*call, "sandbox", "create", "cli", *options.split(), *more.split()])
    found = json.loads(made.stdout)
    assert (found["state"], found["limits"]["walltime_s"], found["uid"]) == ("running", 3600, 4101)
    assert found["keys"]["host"].startswith("ssh-ed25519 ")
    listed = json.loads(host.site.run([*call, "sandbox", "list", "--json"]).stdout)
    assert [one["name"] for one in listed] == ["cli"]
    shown = host.site.run([*call, "sandbox", "show", "cli"]).stdout
    assert "10.77.0.90/24 on br0" in shown
    ran = host.site.run([*call, "sandbox", "exec", "cli", "--", "sh", "-c", "hostname; exit 5"], check=False)
    assert (ran.stdout, ran.returncode) == ("cli\n", 5)
    assert _in_a_terminal(host.site.argv([*call, "sandbox", "shell", "cli"]), "tty; exit 6\n") == (
        "/dev/pts/",
        6,
    )
    host.site.run([*call, "sandbox", "destroy", "cli"])
    again = host.site.run([*call, "sandbox", "destroy", "cli"], check=False)
    assert (again.returncode, "VG-NOT-FOUND" in again.stderr) == (4, True)


def _in_a_terminal(argv: list[str], line: str) -> tuple[str, int]:
    """Type a line at the prompt of an interactive program; (what its terminal is called, its status)."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        seen = b""
        while not seen.rstrip().endswith(b"$"):
            seen += os.read(ours, 1024)
        os.write(ours, line.encode())
        with contextlib.suppress(OSError):  # EIO at the end
            while data := os.read(ours, 1024):
                seen += data
        status = child.wait(30)
    os.close(ours)
    found = re.search(rb"/dev/pts/(?=[0-9])", seen)
    return found.group().decode() if found else seen.decode(), status
