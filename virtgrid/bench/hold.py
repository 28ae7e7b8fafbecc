"""``virtgrid bench hold``: how long a guest can be held, at what price, and how fast it is let go.

Two guests, one that writes next to nothing and one that writes steadily, are each held until a
deadline by a client whose request never ends. Then a third one, which checks its own memory, is
migrated to and fro under load: does it always answer, and how long does a release take?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.bench.result import Figure, Result, at_least, at_most, figure
from virtgrid.bench.where import measured_at
from virtgrid.core.errors import MigrationFailedError, VirtgridError
from virtgrid.core.events import Record
from virtgrid.core.units import format_duration, format_rate
from virtgrid.lab import guest
from virtgrid.lab.felt import LoadWanted, under_load
from virtgrid.lab.guest import MIN_MEMORY_MIB, GuestSpec
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.stage import Journey, Stage, Tell, lab_name, staged, unfinished_request

#: What the busy guest writes: below what QEMU lets out of a clamped migration, above nothing.
BUSY_BYTES_S: Final = 800_000
#: The goal's latency stands for a pause whose estimate was within the budget.
RELEASE_GOAL_MS: Final = 150.0
PRICE_GOAL: Final = 1.3
#: The first pass only costs time here; the busy guest needs more for what it writes to.
_MEMORY_MIB: Final = MIN_MEMORY_MIB["small"]
_WANDERER: Final = "wanderer"
_MEMCHECK_PAGES: Final = 48
_MEMCHECK_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPlan:
    """What to measure. hold_s: how long each guest is held; migrations: how many in a row under load."""

    rate_bytes_s: float = 12.5e6
    rtt_s: float = 0.1
    hold_s: float = 60.0
    migrations: int = 20
    sessions: int = 40
    seed: int = 1


# --- figures from journals: pure ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One hold, from its journal and the WAN's counter.

    lost: QEMU completed by itself. dirtied_bytes: what QEMU's syncs found (``dirtied_in``).
    sent_bytes: on the migration stream meanwhile. wan_bytes: on the wire, both directions, framing
    and acknowledgements included.
    """

    held_s: float
    kind: str | None
    lost: bool
    wan_bytes: int | None
    dirtied_bytes: float
    sent_bytes: int
    syncs: int
    release: Release | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "held_s": self.held_s,
            "kind": self.kind,
            "lost": self.lost,
            "wan_bytes": self.wan_bytes,
            "dirtied_bytes": round(self.dirtied_bytes),
            "stream_bytes": self.sent_bytes,
            "syncs": self.syncs,
            "release": None if self.release is None else self.release.as_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """From the decision to the stopped guest. estimate_s: the pause the gate expected."""

    latency_ms: float
    by: str
    estimate_s: float | None
    remaining_bytes: int | None
    downtime_s: float | None
    unsuitable_decided: int | None
    unsuitable_at_pause: int | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "latency_ms": round(self.latency_ms, 1),
            "by": self.by,
            "downtime_estimate_s": self.estimate_s,
            "remaining_bytes": self.remaining_bytes,
            "downtime_s": self.downtime_s,
            "unsuitable_decided": self.unsuitable_decided,
            "unsuitable_at_pause": self.unsuitable_at_pause,
        }


def release_of(journey: Journey) -> Release | None:
    """How the switchover was let go; None when it was not held, or QEMU's stamp is missing.

    The latency runs from the gate's decision, before QEMU is told, to QEMU's own stamp of STOP.
    """
    released, stopped = journey.first("released"), journey.first("stopped")
    if released is None or stopped is None or stopped.get("clock_s") is None:
        return None
    decided = journey.first("gate", decision="release") or released
    return Release(
        latency_ms=(float(stopped["clock_s"]) - journey.wall_s(decided)) * 1000,
        by=str(released["by"]),
        estimate_s=released.get("downtime_estimate_s"),
        remaining_bytes=released.get("remaining_bytes"),
        downtime_s=journey.end.get("downtime_s"),
        unsuitable_decided=released.get("unsuitable"),
        unsuitable_at_pause=stopped.get("unsuitable"),
    )


