"""Which processes belong to a lab, and their end.

Names and pid files can lie after a crash, so neither is asked. A process is a lab's when it is in one of
the lab's network namespaces, or sees the lab's directory as its /run, or was started with the lab's mark
in its environment, or descends from such a process. Signals go through pidfds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virtgrid.core.errors import LabError, RefusedError
from virtgrid.lab.layout import MARKER, namespace_prefix
from virtgrid.net import netns

_ROUND_S: Final = 5.0
_CONTAINER_CGROUP: Final = ".libvirt-lxc"


@dataclass(slots=True)
class Signs:
    """What gives a lab's processes away. Inodes are (device, inode)."""

    namespaces: set[tuple[int, int]] = field(default_factory=set)
    run_directories: set[tuple[int, int]] = field(default_factory=set)
    mark: bytes = b""

    @staticmethod
    def of(name: str, root: Path) -> Signs:
        """The signs of the lab of this name and directory, as far as they still exist."""
        signs = Signs(mark=f"{MARKER}={root}".encode())
        for namespace in netns.names(namespace_prefix(name)):
            identity = netns.identity(netns.path(namespace))
            if identity:
                signs.namespaces.add(identity)
        for run in root.glob("sites/*/run"):
            signs.run_directories.add(_inode(run) or (0, 0))
        return signs

    def match(self, pid: int) -> bool:
        """Does the process itself show a sign?"""
        base = f"/proc/{pid}"
        if _inode(f"{base}/ns/net") in self.namespaces or _inode(f"{base}/root/run") in self.run_directories:
            return True
        if not self.mark:  # an empty one would be found in every environment
            return False
        try:
            environment = Path(base, "environ").read_bytes()
        except OSError:
            return False
        return self.mark in environment.split(b"\0")


def _inode(where: str | Path) -> tuple[int, int] | None:
    try:
        found = Path(where).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def parents() -> dict[int, int]:
    """Every process of the machine and its parent, zombies left out."""
    found = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - called in a loop over all processes
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                state, parent = _stat(int(entry))
                if state not in "ZX":
                    found[int(entry)] = parent
    return found


def state(pid: int) -> str | None:
    """The kernel's letter for the process's state (R S D T Z …); None when there is none."""
    try:
        return _stat(pid)[0]
    except (OSError, ValueError):
        return None


def _stat(pid: int) -> tuple[str, int]:
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], int(fields[1])


def find(signs: Signs) -> set[int]:
    """The pids of the lab's processes: those that show a sign, and what descends from them."""
    tree = parents()
    ours = {pid for pid in tree if signs.match(pid)}
    grown = True
    while grown:
        more = {pid for pid, parent in tree.items() if parent in ours} - ours
        ours |= more
        grown = bool(more)
    return ours


def kill_all(signs: Signs, *, timeout_s: float = 30.0) -> int:
    """End them all with SIGKILL and wait until they are gone; returns how many there were.

    Errors: RefusedError when the caller is one of them; LabError when some do not go.
    """
    deadline_s = time.monotonic() + timeout_s
    killed: set[int] = set()
    mine = set(_ancestry(os.getpid()))
    while pids := find(signs):
        if pids & mine:
            raise RefusedError(
                "this command runs inside the lab it would end", hint="leave `virtgrid lab exec` first"
            )
        if time.monotonic() > deadline_s:
            raise LabError(
                f"processes of the lab do not end: {_list(pids)}", hint="virtgrid lab down tries again"
            )
        killed |= _kill(pids, signs)
    return len(killed)


def _kill(pids: set[int], signs: Signs) -> set[int]:
    waiting: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(OSError):
                waiting[os.pidfd_open(pid)] = pid
        # Looked at again now that the pidfds hold: a number may have passed to somebody else meanwhile.
        still = find(signs)
        for descriptor, pid in waiting.items():
            if pid in still:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _wait({d for d, pid in waiting.items() if pid in still}, _ROUND_S)
        return {pid for pid in waiting.values() if pid in still}
    finally:
        for descriptor in waiting:
            os.close(descriptor)


def _wait(descriptors: set[int], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    left = set(descriptors)
    while left and (left_s := deadline_s - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(left_s * 1000):
            poller.unregister(descriptor)
            left.discard(descriptor)


def send(pid: int, number: signal.Signals, *, wait_s: float | None = None) -> bool:
    """Signal one process; False when it is gone. With ``wait_s`` wait that long for its end."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
        if wait_s is not None:
            _wait({descriptor}, wait_s)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def _ancestry(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        try:
            pid = _stat(pid)[1]
        except (OSError, ValueError):
            return


def _list(pids: set[int]) -> str:
    words = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            words.append(f"{pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})")
    return ", ".join(words)


def mark_directories(name: str) -> set[str]:
    """The directories of the labs whose processes are in namespaces of this name: normally one."""
    signs = Signs.of(name, Path("/nonexistent"))
    found = set()
    for pid in parents():
        if _inode(f"/proc/{pid}/ns/net") in signs.namespaces:
            with contextlib.suppress(OSError):
                for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if word.startswith(f"{MARKER}=".encode()):
                        found.add(os.fsdecode(word.partition(b"=")[2]))
    return found


def lock_owner(where: Path) -> int | None:
    """The process that holds a POSIX lock on the file (as libvirtd does on its pid file), or None."""
    shape = "hhqqi4x"
    try:
        with where.open("rb") as file:
            asked = struct.pack(shape, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            answer = struct.unpack(shape, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None
    return int(answer[4]) if answer[0] != fcntl.F_UNLCK and answer[4] > 0 else None


def cgroup_directories(pids: set[int]) -> list[Path]:
    """The cgroups libvirt made for containers among these processes, the deepest first."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            mounts[""] = left.split(" ")[4]
        elif kind == "cgroup":
            for option in options.rpartition(" ")[2].split(","):
                mounts[option] = left.split(" ")[4]
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                _, controllers, inside = line.split(":", 2)
                where = next((mounts[c] for c in controllers.split(",") if c in mounts), None)
                path = Path(f"{where}{inside}")
                while where and any(_CONTAINER_CGROUP in part for part in path.relative_to(where).parts):
                    found.add(path)
                    path = path.parent
    return sorted(found, key=lambda path: len(path.parts), reverse=True)


def remove_cgroups(directories: list[Path]) -> None:
    """Remove them, and libvirt's directory above them when nothing else is in it.

    A cgroup with a process or a child in it cannot be removed, so nobody else's is ever hurt.
    """
    for directory in [*directories, *sorted({d.parent for d in directories if d.parent.name == "machine"})]:
        with contextlib.suppress(OSError):
            directory.rmdir()
