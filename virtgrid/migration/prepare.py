"""What is made ready before the first byte, each with its undoing: target images, limits."""

from __future__ import annotations

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.core.journal import Journal
from virtgrid.virt import storagecopy, switchover
from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.domain import Domain, position
from virtgrid.virt.monitor import SWITCHOVER_BANDWIDTH, QemuMonitor


class TargetImages:
    """The empty images on the destination: made on entering, removed on leaving unless kept."""

    def __init__(
        self,
        journal: Journal,
        destination: Hypervisor,
        dest_uri: str,
        disks: tuple[storagecopy.DiskCopy, ...],
        *,
        token: str,
    ) -> None:
        self._journal = journal
        self._destination = destination
        self._dest_uri = dest_uri
        self._disks = disks
        self._token = token
        self._made: list[str] = []

    async def __aenter__(self) -> TargetImages:
        try:
            for disk in self._disks:
                # Written before it exists: a controller that dies in between must not hide it.
                self._journal.write("created", sync=True, kind="image", name=disk.target, path=disk.path)
                self._made.append(disk.path)
                try:
                    await storagecopy.create_target(self._destination, disk, token=self._token)
                except (LibvirtError, RefusedError):
                    # Whatever is at that path now, it is not ours to remove.
                    self._made.pop()
                    self._journal.write(
                        "removed", kind="image", name=disk.target, path=disk.path, reason="it was not made"
                    )
                    raise
        except BaseException:
            await self._remove()
            raise
        return self

    def keep(self, reason: str | None = None) -> None:
        """Leave them: the domain has arrived, or (``reason``) it cannot be told."""
        if reason:
            for path in self._made:
                self._journal.write("left", kind="image", name=_name(path), path=path, reason=reason)
        self._made.clear()

    async def __aexit__(self, *_: object) -> None:
        await self._remove()

    async def _remove(self) -> None:
        for path in reversed(self._made):
            await remove_image(self._journal, self._dest_uri, path, token=self._token)
        self._made.clear()


def _name(path: str) -> str:
    return path.rpartition("/")[2]


async def remove_image(journal: Journal, dest_uri: str, path: str, *, token: str) -> bool:
    """Remove an image we created, over a fresh connection; said in the journal either way.

    The caller has made sure that no domain uses it.
    """
    try:
        async with await Hypervisor.open(dest_uri, name=dest_uri, deadline_s=8) as fresh:
            await storagecopy.remove_target(fresh, path, token=token)
    except VirtgridError as error:
        journal.write("left", kind="image", name=_name(path), path=path, reason=error.cause or error.what)
        return False
    journal.write("removed", kind="image", name=_name(path), path=path)
    return True


class HoldLimits:
    """The domain's downtime limit: the hold's on entering, the old one on leaving unless kept."""

    def __init__(self, journal: Journal, domain: Domain, source_uri: str) -> None:
        self._journal = journal
        self._domain = domain
        self._source_uri = source_uri
        self._before_s: float | None = None

    async def __aenter__(self) -> HoldLimits:
        before_s = await self._domain.max_downtime_s()
        self._journal.write("limits", sync=True, downtime_s=before_s)
        self._before_s = before_s
        await self._domain.set_max_downtime(switchover.HOLD_DOWNTIME_S)
        return self

    def keep(self) -> None:
        """The domain has left: there is nothing to put back."""
        self._before_s = None

    async def __aexit__(self, *_: object) -> None:
        if self._before_s is None:
            return
        try:
            async with await Hypervisor.open(self._source_uri, name="the source", deadline_s=8) as fresh:
                # One that was shut off meanwhile has no limits any more.
                if (await position(fresh, self._domain.uuid)).active:
                    await restore_limits(fresh, self._domain, self._before_s)
        except VirtgridError as error:
            self._journal.write(
                "left", kind="downtime limit", name=self._domain.name, reason=error.cause or error.what
            )


async def restore_limits(hypervisor: Hypervisor, domain: Domain, downtime_s: float) -> None:
    """Put a domain's downtime limit back to what it was before a hold, and QEMU's own judgement with it."""
    here = Domain(hypervisor, uuid=domain.uuid, name=domain.name)
    await here.set_max_downtime(downtime_s)
    monitor = QemuMonitor(hypervisor, domain.uuid)
    # libvirt before 11.1 does not know this parameter, and leaves it after a failed migration as it is.
    if (await monitor.parameters()).get(SWITCHOVER_BANDWIDTH) == switchover.HOLD_SWITCHOVER_BYTES_S:
        await monitor.set_limits(switchover_bytes_s=0)