def dirtied_in(records: Sequence[Record], begin_s: float, end_s: float) -> tuple[float, int]:
    """(bytes that QEMU's syncs within a window found dirty, syncs); times as in ``mono_s``.

    QEMU tells a rate for the interval that a sync closed, so rate x interval is what the sync
    found. That of the first sync in the window began before it: what the guest dirtied during the
    first pass is found, and sent, in the hold. What was dirtied after the last sync nobody has seen.
    """
    found_bytes, syncs = 0.0, 0
    last: tuple[int, float] | None = None  # a sync: its number, its moment
    for record in records:
        if record.event != "ram" or record.get("dirty_bytes_s") is None or record.mono_s > end_s:
            continue
        number = int(record["iteration"])
        sync_s = record.mono_s - float(record.get("since_sync_s") or 0.0)
        if last is not None and number != last[0] and record.mono_s >= begin_s:
            found_bytes += float(record["dirty_bytes_s"]) * max(0.0, sync_s - last[1])
            syncs += number - last[0]
        if last is None or number != last[0]:
            last = (number, sync_s)
    return found_bytes, syncs


def held_of(journey: Journey) -> Held:
    """What a hold was, from the journal of its migration."""
    began, released = journey.first("phase", phase="hold"), journey.first("released")
    held_s = float(journey.end.get("held_s") or 0.0)
    lost = journey.first("hold_lost") is not None
    if began is None:
        return Held(
            held_s=held_s, kind=None, lost=True, wan_bytes=None, dirtied_bytes=0.0, sent_bytes=0, syncs=0,
            release=None,
        )  # fmt: skip
    begin_s = began.mono_s
    end_s = released.mono_s if released else begin_s + held_s
    dirtied, syncs = dirtied_in(journey.records, begin_s, end_s)
    within = [
        record for record in journey.records if record.event == "ram" and begin_s <= record.mono_s <= end_s
    ]
    seen = "hold" in journey.wan and "released" in journey.wan
    return Held(
        held_s=held_s,
        kind=journey.end.get("hold"),
        lost=lost,
        wan_bytes=journey.wan["released"] - journey.wan["hold"] if seen else None,
        dirtied_bytes=dirtied,
        sent_bytes=int(within[-1]["sent_bytes"]) - int(within[0]["sent_bytes"]) if within else 0,
        syncs=syncs,
        release=release_of(journey),
    )


# --- measuring --------------------------------------------------------------------------------


def measure(plan: HoldPlan, tell: Tell, *, journals: Path | None = None) -> Result:
    """Bring up a lab, measure, take it down. journals: a directory to keep those of the migrations in."""
    config = LabConfig(name=lab_name("hold"), wan=LinkSpec(rate_bytes_s=plan.rate_bytes_s, rtt_s=plan.rtt_s))
    with staged(config, tell, journals=journals) as stage:
        where = measured_at(
            stage, hold_s=plan.hold_s, migrations=plan.migrations, sessions=plan.sessions, seed=plan.seed
        )
        stage.boot(
            GuestSpec(name="idle", address="10.77.0.10", memory_mib=_MEMORY_MIB),
            GuestSpec(name="busy", address="10.77.0.11", dirty_bytes_s=BUSY_BYTES_S),
        )
        idle = _hold(stage, "idle", plan.hold_s)
        stage.destroy("idle")
        busy = _hold(stage, "busy", plan.hold_s)
        stage.destroy("busy")
        moves = _to_and_fro(stage, plan)
    return Result(
        bench="hold",
        environment=where,
        figures=tuple(figures(plan, idle, busy, moves)),
        raw={"idle": idle.as_dict(), "busy": busy.as_dict(), "migrations": moves},
    )


def figures(plan: HoldPlan, idle: Held, busy: Held, moves: Sequence[dict[str, Any]]) -> list[Figure]:
    """The figures from what was measured."""
    long_enough = at_least(plan.hold_s, "s")
    price = busy.wan_bytes / busy.dirtied_bytes if busy.wan_bytes and busy.dirtied_bytes else None
    releases = [one["release"] for one in moves if one.get("release")]
    releases += [held.release.as_dict() for held in (idle, busy) if held.release]
    latencies = [one["latency_ms"] for one in releases]
    idle_rate = idle.wan_bytes / idle.held_s if idle.wan_bytes and idle.held_s else None
    busy_rate = busy.wan_bytes / busy.held_s if busy.wan_bytes and busy.held_s else None
    every = at_least(1)
    return [
        figure("held_s_idle", [idle.held_s], "s", goal=long_enough),
        figure("held_s_busy", [busy.held_s], "s", goal=long_enough),
        figure("wan_bytes_per_dirtied_byte", [price], goal=at_most(PRICE_GOAL)),
        figure("wan_bytes_s_idle", [idle_rate], "B/s"),
        figure("wan_bytes_s_busy", [busy_rate], "B/s"),
        figure(
            "release_to_pause_ms",
            latencies,
            "ms",
            of=statistics.median,
            goal=at_most(RELEASE_GOAL_MS, "ms, median"),
        ),
        figure("release_downtime_s", [one["downtime_s"] for one in releases], "s", of=statistics.median),
        figure("answering_after", [1.0 if one["well"] else 0.0 for one in moves], goal=every),
    ]


