"""Target images through libvirt's storage API, on its test driver: looked at, made, removed, nothing left."""

from __future__ import annotations

import os
import uuid as uuids
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import libvirt
import pytest
from lxml import etree

from tests.unit.plans import DISK
from virtgrid.core.errors import RefusedError
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.storagecopy import DiskCopy, create_target, disks_to_copy, inspect_target, remove_target

POOL = "/default-pool"


class WithTargetPaths:
    """A connection of the test driver, made able to find a pool by its directory and to "build" one."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def storagePoolCreateXML(self, xml: str, flags: int) -> Any:
        assert flags in (0, libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD)
        return self._raw.storagePoolCreateXML(xml, 0)

    def storagePoolLookupByTargetPath(self, path: str) -> Any:
        for pool in self._raw.listAllStoragePools():
            if etree.fromstring(pool.XMLDesc()).findtext("target/path") == path:
                return pool
        return self._raw.storagePoolLookupByName(f"over {path}")  # raises as libvirt does


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    async with await Hypervisor.open("test:///default", name="the test host") as opened:
        opened._raw = WithTargetPaths(opened._raw)
        yield opened


@pytest.fixture
def directory() -> str:
    """Where nobody has a pool; the test driver makes no real files."""
    return f"/virtgrid-test-{os.getpid()}-{uuids.uuid4().hex[:8]}"


def image(path: str, **changes: object) -> DiskCopy:
    disk = DiskCopy(target="vda", path=path, format="raw", capacity_bytes=1 << 20, allocated_bytes=0)
    return replace(disk, **changes)  # type: ignore[arg-type]


async def pools(hypervisor: Hypervisor) -> list[str]:
    return await hypervisor.call(lambda raw: sorted(p.name() for p in raw.listAllStoragePools()), "list")


async def test_a_missing_image_is_seen_and_looking_leaves_nothing(
    hypervisor: Hypervisor, directory: str
) -> None:
    before = await pools(hypervisor)
    seen = await inspect_target(hypervisor, f"{directory}/web1.raw", token="t")
    assert not seen.exists
    assert seen.problem is None
    assert seen.free_bytes is not None
    assert await pools(hypervisor) == before


async def test_what_is_made_in_somebody_s_pool_is_there_until_removed(hypervisor: Hypervisor) -> None:
    path = f"{POOL}/web1.raw"
    before = await pools(hypervisor)
    made = await create_target(hypervisor, image(path), token="t")
    assert made.path == path
    assert made.pool is None, "the pool is somebody's: not ours to drop"
    seen = await inspect_target(hypervisor, path, token="t")
    assert seen.exists
    assert seen.capacity_bytes == 1 << 20
    await remove_target(hypervisor, path, token="t")
    assert not (await inspect_target(hypervisor, path, token="t")).exists
    assert await pools(hypervisor) == before


async def test_where_there_is_no_pool_a_transient_one_is_made_and_dropped(
    hypervisor: Hypervisor, directory: str
) -> None:
    before = await pools(hypervisor)
    made = await create_target(hypervisor, image(f"{directory}/web1.raw"), token="20260101T000000")
    assert made.pool is not None
    assert made.pool.startswith("virtgrid-20260101T000000-")
    assert await pools(hypervisor) == before


async def test_removing_what_is_gone_is_no_error(hypervisor: Hypervisor) -> None:
    await remove_target(hypervisor, f"{POOL}/never-was.raw", token="t")


async def test_a_format_we_cannot_make_is_refused_with_a_way_out(hypervisor: Hypervisor) -> None:
    with pytest.raises(RefusedError, match="vmdk") as caught:
        await create_target(hypervisor, image(f"{POOL}/web1.vmdk", format="vmdk"), token="t")
    assert "1048576" in (caught.value.hint or "")


def test_by_default_writable_disks_of_this_domain_alone_are_copied() -> None:
    disks = (
        DISK,
        replace(DISK, target="vdb", readonly=True),
        replace(DISK, target="vdc", shareable=True),
        replace(DISK, target="sda", device="cdrom"),
        replace(DISK, target="vdd", source=None),
    )
    assert disks_to_copy(disks, None) == ([DISK], [])


def test_disks_asked_for_are_copied_and_the_impossible_ones_said() -> None:
    disks = (DISK, replace(DISK, target="vdb", kind="network"), replace(DISK, target="sda", source=None))
    chosen, problems = disks_to_copy(disks, ("vda", "vdb", "sda", "vdz"))
    assert chosen == [DISK]
    assert len(problems) == 3
    assert "no disk 'vdz'" in problems[0]


def test_no_disk_asked_for_is_no_disk_copied() -> None:
    assert disks_to_copy((DISK,), ()) == ([], [])
