"""Target images on the destination: made with the right format and size, and unmade on failure.

Everything goes through libvirt's storage API, so it works over any libvirt transport and no
path from a domain's XML is ever opened by us. libvirt would create missing images itself, but
only inside a pool somebody defined, and it leaves them behind when the migration fails.
"""

from __future__ import annotations

import contextlib
import posixpath
import time
import zlib
from dataclasses import dataclass
from typing import Any, Final

import libvirt

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.virt import domxml
from virtgrid.virt.connection import Hypervisor

_FORMATS: Final = frozenset({"raw", "qcow2"})
_POOL_PREFIX: Final = "virtgrid-"
#: Several migrations to one directory take turns: together 5 s.
_POOL_TRIES: Final = 50
_POOL_WAIT_S: Final = 0.1
#: What libvirt says when another pool over the directory was faster.
_POOL_CONFLICTS: Final = frozenset({libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_OPERATION_INVALID})


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskCopy:
    """One disk to copy. capacity_bytes: virtual size; allocated_bytes: what the source really holds."""

    target: str
    path: str
    format: str
    capacity_bytes: int
    allocated_bytes: int
    backing: str | None = None
    backing_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetImage:
    """What the destination holds at a disk's path. free_bytes: in the file system around it."""

    path: str
    exists: bool
    capacity_bytes: int | None
    format: str | None
    free_bytes: int | None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """An image we made. pool: the transient pool we had to make for it, to be dropped again."""

    path: str
    pool: str | None


@dataclass(frozen=True, slots=True)
class _Pool:
    raw: Any
    ours: bool


def _open_pool(raw: Any, directory: str, name: str, *, build: bool) -> _Pool:
    """The pool over ``directory``, or a transient one of ours. The raw libvirt errors come through.

    A transient pool of another migration is there for an instant and is waited for; one that stays
    was left by a driver that died, and is ours from now on.
    """
    flags = libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD if build else libvirt.VIR_STORAGE_POOL_CREATE_NORMAL
    for tries_left in reversed(range(_POOL_TRIES)):
        pool = _pool_over(raw, directory)
        if pool is not None and not pool.name().startswith(_POOL_PREFIX) and pool.isActive():
            # Busy with another refresh: what it knows will do.
            with contextlib.suppress(libvirt.libvirtError):
                pool.refresh()
            return _Pool(pool, ours=False)
        if pool is not None and pool.name().startswith(_POOL_PREFIX):
            if not tries_left:
                pool.refresh()
                return _Pool(pool, ours=True)
        else:
            try:
                return _Pool(raw.storagePoolCreateXML(domxml.pool_xml(name, directory), flags), ours=True)
            except libvirt.libvirtError as error:
                if not tries_left or error.get_error_code() not in _POOL_CONFLICTS:
                    raise
        time.sleep(_POOL_WAIT_S)
    raise AssertionError("the last try returns or raises")


def _pool_over(raw: Any, directory: str) -> Any:
    """libvirt's pool over a directory, or None. Asking its name and state later may still fail."""
    try:
        return raw.storagePoolLookupByTargetPath(directory)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        return None


def _drop_pool(pool: _Pool) -> None:
    if pool.ours:
        with contextlib.suppress(libvirt.libvirtError):  # it is transient: a restart of libvirtd drops it too
            pool.raw.destroy()


def _pool_name(token: str, directory: str) -> str:
    # One transient pool per migration and directory, recognisable as ours.
    return f"{_POOL_PREFIX}{token}-{zlib.crc32(directory.encode()):08x}"


async def inspect_target(hypervisor: Hypervisor, path: str, *, token: str) -> TargetImage:
    """Look at a disk's path on the destination without leaving anything there."""
    directory, name = posixpath.split(path)

    def look(raw: Any) -> TargetImage:
        try:
            pool = _open_pool(raw, directory, _pool_name(token, directory), build=False)
        except libvirt.libvirtError as error:
            return TargetImage(
                path=path, exists=False, capacity_bytes=None, format=None, free_bytes=None,
                problem=error.get_error_message(),
            )  # fmt: skip
        try:
            free_bytes = int(pool.raw.info()[3])
            try:
                volume = pool.raw.storageVolLookupByName(name)
            except libvirt.libvirtError:
                return TargetImage(
                    path=path, exists=False, capacity_bytes=None, format=None, free_bytes=free_bytes
                )
            found = domxml.volume_format(volume.XMLDesc(0))
            return TargetImage(
                path=path,
                exists=True,
                capacity_bytes=int(volume.info()[1]),
                format=found,
                free_bytes=free_bytes,
            )
        finally:
            _drop_pool(pool)

    return await hypervisor.call(look, f"cannot look at {path} on {hypervisor.name}", deadline_s=30)


async def create_target(hypervisor: Hypervisor, disk: DiskCopy, *, token: str) -> Created:
    """Make the empty image a disk is copied into: its format, its virtual size, its backing file.

    Errors: RefusedError for a format we cannot make; LibvirtError with libvirt's reason.
    """
    if disk.format not in _FORMATS:
        raise RefusedError(
            f"disk {disk.target} is '{disk.format}', which virtgrid cannot create on the destination",
            hint=f"create {disk.path} there by hand with a virtual size of {disk.capacity_bytes} bytes",
        )
    directory, name = posixpath.split(disk.path)
    pool_name = _pool_name(token, directory)

    def create(raw: Any) -> Created:
        pool = _open_pool(raw, directory, pool_name, build=True)
        try:
            xml = domxml.volume_xml(name, disk.capacity_bytes, disk.format, disk.backing, disk.backing_format)
            pool.raw.createXML(xml, 0)
        finally:
            _drop_pool(pool)
        return Created(path=disk.path, pool=pool_name if pool.ours else None)

    return await hypervisor.call(create, f"cannot create {disk.path} on {hypervisor.name}", deadline_s=60)


async def remove_target(hypervisor: Hypervisor, path: str, *, token: str) -> None:
    """Remove an image we made. One that is already gone is not an error."""
    directory, name = posixpath.split(path)

    def remove(raw: Any) -> None:
        pool = _open_pool(raw, directory, _pool_name(token, directory), build=False)
        try:
            try:
                volume = pool.raw.storageVolLookupByName(name)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL:
                    return
                raise
            volume.delete(0)
        finally:
            _drop_pool(pool)

    with contextlib.suppress(NotFoundError):
        await hypervisor.call(remove, f"cannot remove {path} on {hypervisor.name}", deadline_s=30)


def disks_to_copy(
    disks: tuple[domxml.Disk, ...], wanted: tuple[str, ...] | None
) -> tuple[list[domxml.Disk], list[str]]:
    """Which disks a storage copy concerns -> (disks, problems).

    libvirt's default: all writable, unshared disks; ``--migrate-disks`` names them instead.
    """
    problems: list[str] = []
    chosen: list[domxml.Disk] = []
    known = {disk.target for disk in disks}
    if wanted is not None:
        listed = ", ".join(sorted(known))
        problems += [
            f"the domain has no disk '{name}' (it has: {listed})" for name in wanted if name not in known
        ]
    for disk in disks:
        by_default = (
            disk.device == "disk" and not disk.readonly and not disk.shareable and disk.source is not None
        )
        if disk.target not in wanted if wanted is not None else not by_default:
            continue
        if disk.source is None:
            problems.append(f"disk {disk.target} has no medium to copy")
        elif disk.kind != "file":
            problems.append(f"disk {disk.target} is of type '{disk.kind}'; only files are copied")
        else:
            chosen.append(disk)
    return chosen, problems
