"""What a journal means: states, the four numbers, who is waited for; at any moment, and after any end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.unit.journals import KINDS, MONO_S, START, sample_journal
from virtgrid.core.events import Record
from virtgrid.report.fold import Fold
from virtgrid.report.model import Outcome, State, clean
from virtgrid.report.timeline import Timeline
from virtgrid.report.words import verdict


def alive(pid: int, started: object) -> bool:
    return True


def gone(pid: int, started: object) -> bool:
    return False


def record(t: float, event: str, **fields: object) -> Record:
    return Record(at=START + timedelta(seconds=t), mono_s=MONO_S + t, event=event, fields=fields)


def test_a_good_end_gives_the_four_numbers() -> None:
    timeline = Timeline.from_records(sample_journal("success"), gone)
    assert (timeline.state, timeline.outcome) == (State.FINISHED, Outcome.FINISHED)
    assert timeline.held_s == pytest.approx(6.0)
    assert timeline.downtime_s == pytest.approx(0.158)
    assert timeline.total_s == pytest.approx(29.855)
    assert timeline.answering == "yes"
    assert timeline.on == "hostB"
    assert timeline.unsuitable_at_pause == 0


def test_the_pause_lies_where_the_stamps_say() -> None:
    timeline = Timeline.from_records(sample_journal("success"))
    assert timeline.stopped_s is not None
    assert timeline.resumed_s is not None
    assert timeline.resumed_s - timeline.stopped_s == pytest.approx(0.158, abs=1e-6)


@pytest.mark.parametrize("on_wall_clock", [True, False])
def test_a_stamp_is_understood_on_either_clock(on_wall_clock: bool) -> None:
    stamp = START.timestamp() + 9.9 if on_wall_clock else MONO_S + 9.9
    fold = Fold()
    fold.add(record(0, "started", id="x", domain="d", source="a", destination="b"))
    fold.add(record(10, "stopped", clock_s=stamp))
    assert fold.status().stopped_s == pytest.approx(9.9)


def test_another_hosts_clock_cannot_end_the_pause_before_it_began() -> None:
    fold = Fold()
    fold.add(record(0, "started"))
    fold.add(record(10, "stopped", clock_s=START.timestamp() + 10))
    fold.add(record(10.2, "resumed", clock_s=START.timestamp() + 8))
    assert fold.status().downtime_s == 0.0


@pytest.mark.parametrize(
    ("kind", "state", "outcome", "exit_status", "on"),
    [
        ("plain", State.FINISHED, Outcome.FINISHED, 0, "hostB"),
        ("failed", State.FAILED, Outcome.FAILED, 1, "hostA"),
        ("aborted", State.ABORTED, Outcome.ABORTED, 6, "hostA"),
        ("timeout", State.FAILED, Outcome.FAILED, 5, "hostA"),
    ],
)
def test_every_end_is_told_apart(
    kind: str, state: State, outcome: Outcome, exit_status: int, on: str
) -> None:
    timeline = Timeline.from_records(sample_journal(kind), gone)
    assert (timeline.state, timeline.outcome, timeline.exit_status, timeline.on) == (
        state,
        outcome,
        exit_status,
        on,
    )
    assert f"web1 runs on {on}" in verdict(timeline)


def test_a_journal_without_end_is_lost_only_when_its_writer_is_gone() -> None:
    records = sample_journal("crashed")
    running = Timeline.from_records(records, alive)
    lost = Timeline.from_records(records, gone)
    assert (running.state, running.outcome) == (State.HOLDING, Outcome.RUNNING)
    assert (lost.state, lost.outcome) == (State.LOST, Outcome.CRASHED)
    assert lost.on is None
    assert "migration recover" in verdict(lost)


def test_recovered_says_where_it_was_found() -> None:
    records = [
        *sample_journal("crashed"),
        record(90, "recovered", domain="web1", on="hostA", action="cleaned", text="runs on hostA"),
    ]
    timeline = Timeline.from_records(records, gone)
    assert (timeline.state, timeline.on) == (State.FAILED, "hostA")


def test_recovery_after_a_reboot_does_not_turn_time_back() -> None:
    late = replace(record(7200, "recovered", domain="web1", on="hostA", action="none", text=""), mono_s=12.0)
    timeline = Timeline.from_records([*sample_journal("crashed"), late])
    assert timeline.end_s == pytest.approx(7200)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_of_a_journal_makes_sense(kind: str) -> None:
    records = sample_journal(kind, clients=6)
    fold = Fold()
    assert fold.status().state is State.PREPARING
    storage = first_pass = 0.0
    for one in records:
        fold.add(one)
        status = fold.status(alive)
        assert status.total_s is not None
        assert status.total_s >= 0
        assert (status.storage_fraction or 0.0) >= storage
        assert (status.first_pass or 0.0) >= first_pass
        storage, first_pass = status.storage_fraction or 0.0, status.first_pass or 0.0


def test_states_follow_the_phases() -> None:
    fold = Fold()
    seen: list[State] = []
    for one in sample_journal("success"):
        fold.add(one)
        if not seen or seen[-1] is not fold.status().state:
            seen.append(fold.status().state)
    assert seen == [
        State.PREPARING,
        State.STORAGE,
        State.PRECOPY,
        State.HOLDING,
        State.SWITCHING,
        State.FINISHED,
    ]


def test_while_holding_it_says_for_whom() -> None:
    timeline = Timeline.from_records(sample_journal("crashed"), alive)
    assert timeline.waiting_for is not None
    assert timeline.waiting_for.startswith("http 10.9.0.")
    assert timeline.hold is not None
    assert timeline.hold.max_s == 30.0
    assert Timeline.from_records(sample_journal("success")).waiting_for is None


def test_several_names_are_shortened_to_the_first() -> None:
    fold = Fold()
    fold.add(record(0, "started"))
    fold.add(record(1, "phase", phase="hold"))
    fold.add(record(2, "gate", decision="HOLD", reason="busy", waiting_for=["http a", "http b", "http c"]))
    assert fold.status().waiting_for == "http a and 2 more"


def test_the_longest_unsuitable_connection_comes_first_and_keeps_its_since() -> None:
    fold = Fold()
    fold.add(record(0, "started"))
    for t, client, said, reason in (
        (1.0, "late:1", "unsuitable", "response"),
        (0.5, "early:1", "unknown", "mid-stream"),
        (2.0, "early:1", "unsuitable", "response"),
        (2.0, "ok:1", "unsuitable", "response"),
        (2.5, "ok:1", "suitable", "idle"),
        (2.6, "gone:1", "unsuitable", "response"),
        (2.7, "gone:1", "closed", "FIN"),
    ):
        fold.add(
            record(
                t, "connection", client=client, server="s:80", protocol="http", verdict=said, reason=reason
            )
        )
    busy = fold.status().unsuitable
    assert [(one.client, one.verdict) for one in busy] == [
        ("late:1", "unsuitable"),
        ("early:1", "unsuitable"),
    ]
    # early:1 came second in the file although its time was earlier: time never runs backwards here.
    assert busy[0].since_s == 1.0


def test_a_failure_marks_the_phase_that_broke_not_its_clean_up() -> None:
    timeline = Timeline.from_records(sample_journal("failed"))
    assert [span.name for span in timeline.phases if span.broken] == ["storage"]


def test_the_hold_ends_when_the_clean_up_begins() -> None:
    timeline = Timeline.from_records(sample_journal("timeout"))
    assert timeline.hold is not None
    assert timeline.hold.end_s is not None
    assert timeline.hold.end_s < timeline.end_s


def test_the_maximum_wait_is_found_in_a_group_of_options() -> None:
    fold = Fold()
    fold.add(record(0, "started", options={"policy": {"max_wait_s": 12.5, "on_timeout": "hold"}}))
    fold.add(record(1, "phase", phase="hold"))
    hold = fold.status().hold
    assert hold is not None
    assert (hold.max_s, hold.then) == (12.5, "hold")
    assert fold.options() == {"policy.max_wait_s": "12.5", "policy.on_timeout": "hold"}


def test_what_a_later_version_adds_is_passed_over() -> None:
    fold = Fold()
    fold.add(record(0, "started", id="x", surprise=1))
    fold.add(record(1, "teleported", where="mars"))
    fold.add(record(2, "ram", iteration="six", remaining_bytes=None, sent_bytes=float("nan")))
    status = fold.status()
    assert status.ram is not None
    assert status.ram.remaining_bytes == 0


def test_no_control_sequence_survives() -> None:
    nasty = "\x1b[31mred\x9b2J\u202egnp.exe\ud800\r\n[bold]x[/bold]"
    fold = Fold()
    fold.add(record(0, "started", id="x", domain=nasty, source=nasty))
    text = fold.status().domain
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\ud800" for c in text)
    assert "[bold]" in text
    text.encode()
    assert len(clean("a" * 10_000)) == 400
