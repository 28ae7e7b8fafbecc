"""The counts a bench reads from a journal: exact in time, and the same for plain and gated."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from virtgrid.bench.counts import before_pause, burstiness, share_below, weighted, while_held
from virtgrid.bench.hold import dirtied_in, held_of, release_of
from virtgrid.core.events import Record
from virtgrid.lab.stage import Journey
from virtgrid.report.timeline import Timeline

BEGAN = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)
MONO_S = 1000.0


def record(at_s: float, event: str, **fields: Any) -> Record:
    return Record(at=BEGAN + timedelta(seconds=at_s), mono_s=MONO_S + at_s, event=event, fields=fields)


def verdict(at_s: float, port: int, word: str) -> Record:
    client = f"10.77.0.1:{port}"
    return record(
        at_s, "connection", client=client, server="10.77.0.10:80", protocol="http", verdict=word, reason="x"
    )


def ram(at_s: float, number: int, *, rate: float, age_s: float, sent: int = 0) -> Record:
    return record(
        at_s, "ram", iteration=number, remaining_bytes=0, sent_bytes=sent, dirty_bytes_s=rate,
        since_sync_s=age_s,
    )  # fmt: skip


STARTED = record(
    0, "started", id="20261122T030000-web", domain="web", uuid="u", source="alice", destination="bob",
    dest_uri="qemu+tls://bob/system", policy="backoff",
)  # fmt: skip
# Two connections; unsuitable: 2 until 6, 1 until 8, 0 until 9, then 1 until the pause at 10.
STORY = (
    STARTED,
    verdict(0, 1, "unknown"),
    verdict(0, 2, "unsuitable"),
    record(4, "phase", phase="hold"),
    verdict(6, 1, "suitable"),
    verdict(8, 2, "suitable"),
    verdict(9, 1, "unsuitable"),
    record(9.9, "gate", decision="release", reason="r", unsuitable=1),
    record(
        9.92, "released", by="gate", reason="r", unsuitable=1, remaining_bytes=9, downtime_estimate_s=0.01
    ),
    record(10, "stopped", unsuitable=1, clock_s=(BEGAN + timedelta(seconds=9.98)).timestamp()),
    record(
        10.5, "finished", domain="web", on="bob", exit_status=0, held_s=6.0, hold="tickled", downtime_s=0.4
    ),
)


def journey(*records: Record) -> Journey:
    return Journey(
        source="alice",
        destination="bob",
        records=records,
        wan={"begin": 100, "hold": 1000, "released": 4000, "end": 9000},
    )


def test_counts_stand_from_one_change_to_the_next() -> None:
    assert weighted(Timeline.from_records(STORY), 5.0, 10.0) == [
        (2.0, 1.0), (1.0, 2.0), (0.0, 1.0), (1.0, 1.0),
    ]  # fmt: skip


def test_a_capture_that_has_just_begun_is_not_taken_for_the_load() -> None:
    story = before_pause(Timeline.from_records(STORY))
    assert sum(seconds for _, seconds in story) == pytest.approx(4.98)  # 5 s to settle; QEMU's stamp ends it


def test_burstiness_is_weighted_by_time() -> None:
    seen = burstiness([[(20.0, 1.0), (0.0, 3.0)], [(20.0, 1.0), (0.0, 3.0)]])
    assert seen is not None
    assert (seen.mean, seen.variance, seen.zeros, seen.observed_s) == (5.0, 75.0, 0.75, 8.0)
    assert burstiness([]) is None


def test_the_share_below_tells_how_good_a_moment_was() -> None:
    held = while_held(Timeline.from_records(STORY))
    assert share_below(held, 0) == 0
    assert share_below(held, 1) == pytest.approx(1 / 5.92, rel=0.02)
    assert share_below([], 3) is None


def test_a_release_is_measured_from_the_decision_to_qemus_own_stamp() -> None:
    release = release_of(journey(*STORY))
    assert release is not None
    assert release.latency_ms == pytest.approx(80, abs=0.01)
    assert (release.unsuitable_decided, release.unsuitable_at_pause) == (1, 1)


def test_a_hold_is_told_with_its_wan_bytes() -> None:
    held = held_of(journey(*STORY))
    assert (held.held_s, held.kind, held.lost, held.wan_bytes) == (6.0, "tickled", False, 3000)


def test_a_hold_that_was_lost_or_never_began_is_no_hold() -> None:
    lost = (*STORY[:4], record(5, "hold_lost", text="t"), *STORY[4:])
    assert held_of(journey(*lost)).lost
    assert held_of(journey(STARTED, STORY[-1])).lost


def test_dirtied_bytes_are_what_the_syncs_of_the_window_found() -> None:
    records = [
        ram(0.5, 1, rate=0, age_s=0.5),
        ram(10.0, 1, rate=0, age_s=10.0),
        ram(11.0, 2, rate=500, age_s=0.5),  # sync at 10.5 found 10.5 s x 500 of the first pass
        ram(11.5, 2, rate=500, age_s=1.0),
        ram(13.0, 4, rate=100, age_s=0.5),  # sync at 12.5 found 2 s x 100
        ram(14.0, 5, rate=900, age_s=0.1),  # after the window
    ]
    found, syncs = dirtied_in(records, MONO_S + 10.2, MONO_S + 13.5)
    assert (round(found), syncs) == (5450, 3)
