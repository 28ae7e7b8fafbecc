"""The system calls about namespaces and mounts that Python 3.11's ``os`` does not have.

Each raises OSError with the kernel's errno. Flags: mount(2), umount2(2), setns(2).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

MS_BIND: Final = 0x1000
MS_MOVE: Final = 0x2000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MS_SHARED: Final = 0x100000
MNT_DETACH: Final = 2
CLONE_FS: Final = 0x00000200
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWNET: Final = 0x40000000
_PIDFD_GETFD: Final = 438
_PR_SET_TIMERSLACK: Final = 29
_PR_SET_CHILD_SUBREAPER: Final = 36

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(
    source: str | Path,
    target: str | Path,
    kind: str | None = None,
    *,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {kind or source} on {target}")


def umount(target: str | Path, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def unshare(flags: int) -> None:
    """unshare(2): for the calling thread where the kind of namespace allows that."""
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, flags: int) -> None:
    """setns(2); the descriptor is a namespace file's or a pidfd."""
    _check(_libc.setns(descriptor, flags), "setns")


def sethostname(name: str) -> None:
    """sethostname(2) in the calling process's UTS namespace."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), f"set hostname {name}")


def become_subreaper() -> None:
    """Orphans among our descendants become our children (prctl PR_SET_CHILD_SUBREAPER)."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def finest_timers() -> None:
    """Waits of this thread end when asked, not up to 50 µs later (prctl PR_SET_TIMERSLACK)."""
    _check(_libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0), "prctl")


def pidfd_getfd(process: int, descriptor: int) -> int:
    """pidfd_getfd(2): a descriptor of another process, as one of ours. process: its pidfd."""
    found = int(_libc.syscall(ctypes.c_long(_PIDFD_GETFD), process, descriptor, 0))
    if found < 0:
        _check(found, "pidfd_getfd")
    return found
