"""Where figures were measured: they are worth nothing without it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from lxml import etree

from virtgrid import __version__
from virtgrid.lab import guest
from virtgrid.lab.stage import Stage

_ASK_S: Final = 20.0


def environment(**more: Any) -> dict[str, Any]:
    """What a figure depends on: versions, machine, how busy it was before; then ``more``."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "virtgrid": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "libvirt": _version(["libvirtd", "--version"]),
        "qemu": _version(["qemu-system-x86_64", "--version"]),
        "load_before": round(os.getloadavg()[0], 2),
        **more,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(command: Sequence[str]) -> str | None:
    """The first line a program tells of its version; None when it is not there."""
    program = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        return None
    try:
        told = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.partition("\n")[0].strip() or None


def accelerator() -> str:
    """What lab guests run on: their template's domain type says it."""
    kind = etree.parse(guest.template_path()).getroot().get("type", "")
    return {"qemu": "emulation (TCG)", "kvm": "KVM"}.get(kind, kind)


def measured_at(stage: Stage, **more: Any) -> dict[str, Any]:
    """The environment of what is measured on this stage."""
    wan = stage.lab.config.wan
    return environment(
        wan=stage.lab.wan_status()["kind"],
        rate_bytes_s=wan.rate_bytes_s,
        rtt_s=wan.rtt_s,
        accelerator=accelerator(),
        **more,
    )
