"""What a host lacks, and the command that mends it.

Findings are the preflight's kind (PASS, WARN, FAIL with a hint), so they read alike. Nothing is
changed; every question has a deadline.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.host import doctor_sandbox
from virtgrid.migration.facts import hook_state, resolves
from virtgrid.migration.preflight import Check, CheckVerdict
from virtgrid.virt import host
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.versions import version_text
from virtgrid.wire.certificates import read_certificates
from virtgrid.wire.identity import Role
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.standing import Validity, standing

_PKI: Final = Path("/etc/pki")
_CERTIFICATES: Final = (
    (_PKI / "CA/cacert.pem", "certificate authority"),
    (_PKI / "libvirt/servercert.pem", "server certificate"),
    (_PKI / "libvirt/clientcert.pem", "client certificate"),
)
_COORDINATORS: Final = (Role.GRC, Role.CRM, Role.NRM)
_KVM_CREATE_VM: Final = 0xAE01  # linux/kvm.h
#: QEMU loses guest writes while it migrates under TCG before this version (docs/design/0003).
_TCG_SAFE: Final = 9_000_000
#: libvirt: <mtu>, blocked hooks in .d directories, XML we rely on.
_LIBVIRT_FLOOR: Final = 9_000_000


def _check(name: str, verdict: CheckVerdict, text: str, hint: str | None = None) -> Check:
    return Check(name=name, verdict=verdict, text=text, hint=hint)


async def examine(uri: str, *, local: bool) -> AsyncIterator[Check]:
    """Findings about the hypervisor at ``uri``, and with ``local`` about this host too."""
    if local:
        for check in [*local_findings(), *await doctor_sandbox.findings()]:
            yield check
    async for check in _hypervisor(uri, local=local):
        yield check


def local_findings() -> list[Check]:
    """What gated migration needs and can be seen here without libvirt."""
    return [_rights(), _capture(), _acceleration(), _hooks(), *_certificates(), *_lab()]


def _rights() -> Check:
    if os.geteuid() == 0:
        return _check("rights", CheckVerdict.PASS, "root")
    return _check(
        "rights",
        CheckVerdict.WARN,
        "not root: connections of guests cannot be followed",
        "sudo virtgrid doctor",
    )


def _capture() -> Check:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:
        return _check("capture", CheckVerdict.WARN, "AF_PACKET needs root", "sudo virtgrid doctor")
    except OSError as error:
        return _check(
            "capture",
            CheckVerdict.FAIL,
            f"the kernel has no packet sockets ({error.strerror})",
            "modprobe af_packet",
        )
    return _check("capture", CheckVerdict.PASS, "packet sockets work")


def _acceleration() -> Check:
    """Opened and asked to make a machine: a device node alone proves nothing."""
    hint = "modprobe kvm_intel or kvm_amd; in a virtual machine, allow nesting"
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return _check("kvm", CheckVerdict.WARN, f"no /dev/kvm ({error.strerror}): guests are emulated", hint)
    try:
        os.close(fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))
    except OSError as error:
        text = f"/dev/kvm makes no machines ({error.strerror}): guests are emulated"
        return _check("kvm", CheckVerdict.WARN, text, hint)
    finally:
        os.close(kvm)
    return _check("kvm", CheckVerdict.PASS, "/dev/kvm works")


def _hooks() -> Check:
    text, warning = hook_state()
    if warning:
        return _check("hooks", CheckVerdict.WARN, warning, "chmod +x them and restart libvirtd")
    return _check("hooks", CheckVerdict.PASS, text or "")


def _certificates() -> list[Check]:
    """libvirt's TLS files at their usual places; none at all is fine, half of them is not."""
    places = Places(_PKI)
    coordinators = [
        (places.certificate(role), f"certificate of the {role.upper()}") for role in _COORDINATORS
    ]
    found = [_certificate(path, what) for path, what in coordinators if path.exists()]
    present = [(path, what) for path, what in _CERTIFICATES if path.exists()]
    if not present:
        text = f"no certificates of hosts below {_PKI}; qemu+tls:// is not used here"
        return [*found, _check("tls", CheckVerdict.PASS, text)]
    found += [_certificate(path, what) for path, what in present]
    missing = [f"{what} ({path})" for path, what in _CERTIFICATES if not path.exists()]
    if missing:
        found.append(
            _check(
                "tls", CheckVerdict.WARN, f"missing: {', '.join(missing)}", "virt-pki-validate tells what for"
            )
        )
    return found


