"""Whether this Nova is one the driver fits: the signatures it relies on, most of them private. Pure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

#: What is overridden or called of ``nova.virt.libvirt.driver.LibvirtDriver`` (``self`` left out).
DRIVER: Final[Mapping[str, tuple[str, ...]]] = {
    "_live_migration": (
        "context", "instance", "dest", "post_method", "recover_method", "block_migration", "migrate_data",
    ),
    "_live_migration_operation": (
        "context", "instance", "dest", "block_migration", "migrate_data", "guest", "device_names",
    ),
    "_live_migration_monitor": (
        "context", "instance", "guest", "dest", "post_method", "recover_method", "block_migration",
        "migrate_data", "future", "disk_paths",
    ),
    "live_migration_force_complete": ("instance",),
    "live_migration_abort": ("instance",),
    "_parse_migration_flags": (),
    "_live_migration_uri": ("dest",),
    "_uri": (),
}  # fmt: skip
#: Of ``nova.virt.libvirt.guest.Guest``: what the monitor's guest is stood in for, and what is asked of it.
GUEST: Final[Mapping[str, tuple[str, ...]]] = {
    "migrate_configure_max_downtime": ("mstime",),
    "abort_job": (),
    "get_interfaces": (),
}
#: Of ``nova.virt.libvirt.migration``: the ramp reaches the guest only through the guest it is given.
RAMP: Final[Mapping[str, tuple[str, ...]]] = {
    "update_downtime": ("guest", "instance", "olddowntime", "downtime_steps", "elapsed"),
}


class UnfitNovaError(ImportError):
    """This Nova is not one the driver fits; Nova logs it and does not start."""


def misfits(owner: Any, name: str, expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """What is not as expected, a sentence each: 'LibvirtDriver._live_migration takes (…), not (…)'."""
    found = []
    for method, parameters in expected.items():
        has = getattr(owner, method, None)
        if not callable(has):
            found.append(f"{name} has no {method}")
            continue
        takes = tuple(p for p in inspect.signature(has).parameters if p != "self")
        if takes != parameters:
            found.append(f"{name}.{method} takes ({', '.join(takes)}), not ({', '.join(parameters)})")
    return found


def refuse_unless_fit(version: str, found: list[str]) -> None:
    """Errors: UnfitNovaError, which names Nova's version and every method."""
    if found:
        raise UnfitNovaError(
            f"virtgrid.VirtgridDriver does not fit nova {version}: {'; '.join(found)}."
            " Use the virtgrid made for this nova, or compute_driver = libvirt.LibvirtDriver"
        )
