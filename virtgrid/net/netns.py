"""Named network namespaces, and running a function inside one.

They are made and removed the way ip-netns(8) does it (a bind mount of the namespace below
/run/netns, the directory locked meanwhile), so that ``ip netns exec`` works on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from virtgrid.net import syscalls

T = TypeVar("T")

DIRECTORY: Final = Path("/run/netns")


def path(name: str) -> Path:
    """Where the namespace is mounted."""
    return DIRECTORY / name


def identity(where: str | Path) -> tuple[int, int] | None:
    """Device and inode of a namespace file; None when there is none (or only an empty file)."""
    try:
        found = Path(where).stat()
    except OSError:
        return None
    # A file left behind without its mount lies on an ordinary file system.
    return (found.st_dev, found.st_ino) if found.st_dev == Path("/proc/self/ns/net").stat().st_dev else None


def exists(name: str) -> bool:
    """Is there a living namespace of this name?"""
    return identity(path(name)) is not None


def names(prefix: str) -> list[str]:
    """Names below /run/netns with this prefix, living or not."""
    if not DIRECTORY.is_dir():
        return []
    return sorted(entry.name for entry in DIRECTORY.iterdir() if entry.name.startswith(prefix))


def create(name: str) -> bool:
    """Make the namespace with its loopback up; False when it was there already."""
    with _locked():
        if exists(name):
            return False
        if not _mounted():
            syscalls.mount(str(DIRECTORY), DIRECTORY, flags=syscalls.MS_BIND | syscalls.MS_REC)
            syscalls.mount("", DIRECTORY, flags=syscalls.MS_SHARED | syscalls.MS_REC)
        target = path(name)
        target.touch(mode=0o444)

        def enter_and_pin() -> None:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            syscalls.mount("/proc/thread-self/ns/net", target, flags=syscalls.MS_BIND)

        # unshare(2) concerns the calling thread only, and this one ends here.
        _in_thread(enter_and_pin)
    return True


def delete(name: str) -> bool:
    """Remove the name; the namespace goes with its last process. False when there was none."""
    with _locked():
        target = path(name)
        if not target.exists():
            return False
        while identity(target) is not None:
            syscalls.umount(target, syscalls.MNT_DETACH)
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: other people's namespaces
            if not any(DIRECTORY.iterdir()):
                while _mounted():
                    syscalls.umount(DIRECTORY, syscalls.MNT_DETACH)
                DIRECTORY.rmdir()
    return True


def run_in(name: str | Path, function: Callable[[], T]) -> T:
    """Call ``function`` in a thread that has entered the namespace (a name or a file), and wait.

    Sockets, TAPs and files below /proc/sys/net opened there belong to that namespace for good.
    """
    where = path(name) if isinstance(name, str) else name

    def call() -> T:
        enter(where)
        return function()

    return _in_thread(call)


def enter(where: str | Path) -> None:
    """Move the calling thread into the namespace of this name or file."""
    where = path(where) if isinstance(where, str) else where
    descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(descriptor, syscalls.CLONE_NEWNET)
    finally:
        os.close(descriptor)


def _in_thread(function: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # carried over to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=call, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _mounted() -> bool:
    """Is /run/netns a mount of its own? (os.path.ismount does not see a bind within one file system.)"""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == str(DIRECTORY) for line in lines)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock of /run/netns, made if need be. iproute2 takes the same one."""
    while True:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = os.fstat(descriptor)
            try:
                now = DIRECTORY.stat()
            except FileNotFoundError:
                continue  # whoever held the lock before us removed the directory
            if (held.st_dev, held.st_ino) != (now.st_dev, now.st_ino):
                continue
            yield
            return
        finally:
            os.close(descriptor)


def set_sysctl(name: str, values: dict[str, str]) -> None:
    """Write settings (``net/ipv4/tcp_rmem``) in a namespace; those the kernel lacks are left out."""

    def write() -> None:
        for key, value in values.items():
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/sys", key).write_text(value)

    run_in(name, write)
