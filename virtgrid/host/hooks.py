"""virtgrid's hooks below /etc/libvirt/hooks: put there, looked at, taken away. Only ever our own link."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.core.shipped import shipped

DIRECTORY: Final = Path("/etc/libvirt/hooks")
PROGRAM: Final = "50-virtgrid"
#: libvirt's drivers whose domains virtgrid has something to do for.
DRIVERS: Final = ("lxc", "qemu")
#: Who runs a driver's domains, by the pid file it holds.
_DAEMONS: Final = {
    "lxc": ("/run/libvirtd.pid", "/run/virtlxcd.pid"),
    "qemu": ("/run/libvirtd.pid", "/run/virtqemud.pid"),
}


class HookState(StrEnum):
    """installed: our link, to this virtgrid. absent. old: our link, to a virtgrid that is not this one.
    foreign: a file of somebody else at our place; it is never touched."""

    INSTALLED = "installed"
    ABSENT = "absent"
    OLD = "old"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One of our places. others: further hooks of this driver, which libvirt runs as well.

    restart_needed: the daemon runs, and looked for hooks before this one was there.
    """

    driver: str
    path: Path
    state: HookState
    target: str | None
    others: tuple[Path, ...]
    restart_needed: bool


def program() -> Path:
    """The program itself, inside this virtgrid."""
    return shipped("hooks", PROGRAM).resolve()


def status(directory: Path = DIRECTORY) -> list[Hook]:
    """What there is, for each driver."""
    return [_look(directory, driver) for driver in DRIVERS]


def install(directory: Path = DIRECTORY) -> list[Hook]:
    """Link the program into every driver's directory. Done twice it changes nothing.

    Errors: RefusedError when somebody else's file is in the way, VirtgridError.
    """
    if not os.access(program(), os.X_OK):
        raise RefusedError(f"{program()} cannot be executed", hint="install virtgrid again")
    for hook in status(directory):
        if hook.state is HookState.FOREIGN:
            raise RefusedError(
                f"{hook.path} is there and is not virtgrid's; it is left alone",
                hint="give it another name, all files of the directory are run",
            )
    for hook in status(directory):
        if hook.state is HookState.INSTALLED:
            continue
        fresh = hook.path.with_name(f".{PROGRAM}.new")
        try:
            hook.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(program())
            fresh.rename(hook.path)
        except OSError as error:
            raise VirtgridError(f"{hook.path} cannot be made", cause=error.strerror) from error
    return status(directory)


def remove(directory: Path = DIRECTORY) -> list[Hook]:
    """Take our links away, and directories that are empty then. Errors: VirtgridError."""
    before = status(directory)
    for hook in before:
        if hook.state in (HookState.INSTALLED, HookState.OLD):
            try:
                hook.path.unlink()
                if not any(hook.path.parent.iterdir()):
                    hook.path.parent.rmdir()
            except OSError as error:
                raise VirtgridError(f"{hook.path} cannot be removed", cause=error.strerror) from error
    return before


def _look(directory: Path, driver: str) -> Hook:
    path = directory / f"{driver}.d" / PROGRAM
    state, target = HookState.ABSENT, None
    if path.is_symlink():
        target = os.fspath(path.readlink())
        if path.exists() and path.resolve() == program():
            state = HookState.INSTALLED
        elif Path(target).name == PROGRAM:
            state = HookState.OLD
        else:
            state = HookState.FOREIGN
    elif path.exists():
        state = HookState.FOREIGN
    others = [directory / driver] if (directory / driver).exists() else []
    if path.parent.is_dir():
        others += sorted(entry for entry in path.parent.iterdir() if entry != path)
    return Hook(
        driver=driver,
        path=path,
        state=state,
        target=target,
        others=tuple(others),
        restart_needed=state is HookState.INSTALLED and _daemon_older(driver, path),
    )


def daemon_pid() -> int | None:
    """The daemon that runs LXC domains; None when none does."""
    found = _daemon("lxc")
    return None if found is None else found[0]


def _daemon(driver: str) -> tuple[int, float] | None:
    """(pid, when it began, seconds since the epoch)"""
    for name in _DAEMONS[driver]:
        try:
            pid, began_s = int(Path(name).read_text()), Path(name).stat().st_mtime
        except (OSError, ValueError):
            continue
        if Path(f"/proc/{pid}").is_dir():
            return pid, began_s
    return None


def _daemon_older(driver: str, path: Path) -> bool:
    """Does the daemon run since before the link? libvirt looks for hooks once, when it starts."""
    found = _daemon(driver)
    return found is not None and found[1] < path.lstat().st_mtime
