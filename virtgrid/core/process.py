"""Telling processes apart (a pid alone may belong to another one by now), and being a process of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
from pathlib import Path
from typing import Final, NamedTuple

_CREDENTIALS: Final = struct.Struct("=3i")


def process_started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), stat field 22).

    None when there is no such process, or only its zombie. With the pid it names a process for good:
    the driver writes both into its journal, so that nobody takes a later process for it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command's name, may hold anything, parentheses and spaces included.
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return None if after_name[0] in {b"Z", b"X"} else int(after_name[19])


class Credentials(NamedTuple):
    """Who made the other end of a unix socket."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connected: socket.socket) -> Credentials:
    """Who is at the other end of a unix socket, as the kernel tells it (SO_PEERCRED). Errors: OSError."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Credentials(*_CREDENTIALS.unpack(raw))


def let_go_of_stdout() -> None:
    """Whoever waits for the end of our standard output has it now; what is still written goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


def be_real_time() -> None:
    """Before all that merely computes, where that is permitted: for a process that mostly sleeps."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def allow_files(wanted: int) -> None:
    """Let this process have so many files open, as far as it may decide that (RLIMIT_NOFILE)."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY and now < wanted:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, limit), most))
