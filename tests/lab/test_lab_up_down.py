"""What `lab up` and `lab down` promise: twice is no error, and nothing stays behind, whatever happened."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from virtgrid.core.errors import LabError, NotFoundError, RefusedError
from virtgrid.lab import control, processes
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import LabConfig, LinkSpec, labs_directory, namespace_prefix
from virtgrid.net import netns
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab

_BOX = """
<domain type='lxc'><name>box</name><memory unit='MiB'>64</memory>
<os><type>exe</type><init>/bin/sleep</init><initarg>1000</initarg></os>
<devices><interface type='bridge'><source bridge='br0'/></interface><console type='pty'/></devices></domain>
"""


def _up(name: str, **more: object) -> tuple[Lab, list[str]]:
    told: list[str] = []
    lab = Lab.up(LabConfig(name=name, wan=LinkSpec(rate_bytes_s=125e6), **more), told.append)  # type: ignore[arg-type]
    return lab, told


def _cgroups(controller: int) -> list[Path]:
    """Of one container; the machine's other labs have theirs."""
    return list(Path("/sys/fs/cgroup").rglob(f"lxc-{controller}-*.libvirt-lxc"))


def _kill(pid: int | None) -> None:
    assert pid is not None
    assert processes.send(pid, signal.SIGKILL, wait_s=10)


