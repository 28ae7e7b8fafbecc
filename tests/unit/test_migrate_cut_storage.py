"""Cutting a storage copy off, and pools of several migrations: only what is ours is touched."""

from __future__ import annotations

import json
from typing import Any

import libvirt
import pytest

from virtgrid.virt import monitor, storagecopy
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.monitor import QemuMonitor

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


class ScriptedQemu:
    """Answers query-yank, and remembers what was yanked."""

    def __init__(self, *instances: dict[str, str]) -> None:
        self.instances = list(instances)
        self.yanked: list[Any] = []

    def qemuMonitorCommand(self, _domain: object, text: str, _flags: int) -> str:
        asked = json.loads(text)
        if asked["execute"] == "query-yank":
            return json.dumps({"return": self.instances})
        assert asked["execute"] == "yank"
        self.yanked += asked["arguments"]["instances"]
        return json.dumps({"return": {}})


async def cut(qemu: ScriptedQemu, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(monitor, "_qemu", lambda: qemu)
    async with await Hypervisor.open("test:///default") as hypervisor:
        return await QemuMonitor(hypervisor, UUID).cut_storage()


async def test_only_the_copys_connections_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = ScriptedQemu(
        {"type": "migration"},
        {"type": "block-node", "node-name": "libvirt-1-storage"},  # a network disk of the guest
        {"type": "block-node", "node-name": "migration-vda-storage"},
        {"type": "chardev", "id": "charserial0"},
    )
    assert await cut(qemu, monkeypatch) == 1
    assert qemu.yanked == [{"type": "block-node", "node-name": "migration-vda-storage"}]


async def test_without_a_copy_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = ScriptedQemu({"type": "migration"})
    assert await cut(qemu, monkeypatch) == 0
    assert qemu.yanked == []


def refusal(number: int) -> libvirt.libvirtError:
    class Refusal(libvirt.libvirtError):
        def get_error_code(self) -> int:
            return number

    return Refusal("scripted")


class Pool:
    def __init__(self, name: str) -> None:
        self._name = name
        self.refreshed = 0

    def name(self) -> str:
        return self._name

    def isActive(self) -> bool:
        return True

    def refresh(self) -> None:
        self.refreshed += 1


class Daemon:
    """A libvirtd whose directory has these pools over it, one after the other; None: no pool."""

    def __init__(self, *found: Pool | None, conflicts: int = 0) -> None:
        self._found = list(found)
        self._conflicts = conflicts
        self.made: list[Pool] = []

    def storagePoolLookupByTargetPath(self, _: str) -> Pool:
        now = self._found.pop(0) if len(self._found) > 1 else self._found[0]
        if now is None:
            raise refusal(libvirt.VIR_ERR_NO_STORAGE_POOL)
        return now

    def storagePoolCreateXML(self, _xml: str, _flags: int) -> Pool:
        if self._conflicts:
            self._conflicts -= 1
            raise refusal(libvirt.VIR_ERR_OPERATION_FAILED)
        self.made.append(Pool("virtgrid-mine-1"))
        return self.made[-1]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storagecopy, "_POOL_WAIT_S", 0.0)


def open_pool(daemon: Daemon) -> Any:
    return storagecopy._open_pool(daemon, "/images", "virtgrid-mine-1", build=False)


def test_somebodys_pool_is_used_and_stays() -> None:
    theirs = Pool("images")
    found = open_pool(Daemon(theirs))
    assert (found.raw, found.ours, theirs.refreshed) == (theirs, False, 1)


def test_another_migrations_pool_is_waited_for() -> None:
    other = Pool("virtgrid-other-1")
    daemon = Daemon(other, other, None)
    found = open_pool(daemon)
    assert (found.raw, found.ours) == (daemon.made[0], True)


def test_a_dead_migrations_pool_is_adopted_and_looked_through_again() -> None:
    orphan = Pool("virtgrid-dead-1")
    found = open_pool(Daemon(orphan))
    assert (found.raw, found.ours, orphan.refreshed) == (orphan, True, 1)


def test_who_loses_the_race_for_a_pool_tries_again() -> None:
    daemon = Daemon(None, conflicts=3)
    assert open_pool(daemon).ours
    assert len(daemon.made) == 1


def test_a_conflict_that_stays_is_told() -> None:
    with pytest.raises(libvirt.libvirtError):
        open_pool(Daemon(None, conflicts=1000))
