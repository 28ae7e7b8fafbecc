"""Run a program inside a sandbox: ``python3 -I -S enter.py``, what to run as JSON in VIRTGRID_ENTER.

A program of its own, because a process changes for good when it enters. It joins the sandbox's control
groups (found in /proc, wherever they are mounted), its namespaces, takes the user's ids and the limit of
processes, and waits; its exit status is the program's, 128 + n when that ended by signal n, 125 when it
could not be started. Standard input, output and error are the caller's, so back-pressure is the pipe's.
When this process ends, the program is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_KINDS = {
    "mnt": _CLONE_NEWNS, "uts": _CLONE_NEWUTS, "ipc": _CLONE_NEWIPC, "user": _CLONE_NEWUSER,
    "pid": _CLONE_NEWPID, "net": _CLONE_NEWNET,
}  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
NOT_STARTED = 125
NOT_FOUND = 127
_libc = ctypes.CDLL(None, use_errno=True)


def started(pid: int) -> int:
    """When the process started, in ticks since boot: with the pid it names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        text = file.read()
    return int(text[text.rindex(b")") + 2 :].split()[19])


def control_groups(pid: int) -> list[str]:
    """The files that take a process into the groups of this one, v1 or v2."""
    places: dict[str, tuple[str, str]] = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, _, options = right.rstrip("\n").split(" ", 2)
            top, where = left.split(" ")[3:5]
            if kind == "cgroup2":
                places[""] = (top, where)
            elif kind == "cgroup":
                places.update(dict.fromkeys(options.rpartition(" ")[2].split(","), (top, where)))
    found = []
    with open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            _, controllers, inside = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                if controller in places:
                    top, where = places[controller]
                    inside = inside[len(top) :] if top != "/" and inside.startswith(top) else inside
                    found.append(f"{where}{inside}/cgroup.procs")
                    break
    return found


def _enter(order: dict[str, Any]) -> None:
    """Into the groups and namespaces of the first process."""
    pid = int(order["init"])
    descriptor = os.pidfd_open(pid)
    if started(pid) != order["started"]:
        raise ProcessLookupError("the sandbox has ended")
    me = str(os.getpid())
    for path in control_groups(pid):
        try:
            with open(path, "w") as file:
                file.write(me)
        except FileNotFoundError:  # a hierarchy that is not mounted here
            continue
    kinds = 0
    for name, flag in _KINDS.items():
        theirs, ours = os.stat(f"/proc/{pid}/ns/{name}"), os.stat(f"/proc/self/ns/{name}")
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            kinds |= flag
    if _libc.setns(descriptor, kinds) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"enter the sandbox: {os.strerror(number)}")
    os.close(descriptor)
    # The host's root is nobody inside; the sandbox's own root may use its terminals.
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _become(order: dict[str, Any]) -> None:
    """Inside and forked: the user, its limits, the program."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if order["processes"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (order["processes"], order["processes"]))
    os.setresgid(order["gid"], order["gid"], order["gid"])
    os.setresuid(order["uid"], order["uid"], order["uid"])
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # forgotten with the old ids
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.chdir(order["cwd"])
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.closerange(3, 65536)
    os.execvpe(order["argv"][0], order["argv"], order["env"])


def _child(order: dict[str, Any], terminal: str | None) -> None:
    """Never returns."""
    try:
        if terminal is not None:
            os.setsid()
            line = os.open(terminal, os.O_RDWR)  # becomes the controlling terminal
            for number in (0, 1, 2):
                os.dup2(line, number)
        _become(order)
    except FileNotFoundError as error:
        os.write(2, f"virtgrid: {error.filename or order['argv'][0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND)
    except BaseException as error:
        os.write(2, f"virtgrid: {order['argv'][0]}: {error}\n".encode())
    os._exit(NOT_STARTED)


def _wait(pid: int) -> int:
    """The program's end; signals meant for it are passed on."""

    def pass_on(number: int, _: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, pass_on)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _relay(master: int, pid: int) -> int:
    """Between our terminal and the one inside, until the program ends."""

    def resize(*_: object) -> None:
        try:
            size = os.get_terminal_size(0)
        except OSError:
            return
        termios.tcsetwinsize(master, (size.lines, size.columns))

    before = termios.tcgetattr(0) if os.isatty(0) else None
    resize()
    signal.signal(signal.SIGWINCH, resize)
    inputs = [0, master]
    try:
        if before is not None:
            tty.setraw(0)
        while True:
            readable, _, _ = select.select(inputs, [], [])
            if master in readable:
                try:
                    data = os.read(master, 65536)
                except OSError:  # EIO: nobody has it open inside any more
                    break
                if not data:
                    break
                os.write(1, data)
            if 0 in readable:
                data = os.read(0, 65536)
                if data:
                    os.write(master, data)
                else:
                    inputs.remove(0)
                    os.write(master, b"\x04")
    finally:
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def main() -> int:
    order = json.loads(os.environ.pop("VIRTGRID_ENTER"))
    try:
        _enter(order)
        master, terminal = -1, None
        if order["terminal"]:
            master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
            _unlock(master)
            terminal = f"/dev/pts/{_number(master)}"
            os.chown(terminal, order["uid"], order["gid"])
        pid = os.fork()
    except OSError as error:
        os.write(2, f"virtgrid: {error}\n".encode())
        return NOT_STARTED
    if pid == 0:
        _child(order, terminal)
    return _wait(pid) if terminal is None else _relay(master, pid)


def _unlock(master: int) -> None:
    """TIOCSPTLCK, as unlockpt(3)."""
    if _libc.ioctl(master, ctypes.c_ulong(0x40045431), ctypes.byref(ctypes.c_int(0))) != 0:
        raise OSError(ctypes.get_errno(), "unlock the terminal")


def _number(master: int) -> int:
    """TIOCGPTN, as ptsname(3)."""
    number = ctypes.c_uint()
    if _libc.ioctl(master, ctypes.c_ulong(0x80045430), ctypes.byref(number)) != 0:
        raise OSError(ctypes.get_errno(), "name the terminal")
    return number.value


if __name__ == "__main__":
    sys.exit(main())
