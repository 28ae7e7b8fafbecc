"""What libvirt itself leaves of a container, found by its name and removed when nobody uses it.

Empty directories below libvirt's run directory stay always, for every name there ever was, now and then
a socket beside them; control groups when libvirtd was away as the container ended (and no systemd looks
after them), and in such a group, when libvirtd was killed as it began, its first process.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Final

_RUN: Final = Path("/run/libvirt/lxc")
_SUFFIXES: Final = ("dev", "devpts", "fuse")
#: libvirt cuts names here when it makes a group's (virDomainDefGetShortName).
_SHORT_NAME: Final = 20
_ENDS_S: Final = 5.0


def remove(name: str, *, patience_s: float = 0.0) -> None:
    """Of a container that has ended. A directory that is in use cannot be removed, and stays.

    patience_s: for a libvirt_lxc that is still there to end by itself, as one does whose libvirtd was killed
    while it began. After that it is somebody else's, of the same name.
    """
    for suffix in _SUFFIXES:
        with contextlib.suppress(OSError):
            (_RUN / f"{name}.{suffix}").rmdir()
    with contextlib.suppress(OSError):
        (_RUN / f"{name}.sock").unlink()
    groups = _groups(name, patience_s)
    for group in groups:
        _end(group)
    for group in groups:
        _remove_group(group)


def _groups(name: str, patience_s: float) -> list[Path]:
    """Groups of dead containers of this name, one partition (``machine``) below each hierarchy."""
    pattern = re.compile(rf"lxc-([0-9]+)-{re.escape(name[:_SHORT_NAME])}\.libvirt-lxc")
    found = []
    dead: dict[str, bool] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] not in ("cgroup", "cgroup2"):
            continue
        for group in Path(left.split(" ")[4]).glob("*/lxc-*.libvirt-lxc"):
            matched = pattern.fullmatch(group.name)
            if matched is None:
                continue
            if matched[1] not in dead:
                dead[matched[1]] = _dies(int(matched[1]), patience_s)
            if dead[matched[1]]:
                found.append(group)
    return found


def _dies(pid: int, within_s: float) -> bool:
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        return bool(select.select([handle], [], [], within_s)[0])
    finally:
        os.close(handle)


def _end(group: Path) -> None:
    """Kill what is still in the group of a dead container, and wait for its end.

    A libvirtd killed while a container begins may leave the first process of it, waiting for a word of
    libvirt_lxc, which is dead: it is nobody's any more, and holds the group.
    """
    waiting: list[int] = []
    try:
        for members in sorted(group.rglob("cgroup.procs")):
            for pid in map(int, members.read_text().split()):
                with contextlib.suppress(OSError):
                    handle = os.pidfd_open(pid)
                    waiting.append(handle)
                    if str(pid) in members.read_text().split():  # still the one that was meant
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                    else:
                        os.close(waiting.pop())
        until_s = time.monotonic() + _ENDS_S
        for handle in waiting:
            select.select([handle], [], [], max(0.0, until_s - time.monotonic()))
    finally:
        for handle in waiting:
            os.close(handle)


def _remove_group(group: Path) -> None:
    with contextlib.suppress(OSError):
        for child in group.iterdir():
            if child.is_dir():
                _remove_group(child)
        group.rmdir()
