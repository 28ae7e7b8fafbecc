"""``VirtgridDriver``: Nova's LibvirtDriver whose live migrations are held and let go by the gate.

Everything is Nova's own (pre, post, rollback, volumes, interfaces, the migrate call, the monitor's loop and
its figures) but for three things. A gatekeeper process (``migration.gatekeeper``) runs beside the migrate
call. The monitor's ramp of the downtime does not reach a held guest: it would undo the hold. And
force-complete of a held migration releases it. What is relied on is checked when this module is loaded.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import os
import shlex
import sys
from dataclasses import asdict
from typing import Any

import nova.conf
from nova.compute import vm_states
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import migration as libvirt_migration
from oslo_log import log

from virtgrid.openstack import fitting, options
from virtgrid.openstack.holding import Hold

CONF = nova.conf.CONF
LOG = log.getLogger(__name__)

fitting.refuse_unless_fit(
    importlib.metadata.version("nova"),
    [
        *fitting.misfits(libvirt_driver.LibvirtDriver, "LibvirtDriver", fitting.DRIVER),
        *fitting.misfits(libvirt_guest.Guest, "Guest", fitting.GUEST),
        *fitting.misfits(libvirt_migration, "nova.virt.libvirt.migration", fitting.RAMP),
    ],
)
options.register(CONF)


class HeldGuest:
    """A guest as Nova's monitor is given it while ours is held: its downtime is not the monitor's to set."""

    def __init__(self, guest: Any) -> None:
        self._guest = guest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guest, name)

    def migrate_configure_max_downtime(self, mstime: int) -> None:
        LOG.debug("A downtime of %d ms is not set: the switchover is held", mstime)


class VirtgridDriver(libvirt_driver.LibvirtDriver):  # type: ignore[misc]  # Nova has no types
    """See the top of this module. A mixed cloud is fine: the destination may run LibvirtDriver."""

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self._policy = options.policy_of(CONF)
        self._holds: dict[str, Hold] = {}

    def _parse_migration_flags(self) -> None:
        if CONF.virtgrid.hold:
            options.refuse_contradictions(CONF)
        super()._parse_migration_flags()

    def _live_migration(
        self, context: Any, instance: Any, dest: str, post_method: Any, recover_method: Any,
        block_migration: bool, migrate_data: Any,
    ) -> None:  # fmt: skip
        hold = self._hold_for(instance, dest, migrate_data)
        if hold is not None:
            self._holds[instance.uuid] = hold
        try:
            super()._live_migration(
                context, instance, dest, post_method, recover_method, block_migration, migrate_data
            )
        finally:
            if hold is not None:
                del self._holds[instance.uuid]
                hold.close()
                self._tell(instance, hold.over)

    def _live_migration_operation(
        self, context: Any, instance: Any, dest: str, block_migration: bool, migrate_data: Any, guest: Any,
        device_names: Any,
    ) -> None:  # fmt: skip
        hold = self._holds.get(instance.uuid)
        if hold is not None:
            hold.start()
        try:
            super()._live_migration_operation(
                context, instance, dest, block_migration, migrate_data, guest, device_names
            )
        except Exception as error:
            if hold is not None:
                number = getattr(error, "get_error_code", lambda: 0)()
                hold.ended(error, number or 0)
            raise
        if hold is not None:
            hold.ended(None)

    def _live_migration_monitor(
        self, context: Any, instance: Any, guest: Any, dest: str, post_method: Any, recover_method: Any,
        block_migration: bool, migrate_data: Any, future: Any, disk_paths: Any,
    ) -> None:  # fmt: skip
        seen = HeldGuest(guest) if instance.uuid in self._holds else guest
        super()._live_migration_monitor(
            context, instance, seen, dest, post_method, recover_method, block_migration, migrate_data,
            future, disk_paths,
        )  # fmt: skip

    def live_migration_force_complete(self, instance: Any) -> None:
        """Held: let go now. Otherwise Nova's own way, with nothing of the hold left to slow it down."""
        hold = self._holds.get(instance.uuid)
        if hold is not None and hold.release():
            LOG.info("The live migration was held and is let go", instance=instance)
            return
        super().live_migration_force_complete(instance)

    # --- what a hold is made of ---------------------------------------------------------

    def _hold_for(self, instance: Any, dest: str, migrate_data: Any) -> Hold | None:
        """The hold of this migration; None, and the log says why, when it is migrated as Nova does."""
        if not CONF.virtgrid.hold:
            return None
        if instance.vm_state == vm_states.PAUSED:
            LOG.info("Not held: it is paused, nobody waits for it", instance=instance)
            return None
        guest = self._host.get_guest(instance)
        taps = guest.get_interfaces()
        wanted = CONF.virtgrid.capture_interface
        tap = next((name for name in taps if name and fnmatch.fnmatchcase(name, wanted)), None)
        if tap is None:
            LOG.warning(
                "Not held: none of its interfaces (%s) is like capture_interface = %s",
                ", ".join(map(str, taps)) or "none", wanted, instance=instance,
            )  # fmt: skip
            return None
        if "target_connect_addr" in migrate_data and migrate_data.target_connect_addr is not None:
            dest = migrate_data.target_connect_addr
        bandwidth_mib_s = CONF.libvirt.live_migration_bandwidth
        request = {
            "domain": instance.uuid,
            "source_uri": self._uri(),
            "dest_uri": self._live_migration_uri(dest),
            "policy": asdict(self._policy),
            # What the gatekeeper needs to know of it: that disks go first.
            "copy_storage": "inc" if migrate_data.block_migration else None,
            "max_downtime_s": CONF.libvirt.live_migration_downtime / 1000,
            "bandwidth_bytes_s": bandwidth_mib_s * 2**20 if bandwidth_mib_s else None,
            "tap": tap,
            "stall_timeout_s": CONF.virtgrid.stall_timeout,
            # Neutron may not have wired it yet; and how a silent instance is cured is Nova's business.
            "verify_timeout_s": 0,
            "reason": "nova",
        }
        return Hold(_gatekeeper(), request, abort=guest.abort_job)

    def _tell(self, instance: Any, over: dict[str, Any] | None) -> None:
        if over is None:
            LOG.warning("What became of the hold is not known: virtgrid migration list", instance=instance)
            return
        figures = {
            name: over[name]
            for name in ("hold", "held_s", "reason", "unsuitable_at_pause", "downtime_s", "what", "cause")
            if name in over
        }
        LOG.info("virtgrid: %s %s %s", over.get("id"), over.get("event"), figures, instance=instance)


def _gatekeeper() -> list[str]:
    if CONF.virtgrid.gatekeeper:
        return shlex.split(CONF.virtgrid.gatekeeper)
    if os.geteuid() == 0:
        return [sys.executable, "-I", "-m", "virtgrid.migration.gatekeeper"]
    return ["sudo", "-n", "virtgrid-gatekeeper"]
