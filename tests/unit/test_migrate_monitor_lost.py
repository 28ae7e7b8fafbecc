"""A QMP call that never returns: the migration is ended by another way, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit import plans
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import DeadlineError, MigrationFailedError, PeerUnreachableError, VirtgridError
from virtgrid.core.journal import Journal, read
from virtgrid.migration.copying import Copy
from virtgrid.migration.policy import PolicyConfig
from virtgrid.virt import monitor
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain
from virtgrid.virt.monitor import Monitor, QemuMonitor

# libvirt's built-in test driver has this one domain.
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


class Silence:
    """The QEMU half of the binding, whose command never comes back until ``end``."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.asked = 0

    def qemuMonitorCommand(self, *_: object) -> str:
        self.asked += 1
        self.end.wait(30)
        return "{}"


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Silence]:
    silent = Silence()
    monkeypatch.setattr(monitor, "_qemu", lambda: silent)
    yield silent
    silent.end.set()


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    async with await Hypervisor.open("test:///default") as opened:
        yield opened


class Call:
    """The migrate call: it comes back, cancelled, when somebody aborts the job."""

    def __init__(self) -> None:
        self.aborted = asyncio.Event()
        self.rescued = 0

    async def run(self) -> None:
        await self.aborted.wait()
        raise PeerUnreachableError("libvirt did not migrate the domain", cause="the job was cancelled")

    async def peer_silent(self) -> bool:
        return True

    async def rescue(self) -> None:
        self.rescued += 1
        self.aborted.set()


def copy(path: Path, hypervisor: Hypervisor, scripted: Monitor, call: Call) -> tuple[Copy, Journal]:
    journal = Journal(path / "journal.jsonl", SystemClock())
    # No tap: nothing to tickle, nothing to capture.
    plan = plans.plan(plans.request(policy=PolicyConfig(name="strict")), tap=None, tap_visible=False)
    return (
        Copy(
            plan,
            journal,
            SystemClock(),
            domain=Domain(hypervisor, uuid=UUID, name="test"),
            monitor=scripted,
            destination=hypervisor,
            watch=None,
            rescue=call.rescue,
            peer_silent=call.peer_silent,
        ),
        journal,
    )


async def test_a_call_that_never_returns_misses_its_deadline(
    silence: Silence, hypervisor: Hypervisor
) -> None:
    qemu = QemuMonitor(hypervisor, UUID, deadline_s=0.05)
    with pytest.raises(DeadlineError, match="query-migrate"):
        await qemu.migration()
    # The connection is not asked again: its thread sits in the call.
    with pytest.raises(DeadlineError, match="query-block-jobs"):
        await qemu.block_jobs()
    assert silence.asked == 1
    assert not hypervisor.usable


async def test_the_migration_is_then_aborted_over_a_fresh_connection(
    silence: Silence, hypervisor: Hypervisor, tmp_path: Path
) -> None:
    call = Call()
    supervised, journal = copy(tmp_path, hypervisor, QemuMonitor(hypervisor, UUID, deadline_s=0.05), call)
    with journal, pytest.raises(MigrationFailedError, match="monitor does not answer") as caught:
        async with asyncio.timeout(10):
            await supervised.run(call.run())
    assert call.rescued == 1
    assert "did not answer within" in (caught.value.cause or "")
    assert caught.value.exit_status == 1
    phases = [record["phase"] for record in read(journal.path) if record.event == "phase"]
    assert phases[-1] == "cleanup"


class Lost:
    """A monitor whose libvirtd went away, or that says what nobody understands."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def migration(self) -> Any:
        raise self._error

    async def set_limits(self, **_: Any) -> None:
        raise self._error

    async def block_jobs(self) -> Any:
        raise self._error

    async def parameters(self) -> Any:
        raise self._error

    async def cut_storage(self) -> int:
        raise VirtgridError("it does not answer this either")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PeerUnreachableError("no", cause="client socket is closed"), MigrationFailedError),
        (VirtgridError("QEMU answered with a malformed 'remaining'"), VirtgridError),
        (ValueError("a bug of ours"), ValueError),
    ],
)
async def test_whatever_the_monitor_does_the_job_is_ended_before_the_error_is_told(
    hypervisor: Hypervisor, tmp_path: Path, error: Exception, told: type[Exception]
) -> None:
    call = Call()
    supervised, journal = copy(tmp_path, hypervisor, Lost(error), call)
    await hypervisor.close()  # so that the abort, too, has to take the other way
    with journal, pytest.raises(told):
        async with asyncio.timeout(10):
            await supervised.run(call.run())
    assert call.rescued == 1
