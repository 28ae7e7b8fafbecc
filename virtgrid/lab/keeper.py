"""The keeper of a site: holds its network, mount and UTS namespaces, and starts its libvirtd.

It stays when libvirtd is killed, so guests run on and ``lab exec`` goes on working. The other way round
guests and libvirtd survive the keeper; a new one then joins the namespaces they are in.

What a site sees: the host's file system, with /etc as an overlay of its own and the lab's directories
over /run and libvirt's places in /var and /etc.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import LabError
from virtgrid.lab import daemon
from virtgrid.lab.control import ControlServer
from virtgrid.lab.layout import DIRECTORY_VARIABLE
from virtgrid.net import netns, syscalls

_BINDS: Final = {
    "run": "/run",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
    "libvirt": "/etc/libvirt",
    "pki/CA": "/etc/pki/CA",
    "pki/libvirt": "/etc/pki/libvirt",
    "pki/qemu": "/etc/pki/qemu",
    "pki/virtgrid": "/etc/pki/virtgrid",
    "sandboxes": "/var/lib/virtgrid/sandboxes",
}
"""Below the site's directory -> where the site sees it. /etc comes before: it is an overlay."""
_DESCRIPTORS: Final = 8192
"""What libvirtd may open, as `virtgrid doctor` advises. It takes all it may, and each container it starts
closes as many, one by one, before its first program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperPlan:
    """root: the site's directory. join: a process whose namespaces to enter; None makes new ones."""

    root: Path
    namespace: str
    hostname: str
    join: int | None = None

    def as_argument(self) -> str:
        return json.dumps(
            {
                "root": str(self.root),
                "namespace": self.namespace,
                "hostname": self.hostname,
                "join": self.join,
            }
        )

    @staticmethod
    def from_argument(text: str) -> KeeperPlan:
        data = json.loads(text)
        return KeeperPlan(
            root=Path(data["root"]),
            namespace=data["namespace"],
            hostname=data["hostname"],
            join=data["join"],
        )


def build(plan: KeeperPlan) -> None:
    """Enter the network namespace, make mount and UTS namespaces, and mount the site's world."""
    netns.enter(plan.namespace)
    syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.sethostname(plan.hostname)
    # Our copies of these mounts would keep other labs' network namespaces alive after their end.
    for mounted in _mounts_below(str(netns.DIRECTORY)):
        with contextlib.suppress(OSError):  # gone with one that was detached before it
            syscalls.umount(mounted, syscalls.MNT_DETACH)
    _own_sysfs(plan.root / "tmp")
    etc = plan.root / "etc"
    options = f"lowerdir=/etc,upperdir={etc / 'upper'},workdir={etc / 'work'}"
    try:
        syscalls.mount("overlay", "/etc", "overlay", data=options)
    except OSError as error:
        raise LabError(
            f"{error}; the lab's directory must lie where overlayfs can write (ext4, xfs, btrfs, tmpfs; "
            f"not inside a container's overlay): {DIRECTORY_VARIABLE} names another"
        ) from error
    for source, target in _BINDS.items():
        syscalls.mount(plan.root / source, target, flags=syscalls.MS_BIND)


