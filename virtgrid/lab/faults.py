"""Faults on purpose, each with its way back. What can be undone says how."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from virtgrid.core.errors import LabError, NotFoundError
from virtgrid.lab import control, pki, processes
from virtgrid.lab.lab import Lab
from virtgrid.lab.site import Site
from virtgrid.net import netns


def kill_libvirtd(site: Site) -> None:
    """kill -9; guests run on. Errors: NotFoundError when it is dead already."""
    if not site.kill_libvirtd():
        raise NotFoundError(f"libvirtd of {site.name} does not run")


def restore_libvirtd(site: Site) -> bool:
    """Start libvirtd again, or let a stopped one go on, and wait for it. False when all was well."""
    state = site.libvirtd_state()
    if state == "hung":
        continue_libvirtd(site)
    elif state == "dead":
        site.launch_libvirtd()
    site.wait_libvirtd()
    return state != "running"


def stop_libvirtd(site: Site) -> None:
    """SIGSTOP: it takes connections and never answers. Errors: NotFoundError."""
    _signal_libvirtd(site, signal.SIGSTOP)


def continue_libvirtd(site: Site) -> None:
    """SIGCONT. Errors: NotFoundError."""
    _signal_libvirtd(site, signal.SIGCONT)


def _signal_libvirtd(site: Site, number: signal.Signals) -> None:
    if not site.signal_libvirtd(number):
        raise NotFoundError(f"libvirtd of {site.name} does not run")


def kill_qemu(site: Site, domain: str) -> int:
    """kill -9 the QEMU of a domain; returns its pid. Errors: NotFoundError."""
    pid = qemu_pid(site, domain)
    if pid is None or not processes.send(pid, signal.SIGKILL, wait_s=10.0):
        raise NotFoundError(
            f"no QEMU of domain '{domain}' runs at {site.name}",
            hint=f"there run: {', '.join(site.domains()) or 'none'}",
        )
    return pid


def qemu_pid(site: Site, domain: str) -> int | None:
    """The QEMU of a domain at this site, by its command line: the pid file of an incoming one comes late."""
    here = netns.identity(netns.path(site.netns))
    wanted = f"guest={domain},".encode()
    for pid in processes.parents():
        if netns.identity(f"/proc/{pid}/ns/net") != here:
            continue
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(wanted) for word in words):
            return pid
    return None


def limit_disk(site: Site, free_bytes: int) -> None:
    """Leave so much room for *new* images of the site; those it has stay usable.

    The host's disk is not filled.
    """
    control.ask(site.plan.keeper_socket, {"do": "limit-disk", "free_bytes": free_bytes})


def unlimit_disk(site: Site) -> bool:
    """As much room as the host has. Images made meanwhile are gone. False when it was not limited."""
    answer = control.ask(site.plan.keeper_socket, {"do": "unlimit-disk"})
    return bool(answer["was_limited"])


def foreign_certificate(site: Site) -> None:
    """Give the site certificates of an authority nobody knows, and restart its libvirtd."""
    pki.furnish_foreign(site.plan.certificates, site.name, site.plan.hosts)
    _restart_libvirtd(site)


def restore_certificate(lab: Lab, site: Site) -> None:
    """Give the site certificates of the lab's authority, and restart its libvirtd."""
    site.write_certificates(lab.authority())
    _restart_libvirtd(site)


def _restart_libvirtd(site: Site) -> None:
    site.kill_libvirtd()
    site.launch_libvirtd()
    site.wait_libvirtd()


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """What the site's images directory has: bytes in all and free, as its libvirtd sees it."""

    total_bytes: int
    free_bytes: int


def disk_room(site: Site) -> DiskRoom:
    """Errors: LabError when the site is not up."""
    pid = site.inhabitant()
    if pid is None:
        raise LabError(f"site {site.name} is not up")
    found = os.statvfs(f"/proc/{pid}/root/var/lib/libvirt/images")
    return DiskRoom(total_bytes=found.f_blocks * found.f_frsize, free_bytes=found.f_bavail * found.f_frsize)
