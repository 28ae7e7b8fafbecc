"""bench switchover: each kind goes both ways, and the figures say what was lost and what was missed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from virtgrid.bench.switchover import (
    DRAIN,
    FLIP,
    GATED,
    KINDS,
    PLAIN,
    SwitchoverPlan,
    Trial,
    answering,
    figures,
    options,
    order,
)
from virtgrid.core.events import Record
from virtgrid.lab.felt_pause import FeltPause

PLAN = SwitchoverPlan(rtt_s=0.1, client_rtt_s=0.02)


def trial(
    kind: str, *, lost: int = 0, kept_s: float | None = 0.3, new_s: float | None = 0.5, **changes: Any
) -> Trial:
    felt = FeltPause(pings_sent=600, pings_lost=lost, stall_kept_s=kept_s, stall_new_s=new_s, awake_s=0.1)
    flipped: dict[str, Any] = {"flip_after_s": 0.004, "replayed": 7} if kind in (FLIP, DRAIN) else {}
    return Trial(
        run=1, kind=kind, source="alice", destination="bob", pause_s=0.2, unsuitable=1, short=1, felt=felt,
        **{"flip_after_s": None, "replayed": None, "drain_s": None, "drain": None, **flipped, **changes},
    )  # fmt: skip


def test_every_kind_goes_there_and_back() -> None:
    # The guest is at the first site before an even number of migrations.
    ways: dict[tuple[int, str], set[int]] = {}
    journeys = [(run, kind) for run in range(1, 7) for kind in order(run)]
    for number, (run, kind) in enumerate(journeys):
        ways.setdefault(((run - 1) // 2, kind), set()).add(number % 2)
    assert all(set(order(run)) == set(KINDS) for run in range(1, 7))
    assert {order(run)[0] for run in range(1, 7)} == set(KINDS)
    assert all(len(found) == 2 for found in ways.values()), ways


def test_plain_is_plain_libvirt_and_the_kinds_add_one_thing_each() -> None:
    assert "immediate" in options(PLAN, PLAIN)
    assert options(PLAN, GATED)[-4:] == ["--flip", "off", "--drain", "off"]
    assert options(PLAN, FLIP)[-4:] == ["--flip", "auto", "--drain", "off"]
    assert options(PLAN, DRAIN)[-4:] == ["--flip", "auto", "--drain", "auto"]
    assert options(PLAN, FLIP)[:2] == ["--bandwidth", "80000kbit"]


def test_one_lost_ping_in_any_flipped_migration_misses_the_goal() -> None:
    found = {
        one.name: one for one in figures(PLAN, [trial(PLAIN, lost=20), trial(FLIP), trial(FLIP, lost=1)])
    }
    assert (found["pings_lost_flip"].value, found["pings_lost_flip"].ok) == (1, False)
    assert found["pings_lost_flip"].peer == 20
    assert found["without_loss_flip"].value == pytest.approx(0.5)
    assert found["without_loss_flip"].ok is False


def test_a_drain_is_told_by_how_long_before_the_stop_it_began() -> None:
    found = {
        one.name: one
        for one in figures(
            PLAN, [trial(DRAIN, drain_s=0.05, flip_after_s=-0.12), trial(DRAIN, drain_s=0.0, lost=1)]
        )
    }
    assert found["drained"].value == pytest.approx(0.5)
    assert found["drained_before_stop_ms"].value == pytest.approx(120)
    assert found["pings_lost_drain"].ok is False


def test_stalls_are_held_against_the_pause_and_the_way() -> None:
    found = {one.name: one for one in figures(PLAN, [trial(FLIP), trial(FLIP, kept_s=0.45, new_s=0.55)])}
    established = found["stall_established_beyond_pause_ms_flip"]
    assert established.value == pytest.approx(250)
    assert established.ok is False, "two round trips are 240 ms"
    new = found["stall_new_beyond_pause_ms_flip"]
    assert new.value == pytest.approx(350)
    assert new.ok is True


def test_what_was_never_answered_meets_no_goal() -> None:
    found = {one.name: one for one in figures(PLAN, [trial(FLIP, kept_s=None)])}
    assert found["stall_established_beyond_pause_ms_flip"].ok is False


def test_who_is_being_answered_at_a_moment_is_told_by_what_was_seen_until_then() -> None:
    def seen(seen_s: float, port: int, verdict: str, state: str) -> Record:
        fields = {"client": f"c:{port}", "server": "s:80", "protocol": "http", "verdict": verdict,
                  "reason": "", "state": state, "seen_s": seen_s}  # fmt: skip
        return Record(event="connection", at=datetime.now(UTC), mono_s=seen_s + 0.03, fields=fields)

    records = [
        seen(1.0, 1, "unsuitable", "busy"),
        seen(1.1, 1, "suitable", "idle"),
        seen(1.2, 2, "unsuitable", "busy"),
        seen(1.2, 3, "unsuitable", "new"),
        seen(1.4, 2, "suitable", "idle"),
    ]
    assert [answering(records, at_s) for at_s in (0.9, 1.05, 1.15, 1.3, 1.5)] == [0, 1, 0, 1, 0]