def _own_sysfs(scratch: Path) -> None:
    """A sysfs that shows this network namespace's devices, with the cgroups where they were."""
    cgroups = "/sys/fs/cgroup"
    for mounted, kind in _mount_kinds(cgroups):
        # The empty v2 hierarchy beside v1 ones (hybrid): libvirt takes it for the real one and LXC fails.
        if kind == "cgroup2" and mounted != cgroups:
            syscalls.umount(mounted, syscalls.MNT_DETACH)
    if not os.path.ismount(cgroups):
        syscalls.mount("sysfs", "/sys", "sysfs")
        return
    syscalls.mount(cgroups, scratch, flags=syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount("sysfs", "/sys", "sysfs")
    syscalls.mount(scratch, cgroups, flags=syscalls.MS_MOVE)


def _mount_kinds(below: str) -> list[tuple[str, str]]:
    """(where, kind) of the mounts at or below a directory, the innermost first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        where = fields[4].encode().decode("unicode_escape")
        if where == below or where.startswith(f"{below}/"):
            found.append((where, fields[fields.index("-") + 1]))
    return found[::-1]


def _mounts_below(directory: str) -> list[str]:
    return [where for where, _ in _mount_kinds(directory)]


def join(plan: KeeperPlan) -> None:
    """Enter the namespaces of a process of the site that outlived the last keeper."""
    descriptor = os.pidfd_open(plan.join or 0)
    try:
        kinds = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS
        syscalls.setns(descriptor, kinds)
    finally:
        os.close(descriptor)


class Keeper:
    """Starts libvirtd when asked, changes the site's mounts when asked, buries the dead."""

    def __init__(self, plan: KeeperPlan) -> None:
        # The path as the whole machine sees it: it lies outside everything mounted over.
        self._control = ControlServer(plan.root / "keeper.sock", self._order)
        self._root = plan.root

    def _order(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        match order["do"]:
            case "ping":
                return {"pid": os.getpid()}
            case "start":
                return {"pid": self._start_libvirtd()}
            case "limit-disk":
                self._limit_disk(int(order["free_bytes"]))
                return {}
            case "unlimit-disk":
                return {"was_limited": self._unlimit_disk()}
            case other:
                return {"error": f"unknown order {other}"}

    def _start_libvirtd(self) -> int:
        output = os.open(
            "/var/log/libvirt/libvirtd.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        try:
            return os.posix_spawnp(
                "libvirtd",
                ["libvirtd", "--listen", "--config", "/etc/libvirt/libvirtd.conf"],
                dict(os.environ),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, output, 1),
                    (os.POSIX_SPAWN_DUP2, output, 2),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGHUP],
            )
        finally:
            os.close(output)

    def _limit_disk(self, free_bytes: int) -> None:
        """Put a file system with so much room over the images; the images already there stay in sight.

        Only this site's mount namespace is touched: the host's disk is never filled.
        """
        images = Path("/var/lib/libvirt/images")
        self._unlimit_disk()
        present = [entry for entry in images.iterdir() if entry.is_file()]
        size = max(free_bytes, 4096)  # tmpfs takes 0 for unlimited
        under = self._root / "tmp"
        syscalls.mount(images, under, flags=syscalls.MS_BIND)
        try:
            syscalls.mount("tmpfs", images, "tmpfs", data=f"size={size},mode=0755")
            for entry in present:
                entry.touch()
                syscalls.mount(under / entry.name, entry, flags=syscalls.MS_BIND)
        finally:
            syscalls.umount(under, syscalls.MNT_DETACH)

    def _unlimit_disk(self) -> bool:
        images = "/var/lib/libvirt/images"
        mounted = _mounts_below(images)
        for where in mounted:
            syscalls.umount(where, syscalls.MNT_DETACH)
        return bool(mounted)

    def run(self) -> None:
        """Until the process is ended."""
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            readable, _, _ = select.select([wake_reader, *self._control.descriptors()], [], [], 60)
            for descriptor in readable:
                if descriptor == wake_reader:
                    os.read(wake_reader, 4096)
                else:
                    self._control.ready(descriptor)


def main() -> None:
    """``python -m virtgrid.lab.keeper PLAN FD``."""
    plan, report = KeeperPlan.from_argument(sys.argv[1]), int(sys.argv[2])
    daemon.detach()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if plan.join is None:
            build(plan)
        else:
            join(plan)
        # A daemonised QEMU whose libvirtd is gone becomes ours, and is buried when it ends.
        syscalls.become_subreaper()
        os.chdir("/")
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(most, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, most), most))
        keeper = Keeper(plan)
    except BaseException as error:
        daemon.report_failure(report, error)
        raise
    daemon.report_ready(report)
    keeper.run()


if __name__ == "__main__":
    main()
