"""virtgridd brings its queue about: workers begun, found again, recovered, and what root may ask."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent_parts import KEY, agent
from tests.unit.scripted_host import INIT, ticket
from tests.wire_ends import dialled, until
from virtgrid.config import Config
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import (
    NotFoundError,
    PeerUnreachableError,
    PositionUnknownError,
    RefusedError,
    VirtgridError,
)
from virtgrid.core.journal import Journal, migrations_dir
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.host import Stage, View
from virtgrid.host import qemu_hook
from virtgrid.host.entries import Entries
from virtgrid.host.guests import Guest
from virtgrid.host.mover import Mover
from virtgrid.host.queue import Entry, Event, State, follow
from virtgrid.migration import recovery
from virtgrid.migration.outcome import Place, Situation
from virtgrid.migration.worker import Worker
from virtgrid.wire.endpoint import Endpoint

CONFIG = Config.model_validate(
    {
        "queue": {
            "retry": "0s",
            "attempts": 2,
            "destination": {"b": {"uri": "qemu+tls://b/system", "slots": 1}},
        }
    }
)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))


def an_entry(number: int = 1, **more: Any) -> Entry:
    return Entry(
        id=f"e{number}", domain=f"web{number}", uuid=f"{number:08x}", to="b", why="a test", asked_at_s=number,
        since_s=0.0, **more,
    )  # fmt: skip


def a_journal(entry: Entry, number: int = 1, *, pid: int = 0) -> Journal:
    """A migration of the entry, as its worker begins it."""
    journal = Journal(migrations_dir() / f"20261127T16000{number}-{entry.domain}.jsonl", SystemClock())
    journal.write(
        "started", id=journal.path.stem, domain=entry.domain, uuid=entry.uuid, source="a", destination="b",
        source_uri="qemu:///system", dest_uri="qemu+tls://b/system", policy="strict", options={}, pid=pid,
        pid_started=None, reason=f"a test [{entry.id}]",
    )  # fmt: skip
    return journal


def fail(journal: Journal, exit_status: int, what: str) -> None:
    journal.write("failed", domain="web", error="VG-FAILED", what=what, exit_status=exit_status, on="a")


class Scripted(Mover):
    """Without libvirt: every domain runs here. begin: what a worker does that is started."""

    def __init__(self, entries: Entries, begin: Callable[[Entry], Worker]) -> None:
        self.begun: list[str] = []

        def start(entry: Any, **_: Any) -> Worker:
            self.begun.append(entry.id)
            return begin(entry)

        super().__init__(CONFIG, entries, start=start)

    async def _request(self, entry: Entry) -> Any:
        return entry


def a_worker(entry: Entry, journal: Journal) -> Worker:
    process = subprocess.Popen(["true"])
    return Worker(process=process, journal=journal.path, uuid=entry.uuid)


async def _settled(entries: Entries) -> list[Entry]:
    await until(lambda: not entries.active())
    return entries.all()


async def test_one_after_the_other_over_one_slot(tmp_path: Path) -> None:
    entries, journals = Entries(tmp_path / "queue"), dict[str, Journal]()

    def begin(entry: Entry) -> Worker:
        journals[entry.id] = a_journal(entry, int(entry.id[1:]), pid=1)
        return a_worker(entry, journals[entry.id])

    for number in (1, 2):
        entries.put(an_entry(number))
    async with Scripted(entries, begin) as mover:
        await until(lambda: [one.state for one in entries.all()] == [State.RUNNING, State.WAITING])
        assert entries.all()[1].note == "1 migration goes to b already"
        with pytest.raises(RefusedError, match="web1 is running already"):
            mover.withdraw("e1")
        with pytest.raises(NotFoundError):
            mover.withdraw("e9")
        fail(journals["e1"], 6, "somebody said no")
        await until(lambda: entries.all()[1].state is State.RUNNING)
        fail(journals["e2"], 7, "nobody knows where it is")
        ended = await _settled(entries)
    assert [(one.state, one.note) for one in ended] == [
        (State.GAVE_UP, "somebody said no"), (State.FAILED, "nobody knows where it is")
    ]  # fmt: skip


async def test_a_worker_that_does_not_begin_is_tried_again_so_often_and_no_more(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "queue")
    entries.put(an_entry())

    def begin(_: Entry) -> Worker:
        raise PeerUnreachableError("b does not answer", cause="timed out")

    async with Scripted(entries, begin) as mover:
        (ended,) = await _settled(entries)
        assert mover.begun == ["e1", "e1"]
    assert (ended.state, ended.note) == (State.GAVE_UP, "b does not answer (timed out)")


async def test_what_waits_can_be_withdrawn(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "queue")
    entries.put(an_entry(1, not_before_s=1e12))

    def begin(_: Entry) -> Worker:
        raise AssertionError("it was withdrawn")

    async with Scripted(entries, begin) as mover:
        assert mover.withdraw("e1").state is State.GAVE_UP


@pytest.mark.parametrize("recorded", [False, True])
async def test_after_a_restart_a_migration_is_found_again_and_not_begun_twice(
    tmp_path: Path, recorded: bool
) -> None:
    """Killed before it wrote down that the worker had begun, or after."""
    entries = Entries(tmp_path / "queue")
    entry = follow(an_entry(), Event.STARTED, 1.0, note="")
    with a_journal(entry, pid=1) as journal:
        if recorded:
            entry = follow(entry, Event.BEGAN, 1.0, note="").model_copy(
                update={"tried": (journal.path.stem,)}
            )
        entries.put(entry)

        def begin(_: Entry) -> Worker:
            raise AssertionError("it runs already")

        entries = Entries(tmp_path / "queue")
        async with Scripted(entries, begin):
            await until(lambda: entries.all()[0].state is State.RUNNING)
            fail(journal, 4, "the domain has ended")
            (ended,) = await _settled(entries)
    assert (ended.state, ended.attempts, ended.tried) == (State.GAVE_UP, 1, (journal.path.stem,))


async def test_a_worker_that_never_wrote_is_begun_anew_and_not_counted_twice(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "queue")
    entries.put(follow(an_entry(), Event.STARTED, 1.0, note=""))

    def begin(entry: Entry) -> Worker:
        return a_worker(entry, a_journal(entry, pid=1))

    async with Scripted(entries, begin):
        await until(lambda: entries.all()[0].state is State.RUNNING)
    assert entries.all()[0].attempts == 1


@pytest.mark.parametrize(
    ("place", "state"),
    [(Place.DESTINATION, State.DONE), (Place.NOWHERE, State.GAVE_UP), (None, State.FAILED)],
)
async def test_of_a_worker_that_died_both_hosts_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place | None, state: State
) -> None:
    entries, asked = Entries(tmp_path / "queue"), list[str]()

    async def recover(path: Path, **how: bool) -> recovery.Recovery:
        asked.append(path.stem)
        assert how == {"act": True, "writer_gone": True}
        if place is None:
            raise PositionUnknownError("not recovered", where="b does not answer")
        return recovery.Recovery(
            situation=Situation(place=place, repairs=(), text="looked"), actions=(), done=True
        )

    monkeypatch.setattr(recovery, "recover", recover)

    def begin(entry: Entry) -> Worker:
        dead = subprocess.Popen(["true"])
        dead.wait()
        with a_journal(entry, pid=dead.pid) as journal:
            return Worker(process=dead, journal=journal.path, uuid=entry.uuid)

    entries.put(an_entry())
    async with Scripted(entries, begin):
        (ended,) = await _settled(entries)
    assert asked == [ended.migration]
    assert ended.state is state
    assert ended.note.startswith("looked" if place else "b does not answer; virtgrid migration recover")


async def test_a_full_disk_stops_the_queue_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Entries(tmp_path / "queue")
    entries.put(an_entry())
    full = True

    def replace_file(path: Path, data: bytes) -> None:
        if full:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("virtgrid.host.entries.replace_file", replace_file)

    def begin(_: Entry) -> Worker:
        raise VirtgridError("it fails")

    async with Scripted(entries, begin) as mover:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert mover.begun == []
        assert entries.all()[0].state is State.QUEUED
        full = False
        (ended,) = await _settled(entries)
    assert ended.state is State.GAVE_UP


# -- over virtgridd's socket -----------------------------------------------------------------------


async def test_only_root_may_look_at_the_queue_and_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent(tmp_path, None), dialled(Endpoint(tmp_path / "host")) as line:
        with pytest.raises(RefusedError, match="migrates nothing"):
            await line.call("moves")
        monkeypatch.setattr("virtgrid.wire.line.Line.peer_uid", lambda _: 5001)
        async with dialled(Endpoint(tmp_path / "host")) as other:
            for method in ("moves", "evacuate", "withdraw"):
                with pytest.raises(RefusedError, match=f"user 5001 of this host may not ask {method}"):
                    await other.call(method, {})


async def test_a_long_queue_is_told_in_pages_that_fit_a_line(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "queue")
    for number in range(450):
        entries.put(an_entry(number, not_before_s=1e12, note="n" * 500, tried=("m" * 200,) * 5))
    mover = Scripted(entries, lambda _: pytest.fail("nothing is due"))
    async with agent(tmp_path, mover), dialled(Endpoint(tmp_path / "host")) as line:
        found: list[str] = []
        more = True
        while more:
            page = await line.call("moves", {"after": found[-1] if found else None})
            found, more = [*found, *(one["id"] for one in page["entries"])], page["more"]
        assert found == [f"e{number}" for number in range(450)]
        with pytest.raises(NotFoundError):
            await line.call("withdraw", {"id": "e451"})
        told = await line.call("withdraw", {"id": "e7"})
        assert [(one["id"], one["state"]) for one in told["entries"]] == [("e7", "gave up")]
        with pytest.raises(RefusedError, match="has no destination 'z'"):
            await line.call("evacuate", {"to": "z"})


async def test_a_sandbox_makes_room_as_soon_as_it_is_prepared_by_a_pilot_or_by_virsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pilot's own call, which cannot be lost; of one that no pilot made the hook tells."""
    mover, asked = Scripted(Entries(tmp_path / "queue"), lambda _: pytest.fail("nothing is due")), list[str]()

    async def make_room(sandbox: str) -> None:
        asked.append(sandbox)

    async def look(*_: object) -> View:
        return View(stage=Stage.ABSENT)

    async def prepare(*_: object) -> None:
        raise RefusedError("there is no libvirt here")

    monkeypatch.setattr(mover, "make_room", make_room)
    monkeypatch.setattr(Guest, "prepare", prepare)
    monkeypatch.setattr(Guest, "look", look)
    monkeypatch.setattr("virtgrid.wire.line.Line.peer_uid", lambda _: 5001)
    now_s = time.time()
    text = tickets.issue(ticket(begins_at_s=now_s + 50, ends_at_s=now_s + 60), KEY)
    async with agent(tmp_path, mover), dialled(Endpoint(tmp_path / "host")) as line:
        await line.call("hello", {"ticket": text})
        with pytest.raises(RefusedError, match="no libvirt"):  # guests leave all the same
            await line.call("prepare", {"init": INIT})
        assert asked == ["r-42-1"]
        for driver, name, step in (
            ("lxc", "r-42-1", "prepare"), ("lxc", "box", "release"), ("qemu", "box", "prepare"),
            ("lxc", "box", "prepare"),
        ):  # fmt: skip
            said = {"v": 1, "driver": driver, "domain": name, "operation": step, "sub_operation": "begin"}
            assert qemu_hook.post(json.dumps(said).encode(), str(tmp_path / "notice")) is None
        await until(lambda: len(asked) > 1)
        assert asked == ["r-42-1", "box"]
