"""Which libvirt this program speaks through."""

from __future__ import annotations

import importlib.metadata

import libvirt


def version_text(number: int) -> str:
    """libvirt's way of counting versions (major * 10^6 + minor * 10^3 + release) as people write it."""
    return f"{number // 10**6}.{number // 1000 % 1000}.{number % 1000}"


def client_versions() -> str:
    """The client library and its binding, for ``--version``."""
    binding = importlib.metadata.version("libvirt-python")
    return f"libvirt {version_text(libvirt.getVersion())}, libvirt-python {binding}"
