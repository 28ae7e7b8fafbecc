"""What libvirt itself leaves of a container, found by its name and removed when nobody uses it.

Empty directories below libvirt's run directory stay always, for every name there ever was, now and then
a socket beside them; control groups when libvirtd was away as the container ended (and no systemd looks
after them).
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

_RUN: Final = Path("/run/libvirt/lxc")
_SUFFIXES: Final = ("dev", "devpts", "fuse")
#: libvirt cuts names here when it makes a group's (virDomainDefGetShortName).
_SHORT_NAME: Final = 20


def remove(name: str) -> None:
    """Of a container that has ended. A directory that is in use cannot be removed, and stays."""
    for suffix in _SUFFIXES:
        with contextlib.suppress(OSError):
            (_RUN / f"{name}.{suffix}").rmdir()
    with contextlib.suppress(OSError):
        (_RUN / f"{name}.sock").unlink()
    for group in _groups(name):
        _remove_group(group)


def _groups(name: str) -> list[Path]:
    """Groups of dead containers of this name, one partition (``machine``) below each hierarchy."""
    pattern = re.compile(rf"lxc-([0-9]+)-{re.escape(name[:_SHORT_NAME])}\.libvirt-lxc")
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] not in ("cgroup", "cgroup2"):
            continue
        for group in Path(left.split(" ")[4]).glob("*/lxc-*.libvirt-lxc"):
            matched = pattern.fullmatch(group.name)
            if matched and not Path(f"/proc/{matched[1]}").exists():
                found.append(group)
    return found


def _remove_group(group: Path) -> None:
    with contextlib.suppress(OSError):
        for child in group.iterdir():
            if child.is_dir():
                _remove_group(child)
        group.rmdir()
