"""Limits bite, and bite nobody else. Everything here is small: the machine belongs to others as well."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hosting import LIMITS, SandboxHost, wait_for

from virtgrid.grid.node.spec import MIB

pytestmark = pytest.mark.lab

# Both are bounded even where no limit holds: a few dozen MiB, a hundred processes.
_HOG = "x = []\nfor _ in range(40):\n    x.append(b'1' * (4 << 20))\n    print(len(x), flush=True)\n"
_BOMB = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except BlockingIOError:
    pass
print(made, flush=True)
time.sleep(30)
"""


def test_a_memory_hog_is_ended_and_its_neighbour_is_not(host: SandboxHost) -> None:
    box, other = host.make("box"), host.make("other")
    done = host.run(box, ["/usr/bin/python3", "-c", _HOG], check=False, timeout_s=60)
    assert done.returncode == 137
    assert int(done.stdout.split()[-1]) * 4 < LIMITS.memory_bytes // MIB
    assert host.out(other, "echo alive") == "alive"


def test_a_fork_bomb_ends_at_the_limit_and_its_neighbour_goes_on(host: SandboxHost) -> None:
    box, other = host.make("box"), host.make("other")
    bomb = host.start(box, ["/usr/bin/python3", "-c", _BOMB])
    assert bomb.stdout is not None
    assert 0 < int(bomb.stdout.readline()) < LIMITS.processes
    assert host.run(box, "true | true", check=False).returncode != 0
    assert host.out(other, "id -un") == "grid"
    began_s = time.monotonic()
    host.destroy("box")
    assert time.monotonic() - began_s < 5
    bomb.wait(10)


def test_the_limit_of_processes_holds_for_who_logs_in_too(host: SandboxHost) -> None:
    box = host.make()
    host.run(box, ["sh", "-c", 'printf %s "$1" > bomb.py', "sh", _BOMB.replace("sleep(30)", "sleep(1)")])
    made = int(host.out(box, "ssh -o BatchMode=yes box /usr/bin/python3 bomb.py"))
    assert 0 < made < LIMITS.processes


def test_a_full_layer_is_full_for_the_sandbox_only(host: SandboxHost) -> None:
    box = host.make()
    free = host.site.run(["stat", "-f", "-c", "%a", "/var/lib/virtgrid"]).stdout
    full = host.run(box, "dd if=/dev/zero of=/tmp/big bs=1M count=40", check=False)
    assert full.returncode != 0
    assert "No space left" in full.stderr
    host.run(box, "rm /tmp/big && echo again > /tmp/small")
    host.run(box, "echo more > at-home")
    after = host.site.run(["stat", "-f", "-c", "%a", "/var/lib/virtgrid"]).stdout
    assert abs(int(free) - int(after)) * 4096 < 1 << 30  # others write to that disk as well
    host.run(box, "dd if=/dev/zero of=/tmp/big bs=1M count=40 || true")
    assert host.destroy()


def test_a_cpuset_is_all_that_programs_may_run_on(host: SandboxHost) -> None:
    box = host.make(limits=replace(LIMITS, cpuset="1"))
    show = "import os; print(*sorted(os.sched_getaffinity(0)))"
    assert host.out(box, ["/usr/bin/python3", "-c", show]) == "1"
    script = f"ssh -o BatchMode=yes box \"/usr/bin/python3 -c '{show}'\""
    assert host.out(box, script) == "1"
    set_all = "import os; os.sched_setaffinity(0, {0}); print(*os.sched_getaffinity(0))"
    assert host.run(box, ["/usr/bin/python3", "-c", set_all], check=False).returncode != 0


def test_the_user_cannot_raise_its_limits(host: SandboxHost) -> None:
    box = host.make()
    assert host.run(box, "ulimit -p 1000", check=False).returncode != 0
    for place in ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"):
        assert host.run(box, f"echo 900000000 > {place}", check=False).returncode != 0


def test_a_sandbox_ends_by_itself_when_its_time_is_up(host: SandboxHost) -> None:
    began_s = time.monotonic()
    box = host.make(limits=replace(LIMITS, walltime_s=2))
    child = host.start(box, ["sleep", "60"])
    assert host.run(box, "kill $(pgrep -x sleep -u root)", check=False).returncode != 0
    wait_for(lambda: not host.names(), 15)
    assert time.monotonic() - began_s >= 2
    assert child.wait(10) != 0
    host.wait_clean()
