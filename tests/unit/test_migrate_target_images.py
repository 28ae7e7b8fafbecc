"""The empty images on the destination: made by us, removed by us, and nobody else's ever touched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from virtgrid.core import journal as journals
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import VirtgridError
from virtgrid.core.journal import Journal
from virtgrid.migration import prepare
from virtgrid.migration.prepare import TargetImages
from virtgrid.virt import storagecopy
from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.storagecopy import DiskCopy

URI = "test:///default"


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    async with await Hypervisor.open(URI) as opened:
        yield opened


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl", FakeClock()) as opened:
        yield opened


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked to be removed."""
    paths: list[str] = []

    async def remove(journal: Journal, dest_uri: str, path: str, *, token: str) -> bool:
        paths.append(path)
        journal.write("removed", kind="image", name=path.rpartition("/")[2], path=path)
        return True

    monkeypatch.setattr(prepare, "remove_image", remove)
    return paths


def disk(name: str) -> DiskCopy:
    return DiskCopy(
        target=name, path=f"/images/{name}.raw", format="raw", capacity_bytes=1 << 20, allocated_bytes=0
    )


def makes(monkeypatch: pytest.MonkeyPatch, *, failing: str, error: VirtgridError) -> None:
    async def create(hypervisor: Hypervisor, wanted: DiskCopy, *, token: str) -> None:
        if wanted.target == failing:
            raise error

    monkeypatch.setattr(storagecopy, "create_target", create)


def left(journal: Journal) -> set[str]:
    """Images the journal says are still to be removed."""
    found: set[str] = set()
    for record in journals.read(journal.path):
        if record.event == "created":
            found.add(record["path"])
        elif record.event == "removed":
            found.discard(record["path"])
    return found


async def test_an_image_somebody_else_made_in_between_is_not_removed(
    hypervisor: Hypervisor, journal: Journal, removed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = LibvirtError("cannot create", number=90, cause="storage volume exists already")
    makes(monkeypatch, failing="vdb", error=exists)
    with pytest.raises(LibvirtError):
        async with TargetImages(journal, hypervisor, URI, (disk("vda"), disk("vdb")), token="t"):
            pytest.fail("one of the images was not made")
    assert removed == ["/images/vda.raw"]
    assert left(journal) == set()


async def test_an_image_that_may_have_been_made_is_removed(
    hypervisor: Hypervisor, journal: Journal, removed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    makes(monkeypatch, failing="vdb", error=VirtgridError("no answer within 60 s"))
    with pytest.raises(VirtgridError):
        async with TargetImages(journal, hypervisor, URI, (disk("vda"), disk("vdb")), token="t"):
            pytest.fail("one of the images was not made")
    assert removed == ["/images/vdb.raw", "/images/vda.raw"]


async def test_images_kept_are_not_removed(
    hypervisor: Hypervisor, journal: Journal, removed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    makes(monkeypatch, failing="none", error=VirtgridError("never"))
    async with TargetImages(journal, hypervisor, URI, (disk("vda"),), token="t") as images:
        images.keep("the domain may be using it")
    assert removed == []
    assert left(journal) == {"/images/vda.raw"}
