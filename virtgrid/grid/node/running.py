"""A running sandbox as the host sees it: its first process, its network and its sshd.

Everything here blocks and is called in a thread. What happens in the sandbox's network namespace
is done by a thread that enters it; nothing is executed inside.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtgrid.core.errors import DeadlineError, VirtgridError
from virtgrid.core.process import process_started
from virtgrid.grid.node import cables
from virtgrid.grid.node.spec import SandboxSpec
from virtgrid.net import netns

_SSH_PORT: Final = 22
_INSIDE: Final = "eth0"
_POLL_S: Final = 0.001
_FIRST_S: Final = 2.0
_CARRIER_S: Final = 0.5
_IFA_F_TENTATIVE: Final = 0x40


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstProcess:
    """The first process of a sandbox, on the host. started: ticks since boot; the two name it for good."""

    pid: int
    started: int

    @property
    def network(self) -> Path:
        """Its network namespace."""
        return Path(f"/proc/{self.pid}/ns/net")


def first_process(controller: int) -> FirstProcess:
    """The child of libvirt_lxc in a process namespace of its own. Errors: VirtgridError."""
    deadline_s = time.monotonic() + _FIRST_S
    while True:
        try:
            children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
            outside = netns.identity(f"/proc/{controller}/ns/pid")
            for child in map(int, children):
                started = process_started(child)
                if started is not None and netns.identity(f"/proc/{child}/ns/pid") != outside:
                    return FirstProcess(pid=child, started=started)
        except OSError as error:
            raise VirtgridError("the sandbox ended as soon as it began", cause=error.strerror) from error
        if time.monotonic() > deadline_s:
            raise VirtgridError("the sandbox has no first process")
        time.sleep(_POLL_S)


def announce(init: FirstProcess, spec: SandboxSpec) -> None:
    """Once its cable carries, tell the neighbours whose address this is. Best effort: they ask as well."""

    def tell() -> None:
        if cables.wait_running(_INSIDE, _CARRIER_S):
            cables.announce(_INSIDE, spec.family)

    with contextlib.suppress(OSError):
        netns.run_in(init.network, tell)


def kill(init: FirstProcess) -> None:
    """SIGKILL, and wait until the kernel has ended everything in its process namespace."""
    try:
        descriptor = os.pidfd_open(init.pid)
    except OSError:
        return
    try:
        if process_started(init.pid) == init.started:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(5000)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def wait_for_sshd(init: FirstProcess, spec: SandboxSpec, log: str, timeout_s: float) -> None:
    """Until sshd answers, asked inside (the host may have no address on that bridge).

    log: of that sshd, on the host. Errors: VirtgridError when the sandbox ends first, with what sshd
    said; DeadlineError.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        netns.run_in(init.network, lambda: _ask_sshd(init, spec, log, deadline_s))
    except OSError as error:
        raise _ended(spec.name, log) from error


def _ask_sshd(init: FirstProcess, spec: SandboxSpec, log: str, deadline_s: float) -> None:
    family = socket.AF_INET if spec.family == "ipv4" else socket.AF_INET6
    where = "127.0.0.1" if spec.family == "ipv4" else "::1"
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as line, contextlib.suppress(OSError):
            line.settimeout(max(0.001, min(5.0, deadline_s - time.monotonic())))
            line.connect((where, _SSH_PORT))
            if line.recv(16).startswith(b"SSH-") and not _tentative(init.pid, spec.ip):
                return
        if process_started(init.pid) != init.started:
            raise _ended(spec.name, log)
        if time.monotonic() > deadline_s:
            raise DeadlineError(
                f"sshd of sandbox '{spec.name}' does not answer", cause=_last_words(log), hint="see its log"
            )
        time.sleep(_POLL_S)


def _tentative(pid: int, address: str) -> bool:
    """Is the kernel still asking whether somebody else has this IPv6 address? (A second or two.)"""
    wanted = f"{int(ipaddress.ip_address(address)):032x}"
    lines = Path(f"/proc/{pid}/net/if_inet6").read_text().splitlines() if ":" in address else []
    return any(line.startswith(wanted) and int(line.split()[4], 16) & _IFA_F_TENTATIVE for line in lines)


def _ended(name: str, log: str) -> VirtgridError:
    return VirtgridError(f"sandbox '{name}' ended before its sshd answered", cause=_last_words(log))


def _last_words(log: str) -> str | None:
    """The end of what sshd wrote. The file is the sandbox's: read as data, never through a link."""
    try:
        descriptor = os.open(log, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        lines = file.read(65536).decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-3:]) or None
