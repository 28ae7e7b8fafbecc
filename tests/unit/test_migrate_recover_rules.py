"""What recover must not do: remove images a guest may have run on, wake an old copy, act beside a job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from virtgrid.core import journal as journals
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import PositionUnknownError, RefusedError
from virtgrid.core.journal import Journal
from virtgrid.migration import recovery, running
from virtgrid.migration.outcome import Place
from virtgrid.migration.recovery import recover, remains
from virtgrid.virt.domain import ABSENT, DomainState, Position

ID = "20260101T000000-web1"
UUID = "00000000-0000-4000-8000-000000000009"
RUNNING = Position(state=DomainState.RUNNING)
BUSY = Position(state=DomainState.RUNNING, job=True)
STOPPED = Position(state=DomainState.PAUSED, reason="migration")
IMAGE = "/images/web1.raw"

Event = tuple[str, dict[str, Any]]


def event(name: str, **fields: Any) -> Event:
    return name, fields


PRECOPY = event("phase", phase="precopy")
HOLD = event("phase", phase="hold")
RELEASED = event("released", by="gate", reason="all suitable")
SWITCHOVER = event("phase", phase="switchover")
RESUMED = event("resumed", clock_s=1.0)


def write(path: Path, *events: Event, policy: str = "backoff") -> Path:
    with Journal(path / f"{ID}.jsonl", FakeClock()) as journal:
        journal.write(
            "started", id=ID, domain="web1", uuid=UUID, source="alice", destination="bob", policy=policy,
            source_uri="test:///alice", dest_uri="test:///bob",
        )  # fmt: skip
        journal.write("created", kind="image", name="vda", path=IMAGE)
        for name, fields in events:
            journal.write(name, **fields)
    return journal.path


WAY = {"bridge": "br0", "port": "vgs1", "tap": "vnet0", "mac": "52:54:00:aa:bb:cc"}
READY = event("flip", state="ready", text="through vgs1", **WAY)


@pytest.mark.parametrize(
    ("events", "turned"),
    [
        ((), False),
        ((event("flip", state="off", text="no segment"),), False),
        ((READY,), True),
        ((READY, event("flip", state="flipped", text="", after_s=0.001, replayed=3)), True),
        ((READY, event("flip", state="lost", text="what flips has ended")), True),
        ((READY, event("flip", state="draining", text="")), True),
        ((READY, event("flip", state="draining", text=""), event("flip", state="given back", text="")), True),
        ((READY, event("flip", state="put back", text="")), False),
        ((READY, event("flip", state="settled", text="")), False),
    ],
)
def test_what_may_have_been_turned_is_known_from_the_journal(
    tmp_path: Path, events: tuple[Event, ...], turned: bool
) -> None:
    assert (remains(journals.read(write(tmp_path, *events))).way is not None) is turned


SET = event("share", state="set", text="", interface="wan0")


@pytest.mark.parametrize(
    ("events", "interface"),
    [
        ((event("share", state="off", text="taken"),), None),
        ((SET,), "wan0"),
        ((SET, event("share", state="raised", text="", interface="wan0")), "wan0"),
        ((SET, ("left", {"kind": "class", "name": "wan0", "reason": "refused"})), "wan0"),
        ((SET, event("share", state="removed", text="", interface="wan0")), None),
    ],
)
def test_where_classes_may_be_is_known_from_the_journal(
    tmp_path: Path, events: tuple[Event, ...], interface: str | None
) -> None:
    assert remains(journals.read(write(tmp_path, *events))).shared == interface


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Position | None]:
    """What the two hosts say; locks in a directory of its own."""
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(recovery, "_QUIET_DEADLINE_S", 0.0)
    said: dict[str, Position | None] = {"alice": RUNNING, "bob": ABSENT}

    async def look(uri: str, uuid: str, **_: Any) -> Position | None:
        assert uuid == UUID
        return said[uri.rpartition("/")[2]]

    monkeypatch.setattr(recovery, "look", look)
    return said


@pytest.mark.parametrize(
    ("events", "policy", "let_go"),
    [
        ((), "backoff", False),
        ((PRECOPY, HOLD), "backoff", False),
        ((PRECOPY, HOLD, RELEASED), "backoff", True),
        ((PRECOPY, event("hold_lost", text="QEMU completed")), "backoff", True),
        ((PRECOPY, SWITCHOVER), "backoff", True),
        ((RESUMED,), "backoff", True),
        ((), "immediate", False),
        ((PRECOPY,), "immediate", True),
    ],
)
def test_the_journal_tells_whether_the_guest_may_have_left(
    tmp_path: Path, events: tuple[Event, ...], policy: str, let_go: bool
) -> None:
    assert remains(journals.read(write(tmp_path, *events, policy=policy))).let_go is let_go


async def test_shut_off_before_it_could_leave_the_copied_images_go(
    tmp_path: Path, hosts: dict[str, Position | None]
) -> None:
    hosts["alice"] = ABSENT
    found = await recover(write(tmp_path, PRECOPY, HOLD), act=False, writer_gone=True)
    assert found.situation.place is Place.NOWHERE
    assert any(IMAGE in action for action in found.actions)


async def test_shut_off_after_it_may_have_left_the_images_stay(
    tmp_path: Path, hosts: dict[str, Position | None]
) -> None:
    hosts["alice"] = ABSENT
    found = await recover(write(tmp_path, PRECOPY, HOLD, RELEASED), act=False, writer_gone=True)
    assert found.situation.place is Place.NOWHERE
    assert found.actions == ()


async def test_an_old_copy_is_not_woken_when_the_guest_has_run_elsewhere(
    tmp_path: Path, hosts: dict[str, Position | None]
) -> None:
    hosts["alice"] = STOPPED
    path = write(tmp_path, RELEASED, SWITCHOVER, RESUMED)
    before = path.read_bytes()
    with pytest.raises(PositionUnknownError, match="has run on bob already"):
        await recover(path, act=True, writer_gone=True)
    assert path.read_bytes() == before


async def test_beside_a_job_of_somebody_nothing_is_done(
    tmp_path: Path, hosts: dict[str, Position | None]
) -> None:
    hosts["alice"], hosts["bob"] = BUSY, STOPPED
    path = write(tmp_path, PRECOPY)
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="a job runs on web1") as caught:
        await recover(path, act=True, writer_gone=True)
    assert "virsh domjobabort" in (caught.value.hint or "")
    assert path.read_bytes() == before


async def test_beside_a_newer_migration_of_the_same_domain_nothing_is_done(
    tmp_path: Path, hosts: dict[str, Position | None]
) -> None:
    hosts["bob"] = STOPPED
    path = write(tmp_path, PRECOPY)
    before = path.read_bytes()
    with (
        running.exclusive(UUID, "20260101T000001-web1"),
        pytest.raises(RefusedError, match="20260101T000001-web1"),
    ):
        await recover(path, act=True, writer_gone=True)
    assert path.read_bytes() == before


async def test_the_dead_drivers_socket_goes(
    tmp_path: Path, hosts: dict[str, Position | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act(*_: Any, **__: Any) -> list[str]:
        return []

    monkeypatch.setattr(recovery, "_act", act)
    path = write(tmp_path, PRECOPY)
    socket = running.socket_path(UUID)
    socket.parent.mkdir()
    socket.touch()
    await recover(path, act=True, writer_gone=True)
    assert not socket.exists()
    assert running.running_migration(UUID) is None
