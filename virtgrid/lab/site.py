"""One site: its files, its keeper, its libvirtd, and how to run something in it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import DeadlineError, LabError, RefusedError
from virtgrid.host import hooks
from virtgrid.lab import control, daemon, pki, processes
from virtgrid.lab.keeper import KeeperPlan
from virtgrid.lab.layout import Layout, SitePlan
from virtgrid.net import netns, syscalls
from virtgrid.wire.pki.authority import Authority

_DIRECTORIES: Final = (
    "run/libvirt", "run/lock", "run/user", "lib/images", "lib/qemu", "lib/lxc", "lib/boot",
    "log/qemu", "log/lxc", "cache/qemu", "libvirt/hooks", "pki/CA", "pki/libvirt/private", "pki/qemu",
    "pki/virtgrid", "etc/upper/pki/virtgrid",
    "etc/upper/pki/CA", "etc/upper/pki/libvirt", "etc/upper/pki/qemu", "etc/upper/libvirt", "etc/work", "tmp",
    "sandboxes",
)  # fmt: skip
# Places the site's directories are mounted over; made where a host without libvirt's defaults lacks them.
_HOST_DIRECTORIES: Final = (
    "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt", "/var/lib/virtgrid/sandboxes",
)  # fmt: skip

_LIBVIRTD_CONF: Final = """\
listen_tls = 1
listen_tcp = 1
listen_addr = "0.0.0.0"
auth_tcp = "none"
auth_tls = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0700"
unix_sock_rw_perms = "0700"
host_uuid = "{host_uuid}"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
_QEMU_CONF: Final = """\
# no confinement: everything here is one machine's root, in namespaces made for play
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
# log files written by QEMU itself: no virtlogd to start and to bury
stdio_handler = "file"
migration_host = "{name}"
migration_address = "{wan_address}"
default_tls_x509_cert_dir = "/etc/pki/qemu"
"""
_LXC_CONF: Final = """\
security_driver = "none"
"""


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace to run commands in. The client is one; a Site is more."""

    layout: Layout
    name: str
    netns: str

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` here, in the caller's working directory."""
        return ["nsenter", f"--net={netns.path(self.netns)}", "--", *command]

    def run(
        self, command: Sequence[str], *, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end, with its output captured as text. Errors: LabError, DeadlineError."""
        try:
            done = subprocess.run(
                self.argv(command),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise DeadlineError(
                f"'{command[0]}' in {self.name} did not end within {timeout_s:g} s"
            ) from error
        if check and done.returncode != 0:
            raise LabError(
                f"'{' '.join(command)}' in {self.name} failed with status {done.returncode}",
                cause=done.stderr.strip() or None,
            )
        return done


@dataclass(frozen=True, slots=True)
class Site(Place):
    """A site of a lab."""

    plan: SitePlan

    @property
    def uri(self) -> str:
        """libvirt's QEMU driver here, reachable from the host without entering anything."""
        return f"qemu+unix:///system?socket={self.plan.socket}"

    @property
    def lxc_uri(self) -> str:
        """libvirt's LXC driver here."""
        return f"lxc+unix:///system?socket={self.plan.socket}"

    @property
    def tls_uri(self) -> str:
        """What the *other sites* call it."""
        return f"qemu+tls://{self.name}/system"

    @property
    def images(self) -> Path:
        """/var/lib/libvirt/images of the site, as the host sees it."""
        return self.plan.images

    @property
    def wan_address(self) -> str:
        return self.plan.wan_address

    @property
    def segment_address(self) -> str:
        return self.plan.segment_address

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` at the site.

        Its working directory is the caller's, or / where the site has no such directory.
        Errors: LabError when nothing of the site runs.
        """
        pid = self.inhabitant()
        if pid is None:
            raise LabError(f"site {self.name} is not up", hint=f"virtgrid lab up --lab {self.layout.name}")
        try:
            here = Path.cwd()
        except FileNotFoundError:  # removed under our feet
            here = Path("/")
        inside = here if Path(f"/proc/{pid}/root{here}").is_dir() else "/"
        return [
            "nsenter", f"--target={pid}", f"--net={netns.path(self.netns)}", "--mount", "--uts",
            f"--wdns={inside}", "--", *command,
        ]  # fmt: skip

    def keeper_pid(self) -> int | None:
        return control.listener_pid(self.plan.keeper_socket)

    def inhabitant(self) -> int | None:
        """A process that is in the site's namespaces: the keeper, or whoever outlived it."""
        keeper = self.keeper_pid()
        if keeper is not None:
            return keeper
        try:
            run = self.plan.run.stat()
        except OSError:
            return None
        for pid in sorted(processes.parents()):
            try:
                seen = Path(f"/proc/{pid}/root/run").stat()
            except OSError:
                continue
            if (seen.st_dev, seen.st_ino) == (run.st_dev, run.st_ino):
                return pid
        return None

    def write_files(self, authority: Authority) -> None:
        """Directories, configuration and certificates. Certificates that are there are kept."""
        root, plan = self.plan.root, self.plan
        empty = self.keeper_pid() is None and self.inhabitant() is None
        if empty and not plan.run.is_mount():
            # As on a real host: libvirt waits until a domain's new state is on the disk, wherever that is.
            plan.run.mkdir(mode=0o755, parents=True, exist_ok=True)
            syscalls.mount("virtgrid-lab", plan.run, "tmpfs", data="mode=0755,size=256m")
        for directory in _DIRECTORIES:
            (root / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
        for place in _HOST_DIRECTORIES:
            Path(place).mkdir(mode=0o755, parents=True, exist_ok=True)
        values = {"host_uuid": plan.host_uuid, "name": plan.name, "wan_address": plan.wan_address}
        for name, text in (
            ("libvirt/libvirtd.conf", _LIBVIRTD_CONF),
            ("libvirt/qemu.conf", _QEMU_CONF),
            ("libvirt/lxc.conf", _LXC_CONF),
        ):
            (root / name).write_text(text.format_map(values))
        # A site is a host that has virtgrid; libvirtd looks for hooks when it starts.
        hooks.install(root / "libvirt/hooks")
        if empty:
            # Below a mounted overlay nothing may change, so only before it is mounted.
            (root / "etc/upper/hosts").write_text(self.layout.hosts(plan))
            (root / "etc/upper/hostname").write_text(f"{plan.name}\n")
        if not pki.furnished(plan.certificates):
            self.write_certificates(authority)

    def write_certificates(self, authority: Authority) -> None:
        """Certificates of this authority for all of the site's names."""
        pki.furnish(authority, self.plan.certificates, self.name, self.plan.hosts)

    def start_keeper(self) -> bool:
        """False when it runs already."""
        inhabitant = self.inhabitant()
        if inhabitant is not None:
            here, named = netns.identity(f"/proc/{inhabitant}/ns/net"), netns.identity(netns.path(self.netns))
            if here != named:
                raise RefusedError(
                    f"what runs at {self.name} lives in a network namespace that lost its name",
                    hint=f"virtgrid lab down --lab {self.layout.name}, then up",
                )
        if self.keeper_pid() is not None:
            return False
        plan = KeeperPlan(root=self.plan.root, namespace=self.netns, hostname=self.plan.name, join=inhabitant)
        daemon.start(
            "virtgrid.lab.keeper",
            [plan.as_argument()],
            lab=self.layout.root,
            log=self.plan.root / "keeper.log",
        )
        return True

    def libvirtd_pid(self) -> int | None:
        """The libvirtd of the site: who holds the lock on its pid file."""
        return processes.lock_owner(self.plan.libvirtd_pid_file)

    def libvirtd_state(self) -> str:
        """``running``, ``hung`` (stopped by a signal) or ``dead``."""
        pid = self.libvirtd_pid()
        letter = None if pid is None else processes.state(pid)
        if letter in (None, "Z", "X"):
            return "dead"
        return "hung" if letter in ("T", "t") else "running"

    def launch_libvirtd(self) -> bool:
        """Have the keeper start libvirtd, without waiting for it. False when it runs already."""
        if self.libvirtd_pid() is not None:
            return False
        control.ask(self.plan.keeper_socket, {"do": "start"})
        return True

    def wait_libvirtd(self, *, timeout_s: float = 90.0) -> None:
        """Wait until libvirtd answers. Errors: LabError when it ends, DeadlineError."""
        deadline_s = time.monotonic() + timeout_s
        started = False
        while (left_s := deadline_s - time.monotonic()) > 0:
            alive = self.libvirtd_pid() is not None
            if started and not alive:
                raise LabError(f"libvirtd of {self.name} ended at once", cause=self.last_words() or None)
            started = started or alive
            if self.plan.socket.exists() and self._answers(min(left_s, 10.0)):
                return
            time.sleep(0.05)
        cause = self.last_words() or None
        raise DeadlineError(f"libvirtd of {self.name} did not answer within {timeout_s:g} s", cause=cause)

    def _answers(self, timeout_s: float) -> bool:
        command = ["virsh", "-q", "-c", self.uri, "uri"]
        try:
            return (
                subprocess.run(command, capture_output=True, timeout=timeout_s, check=False).returncode == 0
            )
        except subprocess.TimeoutExpired:
            return False

    def last_words(self) -> str:
        """The end of what libvirtd wrote."""
        lines: list[str] = []
        for name in ("libvirtd.out", "libvirtd.log"):
            path = self.plan.log / name
            if path.is_file():
                lines += path.read_text(errors="replace").splitlines()[-3:]
        return " | ".join(lines)

    def signal_libvirtd(self, number: signal.Signals) -> bool:
        """Send a signal, to stop or go on until that is done; False when there is no libvirtd.

        Errors: DeadlineError.
        """
        pid = self.libvirtd_pid()
        if pid is None or not processes.send(pid, number):
            return False
        # What is sent is done when the process is next given a processor.
        wanted = {signal.SIGSTOP: "hung", signal.SIGCONT: "running"}.get(number)
        deadline_s = time.monotonic() + 10
        while wanted and self.libvirtd_state() not in (wanted, "dead"):
            if time.monotonic() > deadline_s:
                raise DeadlineError(f"libvirtd of {self.name} is not {wanted} within 10 s of its signal")
            time.sleep(0.002)
        return True

    def kill_libvirtd(self) -> bool:
        """kill -9; False when there was none."""
        pid = self.libvirtd_pid()
        return pid is not None and processes.send(pid, signal.SIGKILL, wait_s=10.0)

    def domains(self) -> dict[str, int]:
        """Running domains and their pids, QEMU's and LXC's, asked from nobody: libvirtd may be dead."""
        found = {}
        for driver in ("qemu", "lxc"):
            for path in sorted((self.plan.run / "libvirt" / driver).glob("*.pid")):
                try:
                    pid = int(path.read_text())
                except (OSError, ValueError):
                    continue
                if path.stem != "driver" and processes.state(pid) not in (None, "Z", "X"):
                    found[path.stem] = pid
        return found

    def status(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "name": self.name,
            "namespace": self.netns,
            "keeper_pid": self.keeper_pid(),
            "libvirtd": self.libvirtd_state(),
            "libvirtd_pid": self.libvirtd_pid(),
            "domains": self.domains(),
            "wan_address": plan.wan_address,
            "segment_address": plan.segment_address,
            "uri": self.uri,
            "tls_uri": self.tls_uri,
            "images": os.fspath(self.images),
        }