def _hold(stage: Stage, name: str, hold_s: float) -> Held:
    """Hold one guest until the deadline."""
    stage.tell(f"holding {name} for {format_duration(hold_s)}")
    spec = stage.guests[name].spec
    with ExitStack() as later:

        def on_record(record: Record) -> None:
            # Only now does the tracker see the connection from its first frame.
            if record.event == "phase" and record["phase"] == "storage":
                later.enter_context(unfinished_request(stage.lab, spec.address))
            elif record.event == "hold":
                stage.tell(f"  {name} is held: {record['kind']}")

        journey = stage.migrate(
            name, "--policy", "strict", "--max-wait", f"{hold_s:g}s", "--on-timeout", "release",
            on_record=on_record,
        )  # fmt: skip
    held = held_of(journey)
    rate = format_rate(held.wan_bytes / held.held_s) if held.wan_bytes and held.held_s else "unknown"
    lost = ", then the hold was LOST" if held.lost else ""
    stage.tell(f"  {name} was held for {format_duration(held.held_s)}, WAN {rate}{lost}")
    return held


def _to_and_fro(stage: Stage, plan: HoldPlan) -> list[dict[str, Any]]:
    """Migrations in a row under load; each one's release, and whether the guest is well after it."""
    spec = GuestSpec(
        name=_WANDERER, address="10.77.0.12", memory_mib=_MEMORY_MIB, memcheck_pages=_MEMCHECK_PAGES
    )
    stage.boot(spec)
    wanted = LoadWanted(address=spec.address, sessions=plan.sessions, shape="bursty", seed=plan.seed)
    moves: list[dict[str, Any]] = []
    with under_load(stage.lab, wanted) as load:
        for number in range(1, plan.migrations + 1):
            moves.append(_move(stage, spec))
            stage.tell(f"migration {number} of {plan.migrations}: {_in_words(moves[-1])}")
        stage.tell(f"  its clients: {load.stop().in_words()}")
    return moves


def _move(stage: Stage, spec: GuestSpec) -> dict[str, Any]:
    try:
        journey = stage.migrate(spec.name, "--policy", "backoff")
    except MigrationFailedError as error:
        return {"well": False, "error": error.what, "cause": error.cause}
    release = release_of(journey)
    state = _memory(stage, spec)
    end = journey.end
    return {
        "from": journey.source,
        "to": journey.destination,
        "well": end.get("answering") == "yes" and state is not None and state.corrupt == 0,
        "answering": end.get("answering"),
        "corrupt_pages": None if state is None else state.corrupt,
        "held_s": end.get("held_s"),
        "hold": end.get("hold"),
        "total_s": end.get("total_s"),
        "release": None if release is None else release.as_dict(),
    }


def _in_words(move: dict[str, Any]) -> str:
    if "error" in move:
        return f"FAILED: {move['error']}"
    release = move["release"]
    late = "unknown" if release is None else f"{release['latency_ms']:.0f} ms"
    return (
        f"{'well' if move['well'] else 'NOT WELL'}, held {format_duration(move['held_s'] or 0.0)},"
        f" stopped {late} after the decision"
    )


def _memory(stage: Stage, spec: GuestSpec) -> guest.MemcheckState | None:
    """The guest's account of its memory after a whole round of its checker; None: it does not answer."""
    try:
        arrived = guest.memcheck_state(stage.lab, spec, deadline_s=_MEMCHECK_S)
        end_s = time.monotonic() + _MEMCHECK_S
        # What was lost is found in the round after the one it was lost in.
        while time.monotonic() < end_s:
            state = guest.memcheck_state(stage.lab, spec, deadline_s=_MEMCHECK_S)
            if state.iterations > arrived.iterations:
                return state
            time.sleep(0.2)
    except VirtgridError:
        return None
    return None
