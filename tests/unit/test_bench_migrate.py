"""What bench migrate makes of its trials: fair turns, the named figures, goals judged honestly."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from virtgrid.bench import hold as holding
from virtgrid.bench.migrate import (
    BACKOFF,
    CYCLE_S,
    GATED,
    NONE,
    PLAIN,
    MigratePlan,
    Trial,
    figures,
    options,
    order,
)
from virtgrid.cli.bench import app
from virtgrid.core.events import Record
from virtgrid.lab.demo import Half, rows, sentence
from virtgrid.lab.felt import Felt, felt
from virtgrid.lab.load.qos import Burstiness
from virtgrid.lab.load.records import Request
from virtgrid.lab.load.run import LoadResult
from virtgrid.lab.stage import Journey

BEGAN = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)
NAMES = {
    f"{name}_{kind}"
    for name in ("unsuitable_at_pause", "downtime_s", "total_s", "sent_bytes")
    for kind in (PLAIN, GATED)
} | {
    f"{name}_{kind}"
    for name in ("qos_good_tolerable", "delayed_requests")
    for kind in (NONE, PLAIN, GATED)
}  # fmt: skip


def record(at_s: float, event: str, **fields: Any) -> Record:
    return Record(at=BEGAN + timedelta(seconds=at_s), mono_s=500 + at_s, event=event, fields=fields)


def journey(unsuitable: int, held_s: float = 0.0, downtime_s: float = 0.5, total_s: float = 20.0) -> Journey:
    """A migration while as many connections as its pause hit were unsuitable, and one more before."""
    records = [
        record(
            0, "started", id="20261122T030000-web", domain="web", uuid="u", source="alice",
            destination="bob", dest_uri="qemu+tls://bob/system", policy="backoff",
        )
    ]  # fmt: skip
    for port in range(unsuitable + 1):
        records.append(_verdict(0.1, port, "unsuitable"))
    if held_s:
        records.append(record(9, "phase", phase="hold"))
    records.append(_verdict(12, unsuitable, "suitable"))
    if held_s:
        records.append(record(14, "gate", decision="release", reason="r", unsuitable=unsuitable))
        records.append(record(14, "released", by="gate", reason="r", unsuitable=unsuitable))
    stamp = (BEGAN + timedelta(seconds=14.1)).timestamp()
    records.append(record(14.1, "stopped", unsuitable=unsuitable, clock_s=stamp))
    records.append(
        record(
            20, "finished", domain="web", on="bob", exit_status=0, held_s=held_s, downtime_s=downtime_s,
            total_s=total_s, unsuitable_at_pause=unsuitable, answering="yes",
        )
    )  # fmt: skip
    return Journey(
        source="alice", destination="bob", records=tuple(records), wan={"begin": 0, "end": 1 << 20}
    )


def _verdict(at_s: float, port: int, word: str) -> Record:
    return record(
        at_s, "connection", client=f"10.77.0.1:{1000 + port}", server="10.77.0.10:80", protocol="http",
        verdict=word, reason="x",
    )  # fmt: skip


def clients(delayed: int = 0) -> Felt:
    seen = Burstiness(mean=10.0, variance=100.0, zero_share=0.3, peak=30)
    return Felt(
        seconds=30.0, requests=600, failed=0, good_tolerable=1.0, delayed=delayed,
        delayed_share=delayed / 600, worst_s=2.0, outstanding=seen,
    )  # fmt: skip


def trial(kind: str, run: int = 1, **story: Any) -> Trial:
    one = None if kind == NONE else journey(**story)
    return Trial(run=run, kind=kind, load=clients(), journey=one, counts=((10.0, 2.0), (0.0, 1.0)))


def found(plan: MigratePlan, *trials: Trial) -> dict[str, Any]:
    return {one.name: one for one in figures(plan, trials)}


def test_plain_and_gated_take_turns_at_being_first() -> None:
    plan = MigratePlan()
    assert [order(plan, run)[0] for run in (1, 2, 3)] == [PLAIN, GATED, PLAIN]
    assert all(sorted(order(plan, run)) == sorted((PLAIN, GATED, NONE)) for run in (1, 2))


def test_pauses_are_spread_over_a_cycle_of_the_bursts() -> None:
    offsets = [MigratePlan(runs=3).offset_s(run) for run in (1, 2, 3)]
    assert [int(offset / (CYCLE_S / 3)) for offset in offsets] == [0, 1, 2]


def test_adaptive_gets_no_more_time_than_backoff_took() -> None:
    plan = MigratePlan(policy="both", load="steady")
    assert all(order(plan, run).index(BACKOFF) < order(plan, run).index(GATED) for run in (1, 2))
    before = [
        trial(BACKOFF, run=1, unsuitable=3, held_s=12.5),
        trial(BACKOFF, run=2, unsuitable=3, held_s=33),
    ]
    assert options(plan, 1, GATED, before)[:4] == ["--policy", "adaptive", "--max-wait", "12.5s"]
    assert options(plan, 1, BACKOFF, [])[:4] == ["--policy", "backoff", "--max-wait", "40s"]
    assert options(plan, 1, PLAIN, before) == ["--policy", "immediate"]


def test_the_agreed_figures_are_all_there() -> None:
    told = found(
        MigratePlan(), trial(PLAIN, unsuitable=14), trial(GATED, unsuitable=0, held_s=5.0), trial(NONE)
    )
    assert set(told) >= NAMES
    assert all(told[name].n == 1 for name in NAMES)
    assert told["unsuitable_at_pause_gated"].peer == 14


@pytest.mark.parametrize(("counts", "ok"), [((0, 1), True), ((1, 2), False)])
def test_gated_may_hit_one_connection_on_average(counts: tuple[int, int], ok: bool) -> None:
    trials = [trial(GATED, unsuitable=count, held_s=5.0) for count in counts]
    told = found(MigratePlan(), trial(PLAIN, unsuitable=14), *trials)
    assert told["unsuitable_at_pause_gated"].ok is ok


def test_waiting_is_not_counted_as_growth_but_everything_else_is() -> None:
    plain = trial(PLAIN, unsuitable=9, total_s=20.0)
    fine = found(MigratePlan(), plain, trial(GATED, unsuitable=0, held_s=30.0, total_s=51.0))
    assert fine["total_without_hold_gated_vs_plain"].ok is True
    slow = found(MigratePlan(), plain, trial(GATED, unsuitable=0, held_s=30.0, total_s=53.0, downtime_s=0.6))
    assert slow["total_without_hold_gated_vs_plain"].ok is False
    assert slow["downtime_gated_vs_plain"].ok is False
    late = found(MigratePlan(), plain, trial(GATED, unsuitable=0, held_s=41.0, total_s=61.0))
    assert late["held_s_gated"].ok is False


def test_a_steady_load_is_judged_by_the_lowest_counts_seen_while_waiting() -> None:
    plan = MigratePlan(policy="both", load="steady")
    told = found(
        plan,
        trial(PLAIN, unsuitable=9),
        trial(BACKOFF, unsuitable=4, held_s=5.0),
        trial(GATED, unsuitable=5, held_s=5.0),
    )
    assert told["waiting_with_fewer_share_gated"].value == 0
    assert told["waiting_with_fewer_share_gated"].ok is True
    assert told["unsuitable_at_pause_gated"].goal is None
    assert told["adaptive_vs_backoff"].ok is False


def test_a_release_that_misses_its_moment_shows() -> None:
    late = trial(GATED, unsuitable=2, held_s=5.0)
    assert late.release is not None
    assert late.release.latency_ms == pytest.approx(100)
    assert late.as_dict()["release"]["unsuitable_decided"] == 2


# --- what clients felt ------------------------------------------------------------------------


def test_only_requests_within_the_stretch_count() -> None:
    def page(start_s: float, took_s: float) -> Request:
        return Request(
            session=1, connection=1, kind="page", url="/p", start_s=start_s, first_byte_s=None,
            end_s=start_s + took_s, count_bytes=10, status=200,
        )  # fmt: skip

    requests = (page(0, 4.0), page(10, 0.1), page(11, 0.1), page(12, 0.5))
    told = felt(LoadResult(requests=requests, begin_s=0.0, end_s=20.0), 9.0)
    assert (told.requests, told.failed, told.delayed, told.worst_s) == (3, 0, 1, 0.5)


def test_the_demo_says_when_plain_libvirt_was_lucky() -> None:
    def half(unsuitable: int, **story: Any) -> Half:
        one = journey(unsuitable, **story)
        return Half(journey=one, timeline=one.timeline, felt=clients())

    lucky, usual, gated = half(0), half(14), half(0, held_s=5.0)
    assert "lucky" in sentence(lucky, gated)
    assert "lucky" not in sentence(usual, gated)
    table = {name: (plain, other) for name, plain, other in rows(usual, gated)}
    assert table["connections unsuitable at the pause"] == ("14", "0")
    assert table["held back until then"] == ("–", "5.0 s")


# --- the command line: bad words touch nothing -------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["migrate", "--load", "wild"],
        ["migrate", "--policy", "immediate"],
        ["migrate", "--runs", "0"],
        ["migrate", "--sessions", "-1"],
        ["migrate", "--rate", "100"],
        ["migrate", "--rtt", "soon"],
        ["hold", "--hold", "0s"],
        ["hold", "--migrations", "0"],
        ["hold", "--sessions", "100000"],
    ],
)
def test_words_out_of_range_are_refused_before_anything_is_made(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was begun")

    monkeypatch.setattr("virtgrid.bench.migrate.measure", never)
    monkeypatch.setattr(holding, "measure", never)
    monkeypatch.setattr("virtgrid.cli.bench.require_possible", never)
    assert CliRunner().invoke(app, words).exit_code == 2
