"""What a journal says a dead driver left behind, and what recover does about it on a real (test) libvirt."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from virtgrid.core import journal as journals
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import PositionUnknownError, RefusedError
from virtgrid.core.journal import Journal
from virtgrid.migration import recovery, running
from virtgrid.migration.outcome import Place, judge
from virtgrid.migration.recovery import Remains, recover, remains
from virtgrid.virt.domain import ABSENT, DomainState, Position

ID = "20260101T000000-web1"
UUID = str(uuids.UUID(int=9))
#: The domain that libvirt's own test driver starts with, on every host with that driver.
TEST_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
#: A host that does not answer.
SILENT = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"

Begin = Callable[..., Journal]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))

    def make(*, uuid: str = UUID, source_uri: str = "test:///default", dest_uri: str = SILENT) -> Journal:
        journal = Journal(tmp_path / f"{ID}.jsonl", FakeClock())
        journal.write(
            "started", id=ID, domain="web1", uuid=uuid, source="alice", destination="bob", policy="backoff",
            source_uri=source_uri, dest_uri=dest_uri,
        )  # fmt: skip
        return journal

    return make


def left(journal: Journal) -> Remains:
    journal.close()
    return remains(journals.read(journal.path))


def test_images_that_were_made_and_not_removed_are_left(begin: Begin) -> None:
    journal = begin()
    for path in ("/images/a", "/images/b", "/images/c"):
        journal.write("created", kind="image", name="vda", path=path)
    journal.write("removed", kind="image", name="b", path="/images/b")
    journal.write("left", kind="image", name="c", path="/images/c", reason="no answer")
    found = left(journal)
    assert found.images == ("/images/a", "/images/c")
    assert not found.ended
    assert (found.migration_id, found.uuid, found.source, found.destination) == (ID, UUID, "alice", "bob")


def test_a_migration_that_finished_left_nothing_the_images_are_the_guest_s(begin: Begin) -> None:
    journal = begin()
    journal.write("created", kind="image", name="vda", path="/images/a")
    journal.write("finished", domain="web1", on="bob", exit_status=0)
    found = left(journal)
    assert found.images == ()
    assert found.ended


def test_the_downtime_limit_of_before_is_remembered(begin: Begin) -> None:
    journal = begin()
    journal.write("limits", downtime_s=0.3)
    assert left(journal).downtime_s == 0.3


def test_what_does_not_begin_with_a_start_is_refused() -> None:
    with pytest.raises(RefusedError):
        remains([])


def test_a_torn_journal_is_read_up_to_where_its_writer_died(begin: Begin) -> None:
    journal = begin()
    journal.write("created", kind="image", name="vda", path="/images/a")
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"v":1,"at":"2026-01-01T00:00:00+00:00","mono_s":3.0,"event":"crea')
    assert remains(journals.read(journal.path)).images == ("/images/a",)


@pytest.mark.parametrize("torn", [b"", b'{"v":1,"ev', b"\xc3"])
def test_a_torn_end_is_cut_off_and_nothing_else(begin: Begin, torn: bytes) -> None:
    journal = begin()
    journal.close()
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole + torn)
    recovery._mend_torn_end(journal.path)
    assert journal.path.read_bytes() == whole


RUNNING = Position(state=DomainState.RUNNING)
STOPPED = Position(state=DomainState.PAUSED, reason="migration")


@pytest.mark.parametrize(
    ("here", "there", "does", "never"),
    [
        (RUNNING, ABSENT, ("downtime limit", "remove /images/a"), ("resume",)),
        (RUNNING, STOPPED, ("stopped copy on the destination", "downtime"), ("source",)),
        (STOPPED, ABSENT, ("resume it on the source",), ()),
        (ABSENT, RUNNING, (), ("remove", "resume", "downtime")),
        (STOPPED, RUNNING, ("stopped copy on the source",), ("/images", "resume")),
        (STOPPED, None, (), ("remove", "resume")),
        (RUNNING, None, ("not now",), ("stopped copy",)),
        (ABSENT, ABSENT, ("remove /images/a",), ("resume", "downtime")),
    ],
)
def test_recover_plans_what_the_situation_permits(
    begin: Begin, here: Position | None, there: Position | None, does: tuple[str, ...], never: tuple[str, ...]
) -> None:
    journal = begin()
    journal.write("limits", downtime_s=0.3)
    journal.write("created", kind="image", name="vda", path="/images/a")
    situation = judge("web1", "alice", "bob", here, there)
    planned = " | ".join(
        recovery._plan(left(journal), situation, destination_answers=there is not None)
    )  # fmt: skip
    assert all(words in planned for words in does), planned
    assert not any(words in planned for words in never), planned


NAME: dict[str, Any] = {
    "name": "web.example.org", "zone": "example.org", "low_ttl_s": 5, "server": "ns", "key_file": "/etc/key",
    "original": [{"address": "10.0.0.1", "ttl_s": 300}],
    "destination": [{"address": "198.51.100.1", "ttl_s": 300}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("here", "there", "let_go", "address"),
    [
        (RUNNING, ABSENT, True, "10.0.0.1"),
        (ABSENT, RUNNING, True, "198.51.100.1"),
        (STOPPED, RUNNING, True, "198.51.100.1"),
        (ABSENT, ABSENT, False, "10.0.0.1"),
        (ABSENT, ABSENT, True, None),
        (STOPPED, None, True, None),
        (RUNNING, RUNNING, True, None),
    ],
)
def test_the_name_is_brought_where_the_guest_certainly_is(
    begin: Begin, here: Position, there: Position | None, let_go: bool, address: str | None
) -> None:
    journal = begin()
    journal.write("name", **NAME)
    journal.write("name_changed", name=NAME["name"], state="lowered", text="")
    if let_go:
        journal.write("released", by="gate", reason="quiet")
    situation = judge("web1", "alice", "bob", here, there)
    planned = recovery._plan(left(journal), situation, destination_answers=there is not None)
    told = [step for step in planned if "web.example.org" in step]
    assert len(told) == (address is not None)
    assert all(f"points to {address}, time to live 300 s" in step for step in told)


@pytest.mark.parametrize(
    ("state", "ended"), [("lowered", False), ("moved", False), ("settled", True), ("original", True)]
)
def test_a_name_in_its_last_state_needs_nothing(begin: Begin, state: str, ended: bool) -> None:
    journal = begin()
    journal.write("name", **NAME)
    journal.write("name_changed", name=NAME["name"], state=state, text="")
    journal.write("finished", domain="web1", on="bob", exit_status=0)
    assert (left(journal).name is None) is ended


async def test_a_migration_whose_driver_lives_is_not_recovered(begin: Begin) -> None:
    journal = begin()
    journal.close()
    with pytest.raises(RefusedError, match="still running"):
        await recover(journal.path, act=False, writer_gone=False)
    with running.exclusive(UUID, ID), pytest.raises(RefusedError, match="still running"):
        await recover(journal.path, act=True, writer_gone=True)


async def test_both_hosts_silent_is_unknown_and_nothing_is_written(begin: Begin) -> None:
    journal = begin(source_uri=SILENT)
    journal.close()
    before = journal.path.read_bytes()
    found = await recover(journal.path, act=False, writer_gone=True)
    assert found.situation.place is Place.UNKNOWN
    with pytest.raises(PositionUnknownError) as caught:
        await recover(journal.path, act=True, writer_gone=True)
    assert caught.value.exit_status == 7
    assert "no answer" in (caught.value.where or "")
    assert journal.path.read_bytes() == before


async def test_looking_changes_nothing_and_acting_is_written_down(begin: Begin) -> None:
    journal = begin(uuid=TEST_UUID)
    journal.close()
    before = journal.path.read_bytes()
    journal.path.write_bytes(before + b'{"torn')
    looked = await recover(journal.path, act=False, writer_gone=True)
    assert looked.situation.place is Place.SOURCE
    assert not looked.done
    assert journal.path.read_bytes() == before + b'{"torn'
    acted = await recover(journal.path, act=True, writer_gone=True)
    assert acted.done
    last = journals.read(journal.path)[-1]
    assert (last.event, last["on"], last["action"]) == ("recovered", "alice", "nothing needed doing")