def _certificate(path: Path, what: str) -> Check:
    renew = "virtgrid pki request, or whoever issued it, makes another"
    try:
        found = standing(read_certificates(path)[0], now=datetime.now(UTC))
    except RefusedError as error:
        return _check("tls", CheckVerdict.FAIL, f"{what}: {error.what} ({error.cause})", renew)
    day = f"{found.until:%Y-%m-%d}"
    match found.validity:
        case Validity.ENDED:
            return _check("tls", CheckVerdict.FAIL, f"{what} expired on {day} ({path})", renew)
        case Validity.NOT_YET:
            text = f"{what} is not yet valid ({path})"
            return _check("tls", CheckVerdict.FAIL, text, "is this host's clock right?")
        case Validity.ENDS_SOON:
            text = f"{what} valid until {day} only: {found.days_left} days ({path})"
            return _check("tls", CheckVerdict.WARN, text, renew)
    return _check("tls", CheckVerdict.PASS, f"{what} valid until {day} ({path})")


def _lab() -> list[Check]:
    """What `virtgrid lab` needs beyond libvirt; missing means only that there is no lab here."""
    programs = {
        "ip": "iproute2", "busybox": "busybox-static", "mkfs.ext4": "e2fsprogs", "cpio": "cpio",
        "qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "libvirtd": "libvirt-daemon",
        "virsh": "libvirt-clients",
    }  # fmt: skip
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted(package for program, package in programs.items() if not shutil.which(program, path=path))
    if missing:
        return [
            _check(
                "programs",
                CheckVerdict.WARN,
                f"missing: {', '.join(missing)}",
                f"apt-get install {' '.join(missing)}",
            )
        ]
    return [_check("programs", CheckVerdict.PASS, "all that a lab needs is installed")]


async def _hypervisor(uri: str, *, local: bool) -> AsyncIterator[Check]:
    try:
        hypervisor = await Hypervisor.open(uri, name=uri)
    except VirtgridError as error:
        hint = error.hint
        if local:
            hint = "systemctl start libvirtd (or virtqemud), or give the URI: virtgrid doctor URI"
        yield _check("libvirt", CheckVerdict.FAIL, f"{error.what}: {error.cause}", hint)
        return
    async with hypervisor:
        libvirt_version, qemu_version = await host.versions(hypervisor)
        texts = f"libvirt {version_text(libvirt_version)}, QEMU {version_text(qemu_version)} at {uri}"
        if libvirt_version < _LIBVIRT_FLOOR:
            yield _check("libvirt", CheckVerdict.FAIL, f"{texts}; 9.0 or newer is needed", "upgrade libvirt")
        elif qemu_version < _TCG_SAFE and not await host.has_kvm(hypervisor):
            yield _check(
                "libvirt", CheckVerdict.FAIL,
                f"{texts}; without KVM this QEMU loses guest writes while migrating",
                "apt-get install -t bookworm-backports qemu-system-x86 libvirt-daemon",
            )  # fmt: skip
        else:
            yield _check("libvirt", CheckVerdict.PASS, texts)
        announced = await hypervisor.hostname()
        if local:
            return
        if await resolves(announced):
            yield _check(
                "address", CheckVerdict.PASS, f"it announces '{announced}', which this host resolves"
            )
        else:
            yield _check(
                "address", CheckVerdict.WARN,
                f"it announces '{announced}', which this host cannot resolve",
                "harmless with a host in the URI; else set migration_host in its qemu.conf, or --migrateuri",
            )  # fmt: skip


def findings(uri: str, *, local: bool) -> list[Check]:
    """All findings, for callers without an event loop."""

    async def collect() -> list[Check]:
        return [check async for check in examine(uri, local=local)]

    return asyncio.run(collect())
