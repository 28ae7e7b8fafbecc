"""One migrate call under supervision, end to end, with a scripted monitor over a simulated QEMU.

The strict hold of QEMU 7.2 has its test here: hosts with that version are in use, and a test
machine with a newer one never shows it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit import plans
from tests.unit.qemu import GuestModel, Kind, ScriptedMonitor, SimulatedQemu
from virtgrid.core import journal as journals
from virtgrid.core.errors import (
    AbortedError,
    DeadlineError,
    HoldTimeoutError,
    MigrationFailedError,
    PeerUnreachableError,
    VirtgridError,
)
from virtgrid.core.events import Record
from virtgrid.core.journal import Journal
from virtgrid.migration import copying
from virtgrid.migration.copying import Copy
from virtgrid.migration.drain import Drain
from virtgrid.migration.plan import MigrationRequest
from virtgrid.migration.policy import PolicyConfig
from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import ConnectionView, Snapshot, Verdict
from virtgrid.virt import monitor as monitors
from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.jobstats import MigrationStatus
from virtgrid.virt.monitor import Monitor, MonitorError, QemuMonitor

LINK_BYTES_S = 12.5e6


class QemuClock:
    """Time is what the simulation says."""

    def __init__(self, qemu: SimulatedQemu) -> None:
        self._qemu = qemu

    def utc(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self._qemu.now_s)

    def monotonic_s(self) -> float:
        return self._qemu.now_s

    async def sleep(self, seconds: float) -> None:
        self._qemu.advance(seconds)
        await asyncio.sleep(0)


class ScriptedWatch:
    """A guest with ten connections, of which ``unsuitable(now)`` mind a pause."""

    def __init__(
        self,
        qemu: SimulatedQemu,
        unsuitable: Callable[[float], int],
        changes: Callable[[float], list[Change]],
    ) -> None:
        self._qemu = qemu
        self._unsuitable = unsuitable
        self._changes = changes

    def snapshot(self) -> Snapshot:
        now_s = self._qemu.now_s
        busy = self._unsuitable(now_s)
        return Snapshot(
            at_s=now_s,
            connections=tuple(
                ConnectionView(
                    client=f"10.0.0.9:{40000 + n}", server="10.0.0.1:80", protocol="http", state="response",
                    verdict=Verdict.UNSUITABLE if n < busy else Verdict.SUITABLE, reason="response",
                    since_s=0.0,
                )
                for n in range(10)
            ),
        )  # fmt: skip

    def changes(self) -> list[Change]:
        return self._changes(self._qemu.now_s)

    def unsuitable_at(self, at_s: float) -> int | None:
        return self._unsuitable(at_s)

    def addresses(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        pass


class FakeTickler:
    """Stands for the process that sends frames; the simulated guest is tickled anyway."""

    def __init__(self, tap: str, mac: str) -> None:
        self.running = False

    def start(self) -> None:
        self.running = True

    def keep_running(self) -> bool:
        return False

    def stop(self) -> None:
        self.running = False


class FakeDomain:
    """The few verbs a copy uses. Aborting makes the migrate call fail, as libvirt does."""

    name = "web1"

    def __init__(self, outcome: asyncio.Future[None]) -> None:
        self.outcome = outcome
        self.aborted = 0
        self.suspended = 0
        self.abort_fails: VirtgridError | None = None

    async def abort_job(self) -> None:
        self.aborted += 1
        if self.abort_fails is not None:
            raise self.abort_fails
        if not self.outcome.done():
            self.outcome.set_exception(
                failed_call("operation aborted: migration out job: canceled by client")
            )

    async def suspend(self) -> None:
        self.suspended += 1


def failed_call(cause: str) -> LibvirtError:
    return LibvirtError("libvirt did not migrate the domain", number=1, cause=cause)


class Ending(ScriptedMonitor):
    """Lets the migrate call return when the guest has moved, and a test act before every look."""

    def __init__(self, qemu: SimulatedQemu, outcome: asyncio.Future[None], **options: Any) -> None:
        super().__init__(qemu, **options)
        self._outcome = outcome
        self.before: Callable[[float], None] = lambda now_s: None

    async def migration(self) -> MigrationStatus:
        self.before(self.qemu.now_s)
        assert self.qemu.now_s < 300, "the migration does not come to an end"
        status = await super().migration()
        arrived = status.status == "completed" and self.qemu.now_s > (self.qemu.stopped_at_s or 0) + 0.2
        if arrived and not self._outcome.done():
            self._outcome.set_result(None)
        return status


@dataclass
class Rig:
    """A copy with all that surrounds it."""

    copy: Copy
    qemu: SimulatedQemu
    monitor: Ending
    domain: FakeDomain
    destination: SimpleNamespace
    outcome: asyncio.Future[None]
    journal: Journal
    rescued: list[bool]

    async def run(self) -> list[Record]:
        """To the end -> the journal. Errors come through; ``records`` reads the journal then."""
        await self.copy.run(self._call())
        return self.records()

    async def _call(self) -> None:
        await asyncio.shield(self.outcome)

    def records(self) -> list[Record]:
        return journals.read(self.journal.path)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    monkeypatch.setattr(copying, "_HOLD_POLL_S", 0)
    monkeypatch.setattr(copying, "_IDLE_POLL_S", 0)
    monkeypatch.setattr(copying, "Tickler", FakeTickler)

    def make(
        kind: Kind = "strict",
        *,
        guest: GuestModel | None = None,
        unsuitable: Callable[[float], int] = lambda now_s: 0,
        asked: MigrationRequest | None = None,
        monitor: Monitor | None = None,
        tap: bool = True,
        link_bytes_s: float = LINK_BYTES_S,
        letting_go: Callable[[Drain], Awaitable[None]] | None = None,
        changes: Callable[[float], list[Change]] = lambda now_s: [],
    ) -> Rig:
        qemu = SimulatedQemu(kind, guest or GuestModel(dirty_bytes_s=5e5), link_bytes_s)
        qemu.max_bandwidth, qemu.downtime_limit_ms = 1 << 40, 1
        outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        scripted = Ending(qemu, outcome, storage_polls=3)
        domain, destination, rescued = FakeDomain(outcome), SimpleNamespace(lost=None), []
        journal = Journal(tmp_path / "journal.jsonl", QemuClock(qemu))

        async def rescue() -> None:
            rescued.append(True)
            if not outcome.done():
                outcome.set_exception(failed_call("operation aborted"))

        async def peer_silent() -> bool:
            return False

        copy = Copy(
            plans.plan(asked, tap_visible=tap),
            journal,
            QemuClock(qemu),
            domain=domain,  # type: ignore[arg-type]
            monitor=monitor or scripted,
            destination=destination,  # type: ignore[arg-type]
            watch=ScriptedWatch(qemu, unsuitable, changes),
            rescue=rescue,
            peer_silent=peer_silent,
            letting_go=letting_go,
        )
        return Rig(copy, qemu, scripted, domain, destination, outcome, journal, rescued)

    return make


def policy(**changes: Any) -> MigrationRequest:
    return plans.request(policy=PolicyConfig(**({"name": "strict"} | changes)))


def busy_until(when_s: float) -> Callable[[float], int]:
    return lambda now_s: 3 if now_s < when_s else 0


def told(records: list[Record], event: str, **fields: Any) -> list[Record]:
    return [r for r in records if r.event == event and all(r.get(k) == v for k, v in fields.items())]


def in_order(records: list[Record], *steps: tuple[str, dict[str, Any]]) -> None:
    """Each step is found after the one before."""
    at = 0
    for event, fields in steps:
        found = next((n for n, r in enumerate(records) if n >= at and r in told([r], event, **fields)), None)
        assert found is not None, f"no {event} {fields} after line {at}"
        at = found + 1


async def test_qemu_7_2_is_held_strictly_refreshed_and_let_go_when_its_connections_permit(
    rig: Callable[..., Rig],
) -> None:
    made = rig("strict", unsuitable=busy_until(25.0))
    records = await made.run()
    in_order(
        records,
        ("phase", {"phase": "storage"}),
        ("storage", {"disk": "vda", "ready": True}),
        ("phase", {"phase": "precopy"}),
        ("clamp", {"mode": "landing"}),
        ("clamp", {"mode": "clamped", "limit_bytes_s": 10}),
        ("phase", {"phase": "hold"}),
        ("gate", {"decision": "hold", "unsuitable": 3}),
        ("hold", {"kind": "strict"}),
        ("clamp", {"mode": "refresh"}),
        ("clamp", {"mode": "landing"}),
        ("clamp", {"mode": "clamped", "limit_bytes_s": 10}),
        ("clamp", {"mode": "refresh"}),
        ("released", {"by": "gate", "unsuitable": 0}),
        ("phase", {"phase": "release"}),
        ("phase", {"phase": "switchover"}),
    )
    assert not told(records, "hold_lost")
    assert made.copy.hold_kind == "strict"
    assert made.copy.held_s > 15
    assert made.qemu.stopped_at_s is not None
    assert made.qemu.stopped_at_s >= 25.0
    released = told(records, "released")[0]
    assert released["downtime_estimate_s"] <= made.copy._request.max_downtime_s
    assert made.qemu.commands[-1] == {"max-bandwidth": 1 << 40, "downtime-limit": 2_000_000}


def short_requests(now_s: float) -> list[Change]:
    """One since the last look, answered in 50 ms."""
    return [
        Change(now_s - 0.06, "10.0.0.9:50000", "10.0.0.1:80", "http", "unsuitable", "", ""),
        Change(now_s - 0.01, "10.0.0.9:50000", "10.0.0.1:80", "http", "suitable", "", ""),
    ]


async def test_the_guest_is_drained_before_qemu_is_told(rig: Callable[..., Rig]) -> None:
    drains: list[Drain] = []

    async def let_go(drain: Drain) -> None:
        drains.append(drain)
        assert made.qemu.max_bandwidth < 1 << 40, "still held"

    made = rig(
        "drip",
        unsuitable=lambda now_s: 3,
        changes=short_requests,
        letting_go=let_go,
        asked=policy(max_wait_s=5),
    )
    records = await made.run()
    (drain,) = drains
    assert drain.for_s == pytest.approx(0.05)
    assert told(records, "released")


async def test_without_drain_it_is_only_flipped(rig: Callable[..., Rig]) -> None:
    drains: list[Drain] = []

    async def let_go(drain: Drain) -> None:
        drains.append(drain)

    asked = replace(policy(max_wait_s=5), drain="off")
    made = rig("drip", unsuitable=lambda now_s: 3, changes=short_requests, letting_go=let_go, asked=asked)
    await made.run()
    assert [drain.for_s for drain in drains] == [0.0]


async def test_aborted_in_the_drain_qemu_is_not_told(rig: Callable[..., Rig]) -> None:
    async def let_go(drain: Drain) -> None:
        made.copy.ask_abort(AbortedError("aborted on request"))

    made = rig("drip", letting_go=let_go)
    with pytest.raises(AbortedError):
        await made.run()
    assert made.qemu.max_bandwidth < 1 << 40
    assert not told(made.records(), "released")


async def test_qemu_10_is_held_by_its_drip_and_let_go(rig: Callable[..., Rig]) -> None:
    made = rig("drip", unsuitable=busy_until(15.0))
    records = await made.run()
    in_order(
        records,
        ("hold", {"kind": "tickled"}),
        ("released", {"by": "gate"}),
        ("phase", {"phase": "switchover"}),
    )
    assert not told(records, "clamp", mode="refresh")
    assert (made.qemu.stopped_at_s or 0) >= 15.0


async def test_an_idle_guest_nobody_can_tickle_loses_its_hold_and_that_is_said(
    rig: Callable[..., Rig],
) -> None:
    made = rig(
        "drip", guest=GuestModel(tickle_every_s=None), unsuitable=lambda now_s: 3, tap=False
    )  # fmt: skip
    records = await made.run()
    assert told(records, "hold_lost")
    assert made.copy.hold_kind == "best-effort"


async def test_a_guest_through_before_the_first_look_at_its_memory_is_a_lost_hold_too(
    rig: Callable[..., Rig],
) -> None:
    made = rig("drip", guest=GuestModel(ram_bytes=1 << 20), unsuitable=lambda now_s: 3, link_bytes_s=1.25e9)
    made.monitor.poll_s = 0.5
    records = await made.run()
    assert not told(records, "ram")
    assert len(told(records, "hold_lost")) == 1


async def test_plain_libvirt_is_only_watched(rig: Callable[..., Rig]) -> None:
    made = rig("drip", guest=GuestModel(), unsuitable=lambda now_s: 9, asked=policy(name="immediate"))
    records = await made.run()
    assert made.qemu.commands == []
    assert made.copy.hold_kind is None
    assert told(records, "connections", unsuitable=9)
    for absent in ("hold", "clamp", "gate", "released", "hold_lost"):
        assert not told(records, absent)


@pytest.mark.parametrize("kind", ["strict", "drip"])
async def test_a_person_can_let_go_whatever_the_connections_do(rig: Callable[..., Rig], kind: Kind) -> None:
    made = rig(kind, unsuitable=lambda now_s: 3, asked=policy(max_wait_s=None))
    answers = []

    def ask(now_s: float) -> None:
        if now_s > 10 and not answers:
            answers.append(made.copy.ask_release("ops"))

    made.monitor.before = ask
    records = await made.run()
    assert answers == ["released"]
    assert told(records, "released", by="user", reason="asked for by ops", unsuitable=3)
    assert made.copy.ask_release("ops") == "it has been released already"


async def test_a_release_asked_for_early_comes_as_soon_as_there_is_something_to_release(
    rig: Callable[..., Rig],
) -> None:
    made = rig("strict", unsuitable=lambda now_s: 3, asked=policy(max_wait_s=None))
    assert made.copy.ask_release("ops") == "it will be released as soon as it is held"
    records = await made.run()
    assert told(records, "released", by="user")
    assert made.copy.held_s < 0.5


async def test_time_up_and_abort_ends_on_the_source_with_the_hold_s_own_error(
    rig: Callable[..., Rig],
) -> None:
    made = rig("strict", unsuitable=lambda now_s: 3, asked=policy(max_wait_s=5, on_timeout="abort"))
    with pytest.raises(HoldTimeoutError) as caught:
        await made.run()
    assert caught.value.exit_status == 5
    assert made.domain.aborted == 1
    assert not made.qemu.completed
    assert told(made.records(), "gate", decision="abort")
    assert not told(made.records(), "released")


async def test_time_up_and_release_lets_go_and_says_that_time_was_up(rig: Callable[..., Rig]) -> None:
    made = rig("drip", unsuitable=lambda now_s: 3, asked=policy(max_wait_s=5))
    records = await made.run()
    released = told(records, "released", by="timeout", unsuitable=3)[0]
    assert 5 <= released["held_s"] < 6


async def test_time_up_and_hold_waits_for_a_person(rig: Callable[..., Rig]) -> None:
    made = rig(
        "strict",
        unsuitable=lambda now_s: 0 if now_s > 20 else 3,
        asked=policy(max_wait_s=5, on_timeout="hold"),
    )

    def ask(now_s: float) -> None:
        if now_s > 40 and made.copy.released_s is None:
            made.copy.ask_release("ops")

    made.monitor.before = ask
    records = await made.run()
    assert told(records, "released", by="user")
    assert (made.qemu.stopped_at_s or 0) > 40


async def test_a_request_to_abort_ends_the_call_and_its_own_error_stays(rig: Callable[..., Rig]) -> None:
    made = rig("strict", unsuitable=lambda now_s: 3)

    def ask(now_s: float) -> None:
        if now_s > 8:
            made.copy.ask_abort(AbortedError("aborted on request"))
            made.copy.ask_abort(AbortedError("a second one"))

    made.monitor.before = ask
    with pytest.raises(AbortedError, match="aborted on request"):
        await made.run()
    assert made.domain.aborted == 1
    assert made.records()[-1].get("phase") == "cleanup"


async def test_a_monitor_that_never_returns_ends_the_migration_over_another_connection(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, ended = threading.Event(), threading.Event()

    def never(*_: object) -> str:
        hanging.set()
        ended.wait(30)
        return "{}"

    monkeypatch.setattr(monitors, "_qemu", lambda: SimpleNamespace(qemuMonitorCommand=never))
    source = await Hypervisor.open("test:///default")
    try:
        uuid = await source.call(lambda raw: raw.lookupByName("test").UUIDString(), "look up")
        made = rig("strict", monitor=QemuMonitor(source, uuid, deadline_s=0.05))
        made.domain.abort_fails = DeadlineError("the same connection, given up")
        with pytest.raises(MigrationFailedError, match="neither held nor released") as caught:
            await made.run()
        assert hanging.is_set()
        assert made.rescued == [True]
        assert "did not answer within" in (caught.value.cause or "")
    finally:
        ended.set()
        await source.close()


async def test_a_call_that_does_not_come_back_is_not_waited_for_for_ever(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_UNHEARD_DEADLINE_S", 0.05)
    monkeypatch.setattr(copying, "_RETURN_DEADLINE_S", 0.05)
    made = rig("strict", unsuitable=lambda now_s: 3, asked=policy(max_wait_s=1, on_timeout="abort"))

    async def nothing_happens() -> None:
        made.domain.aborted += 1

    made.domain.abort_job = nothing_happens  # type: ignore[method-assign]
    with pytest.raises(HoldTimeoutError):
        await made.run()
    assert made.domain.aborted == 1
    assert made.monitor.cuts == 1, "what kept it was the storage copy, perhaps"


async def test_a_monitor_that_only_refuses_counts_as_lost(rig: Callable[..., Rig]) -> None:
    made = rig("strict")

    class Refusing(ScriptedMonitor):
        async def migration(self) -> MigrationStatus:
            raise MonitorError("QEMU refused 'query-migrate'", cause="no such command")

    made.copy._monitor = Refusing(made.qemu)
    with pytest.raises(MigrationFailedError, match="stopped answering"):
        await made.run()
    assert made.domain.aborted == 1


async def test_a_destination_that_went_away_ends_the_migration(rig: Callable[..., Rig]) -> None:
    made = rig("drip", unsuitable=lambda now_s: 3)

    def cut(now_s: float) -> None:
        if now_s > 6:
            made.destination.lost = "its libvirtd closed the connection"

    made.monitor.before = cut
    with pytest.raises(MigrationFailedError, match="destination went away") as caught:
        await made.run()
    assert caught.value.cause == "its libvirtd closed the connection"


async def test_bytes_that_stop_moving_end_the_migration(rig: Callable[..., Rig]) -> None:
    made = rig("drip")

    def cut(now_s: float) -> None:
        if now_s > 1:
            made.qemu.link_bytes_s = 0.0

    made.monitor.before = cut
    with pytest.raises(MigrationFailedError, match="not a byte has moved"):
        await made.run()
    assert 30 < made.qemu.now_s < 33


async def test_a_strict_hold_in_which_nothing_moves_is_not_a_stall(rig: Callable[..., Rig]) -> None:
    idle = GuestModel(tickle_every_s=None)
    made = rig("strict", guest=idle, unsuitable=lambda now_s: 3, tap=False, asked=policy(max_wait_s=45))
    records = await made.run()
    assert told(records, "released", by="timeout")
    assert not told(records, "hold_lost")


async def test_the_timeout_of_virsh_suspends_the_guest_so_that_it_ends(rig: Callable[..., Rig]) -> None:
    asked = plans.request(policy=PolicyConfig(name="strict", max_wait_s=None), timeout_s=8)
    made = rig("strict", unsuitable=lambda now_s: 3, asked=asked)
    records = await made.run()
    assert made.domain.suspended == 1
    assert told(records, "released", by="timeout")
    assert made.copy.released_reason == "--timeout"
    assert 8 < (made.qemu.stopped_at_s or 0) < 9


@pytest.mark.parametrize(
    ("failure", "kind", "says"),
    [
        (
            failed_call("unable to write: No space left on device"),
            MigrationFailedError,
            "disk of the destination",
        ),
        (failed_call("operation aborted: canceled by client"), AbortedError, None),
        (failed_call("internal error: guest CPU"), MigrationFailedError, None),
        (PeerUnreachableError("gone", cause="broken pipe"), MigrationFailedError, None),
    ],
)
async def test_libvirt_s_reason_is_told_as_the_class_it_is(
    rig: Callable[..., Rig], failure: VirtgridError, kind: type[VirtgridError], says: str | None
) -> None:
    made = rig("drip", unsuitable=lambda now_s: 3)

    def fail(now_s: float) -> None:
        if now_s > 1 and not made.outcome.done():
            made.outcome.set_exception(failure)

    made.monitor.before = fail
    with pytest.raises(kind) as caught:
        await made.run()
    assert type(caught.value) is kind
    assert says is None or says in (caught.value.hint or "")
    assert made.domain.aborted == 0, "the call had ended by itself"