class Leftovers:
    """Everything of a lab, noted while it is up, looked for after it is down."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._signs = processes.Signs.of(lab.name, lab.layout.root)
        assert processes.find(self._signs)

    def check(self) -> None:
        assert processes.find(self._signs) == set()
        assert netns.names(namespace_prefix(self._lab.name)) == []
        assert not self._lab.layout.root.exists()
        mounts = Path("/proc/self/mountinfo").read_text()
        assert str(self._lab.layout.root) not in mounts
        assert namespace_prefix(self._lab.name) not in mounts


def test_up_twice_is_no_error_and_says_so(lab_name: str) -> None:
    _, told = _up(lab_name)
    assert "is up after" in told[-1]
    _, told = _up(lab_name)
    assert told[-1] == f"lab '{lab_name}' was up already, nothing was missing"


def test_down_leaves_nothing_and_down_twice_is_no_error(lab_name: str) -> None:
    lab, _ = _up(lab_name)
    leftovers = Leftovers(lab)
    assert take_down(lab_name)
    leftovers.check()
    assert not take_down(lab_name)
    with pytest.raises(NotFoundError):
        Lab.load(lab_name)


def test_down_ends_a_running_container_and_removes_its_cgroups(lab_name: str, tmp_path: Path) -> None:
    lab, _ = _up(lab_name)
    (tmp_path / "box.xml").write_text(_BOX)
    lab.site("alice").run(["virsh", "-c", "lxc:///", "create", str(tmp_path / "box.xml")])
    controller = lab.site("alice").domains()["box"]
    assert _cgroups(controller)
    leftovers = Leftovers(lab)
    take_down(lab_name)
    leftovers.check()
    assert not _cgroups(controller)


def _keeper(lab: Lab) -> None:
    _kill(lab.site("alice").keeper_pid())


def _libvirtd(lab: Lab) -> None:
    _kill(lab.site("bob").libvirtd_pid())


def _link(lab: Lab) -> None:
    _kill(control.listener_pid(lab.layout.link_socket("wan")))


def _state(lab: Lab) -> None:
    lab.layout.state_file.write_text('{"name": "')


def _half_of_the_directory(lab: Lab) -> None:
    shutil.rmtree(lab.layout.root / "sites" / "alice", ignore_errors=True)
    lab.layout.state_file.unlink()


def _all_of_the_directory(lab: Lab) -> None:
    shutil.rmtree(lab.layout.root, ignore_errors=True)


def _names_of_namespaces(lab: Lab) -> None:
    for name in lab.layout.namespaces:
        netns.delete(name)


_DAMAGES: list[Callable[[Lab], None]] = [
    _keeper, _libvirtd, _link, _state, _half_of_the_directory, _all_of_the_directory, _names_of_namespaces,
]  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_down_leaves_nothing_after_damage(lab_name: str, damage: Callable[[Lab], None]) -> None:
    lab, _ = _up(lab_name)
    leftovers = Leftovers(lab)
    damage(lab)
    take_down(lab_name)
    leftovers.check()


def _hang(lab: Lab) -> None:
    assert lab.site("bob").signal_libvirtd(signal.SIGSTOP)


def _port(lab: Lab) -> None:
    link = control.listener_pid(lab.layout.link_socket("wan"))
    assert link is not None
    with Links(lab.site("alice").netns) as links:
        assert links.delete("wan0")
    deadline = time.monotonic() + 10
    while processes.state(link) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert control.listener_pid(lab.layout.link_socket("wan")) is None


@pytest.mark.parametrize(
    "damage",
    [_keeper, _libvirtd, _link, _hang, _port],
    ids=["keeper", "libvirtd", "link", "hanging", "deleted wan0"],
)
def test_up_mends_what_was_killed(lab_name: str, damage: Callable[[Lab], None]) -> None:
    lab, _ = _up(lab_name)
    damage(lab)
    _, told = _up(lab_name)
    assert "mended" in told[-1]
    for here, there in (("alice", "bob"), ("bob", "alice")):
        uri = lab.site(there).tls_uri
        assert uri in lab.site(here).run(["virsh", "-c", uri, "uri"]).stdout


@pytest.mark.parametrize("line", [1, 2])
def test_down_cleans_up_after_an_up_killed_in_the_middle(lab_name: str, line: int) -> None:
    script = (
        "import os, signal, sys\n"
        "from virtgrid.lab.lab import Lab\n"
        "from virtgrid.lab.layout import LabConfig\n"
        "seen = []\n"
        "def tell(text):\n"
        "    seen.append(text)\n"
        f"    if len(seen) == {line}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Lab.up(LabConfig(name=sys.argv[1]), tell)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, lab_name], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    lab = Lab.load(lab_name)
    signs = processes.Signs.of(lab_name, lab.layout.root)
    assert take_down(lab_name)
    assert processes.find(signs) == set()
    assert netns.names(namespace_prefix(lab_name)) == []
    assert not lab.layout.root.exists()


def test_an_up_that_fails_leaves_nothing(lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("virtgrid.lab.site.Site.wait_libvirtd", fail)
    with pytest.raises(KeyboardInterrupt):
        _up(lab_name)
    assert netns.names(namespace_prefix(lab_name)) == []
    with pytest.raises(NotFoundError):
        Lab.load(lab_name)


def test_what_the_system_refuses_is_told_in_a_sentence_and_leaves_nothing(
    lab_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("virtgrid.net.syscalls.unshare", refuse)
    with pytest.raises(LabError, match="could not be built") as caught:
        _up(lab_name)
    assert "not permitted" in (caught.value.cause or "")
    assert netns.names(namespace_prefix(lab_name)) == []
    assert not (labs_directory() / lab_name).exists()
    monkeypatch.undo()
    netns.create(f"vg-{lab_name}-x")
    with pytest.raises(LabError, match="kernel refused"), Links(f"vg-{lab_name}-x") as links:
        links.veth("a" * 40, peer="b", peer_namespace=f"vg-{lab_name}-x")


def test_a_torn_record_is_told_and_down_helps(lab_name: str) -> None:
    lab, _ = _up(lab_name)
    _state(lab)
    for look in (lambda: Lab.load(lab_name), lambda: _up(lab_name)):
        with pytest.raises(LabError, match="cannot be read") as caught:
            look()
        assert "lab down" in (caught.value.hint or "")
    assert take_down(lab_name)
    _up(lab_name)


def test_other_sites_are_refused_and_nothing_is_touched(lab_name: str) -> None:
    lab, _ = _up(lab_name)
    pids = [site.libvirtd_pid() for site in lab.sites]
    with pytest.raises(RefusedError, match="another sites"):
        _up(lab_name, sites=("alice", "carol"))
    assert [site.libvirtd_pid() for site in Lab.load(lab_name).sites] == pids


def test_two_ups_at_once_make_one_lab(lab_name: str) -> None:
    told: list[list[str]] = []
    threads = [threading.Thread(target=lambda: told.append(_up(lab_name)[1])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = sorted(lines[-1] for lines in told)
    assert len(last) == 2
    assert "is up after" in last[0]
    assert "nothing was missing" in last[1]


def test_two_labs_coexist(lab_name: str) -> None:
    other_name = f"{lab_name}b"
    try:
        lab, _ = _up(lab_name)
        other, _ = _up(other_name)
        for each in (lab, other):
            found = (
                each.site("alice").run(["virsh", "-c", "qemu+tls://bob/system", "hostname"]).stdout.strip()
            )
            assert found == f"bob.{each.name}.lab"
        leftovers = Leftovers(other)
        take_down(other_name)
        leftovers.check()
        assert "bob" in lab.site("alice").run(["virsh", "-c", "qemu+tls://bob/system", "hostname"]).stdout
        # A site keeps no copy of another lab's mounts: those would keep its namespaces alive.
        mounts = lab.site("alice").run(["cat", "/proc/self/mountinfo"]).stdout
        assert namespace_prefix(other_name) not in mounts
    finally:
        take_down(other_name)


def test_the_same_name_in_two_directories_is_refused(lab_name: str, request: pytest.FixtureRequest) -> None:
    tmp_path = Path(tempfile.mkdtemp(prefix="vg"))  # pytest's own is too deep for a socket
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))
    lab, _ = _up(lab_name)
    with pytest.raises(RefusedError, match="another directory"):
        Lab.up(LabConfig(name=lab_name, directory=tmp_path))
    with pytest.raises(RefusedError, match="another directory"):
        take_down(lab_name, directory=tmp_path)
    assert all(site.libvirtd_state() == "running" for site in lab.sites)


def test_down_from_inside_the_lab_is_refused(lab_name: str) -> None:
    lab, _ = _up(lab_name)
    script = "import sys; from virtgrid.lab.lab import take_down; take_down(sys.argv[1])"
    done = lab.site("alice").run([sys.executable, "-c", script, lab_name], check=False)
    assert "RefusedError" in done.stderr
    assert all(site.libvirtd_state() == "running" for site in lab.sites)


def test_three_sites_reach_each_other_and_the_wan_counts_every_direction(lab_name: str) -> None:
    lab, _ = _up(lab_name, sites=("alice", "bob", "carol"), client_rtt_s=0.02)
    for here, there in (("alice", "carol"), ("carol", "bob"), ("bob", "alice")):
        uri = lab.site(there).tls_uri
        assert uri in lab.site(here).run(["virsh", "-c", uri, "uri"]).stdout
    counters = lab.wan_counters()
    assert len(counters) == 6
    assert all(way["frames"] > 0 for way in counters.values())


def test_a_foreign_process_with_a_similar_name_is_left_alone(lab_name: str) -> None:
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(300)", "virtgrid.lab.keeper", lab_name]
    )
    try:
        _up(lab_name)
        take_down(lab_name)
        assert bystander.poll() is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(bystander.pid, signal.SIGKILL)
        bystander.wait()
