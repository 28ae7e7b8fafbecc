"""The live view and the plain lines: what a person sees while a migration runs."""

from __future__ import annotations

import io
import itertools
import re
from datetime import timedelta

import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.unit.journals import KINDS, MONO_S, START, sample_journal
from virtgrid.core.events import Record
from virtgrid.report.fold import Fold
from virtgrid.report.lines import EVERY_S, PlainLines
from virtgrid.report.view import LiveView, flow, render_model


def shown(records: list[Record], now_s: float | None = None, width: int = 80, keys: bool = True) -> str:
    fold = Fold()
    for record in records:
        fold.add(record)
    status = fold.status()
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(render_model(status, status.last_s if now_s is None else now_s, width=width, keys=keys))
    return capture.get()


def until(t: float, kind: str = "success") -> list[Record]:
    return [record for record in sample_journal(kind) if record.mono_s <= MONO_S + t]


def test_phases_carry_their_marks() -> None:
    text = shown(until(17.0))
    assert "✓ storage copy  256.0 MiB in sync" in text
    assert "● precopy" in text
    assert "○ holding" in text


def test_holding_says_how_long_of_how_long_and_for_whom() -> None:
    text = shown(until(24.0))
    assert re.search(r"● holding +2\.\d s of 30 s   strict   \d+ of 60 connections suitable", text)
    rows = [line for line in text.splitlines() if line.startswith("      un")]
    assert len(rows) == 5
    assert all(re.search(r"http 10\.9\.0\.\d:\d+  response, \d+ KiB left   \d", row) for row in rows)
    assert re.search(r"and \d+ more", text)
    assert "[r] release now   [a] abort   [d] detach" in text


def test_release_is_offered_only_while_holding() -> None:
    assert "[r]" not in shown(until(8.0))
    assert "[a] abort" in shown(until(8.0))
    assert "[a]" not in shown(until(8.0), keys=False)


def test_percent_is_shown_for_the_storage_and_the_first_pass_only() -> None:
    assert "50 %" in shown(until(7.8))
    assert "%" in shown(until(17.0))
    assert "%" not in shown(until(21.4))
    assert "%" not in shown(until(24.0))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_no_line_is_wider_than_the_terminal(kind: str, width: int) -> None:
    for t in (0.0, 5.0, 17.0, 24.0, 99.0):
        for line in shown(until(t, kind), width=width).splitlines():
            assert cell_len(line) <= width


def test_the_end_is_a_sentence() -> None:
    assert "web1 runs on hostB. Guest stopped 158 ms; held 6.0 s" in shown(
        sample_journal("success"), width=120
    )
    failed = shown(sample_journal("failed"), width=120)
    assert "✗ storage copy" in failed
    assert "web1 runs on hostA. Migration failed: the destination stopped answering" in failed


def test_a_plain_migration_shows_no_hold() -> None:
    assert "holding" not in shown(until(17.0, "plain"))


def test_text_from_the_wire_is_neither_markup_nor_control_sequence() -> None:
    records = until(24.0)
    last = records[-1]
    fields = {
        "client": "[red]10.0.0.9:1[/red]", "server": "s:80", "protocol": "\x1b]0;owned\x07http",
        "verdict": "unsuitable", "reason": "\x1b[2J[link=http://x]GET /\r\nX[/link]",
    }  # fmt: skip
    early = Record(at=START, mono_s=MONO_S + 0.05, event="connection", fields=fields)
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    fold = Fold()
    for record in (records[0], early, *records[1:]):
        fold.add(record)
    console.print(render_model(fold.status(), last.mono_s - MONO_S, width=120))
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert "[red]10.0.0.9:1[/red]" in re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert not re.search(r"\x1b(?!\[[0-9;]*m)", out), "only rich's own colours may leave"
    assert "\x07" not in out
    assert "\r" not in out


def test_facts_flow_into_lines_that_fit() -> None:
    assert flow(["aaa", "bbb", "ccc"], width=14, indent=2) == ["aaa   bbb", "ccc"]
    assert flow([], width=14) == []


def test_the_view_is_redrawn_at_most_ten_times_a_second() -> None:
    now = [MONO_S]
    drawn = 0

    class Counting(LiveView):
        def render(self):  # type: ignore[no-untyped-def]
            nonlocal drawn
            drawn += 1
            return super().render()

    console = Console(width=80, height=40, file=io.StringIO(), force_terminal=True)
    with Counting(console, monotonic_s=lambda: now[0], min_interval_s=0.0) as view:
        for record in until(24.0):
            now[0] = record.mono_s
            view.on_record(record)
        while_running = drawn
    assert while_running <= 24.0 / 0.1 + 1
    assert view.status.hold is not None


def test_a_view_without_records_is_empty() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    with LiveView(console) as view:
        view.tick()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_never_stay_silent_for_long(kind: str) -> None:
    out: list[str] = []
    now = [MONO_S]
    lines = PlainLines(out.append, monotonic_s=lambda: now[0])
    told: list[float] = []
    for record in sample_journal(kind):
        now[0] = record.mono_s
        before = len(out)
        lines.on_record(record)
        lines.tick()
        if len(out) > before:
            told.append(record.mono_s)
    assert out[0].endswith(": hostA → hostB, policy immediate, 20261122T014412-web1") or "strict" in out[0]
    assert max(b - a for a, b in itertools.pairwise(told)) <= EVERY_S + 1.0


def test_a_silent_step_is_told_by_tick_alone_and_not_too_often() -> None:
    out: list[str] = []
    now = [MONO_S]
    lines = PlainLines(out.append, monotonic_s=lambda: now[0])
    for record in until(16.0):
        lines.on_record(record)
    before = len(out)
    for second in range(16, 37):
        now[0] = MONO_S + second
        lines.tick()
    news = out[before:]
    assert 3 <= len(news) <= 4
    assert all("precopy: iteration 1" in line for line in news)


def test_lines_name_what_matters() -> None:
    out: list[str] = []
    lines = PlainLines(out.append)
    for record in sample_journal("success"):
        lines.on_record(record)
    text = "\n".join(out)
    for expected in (
        "check cpu: WARN",
        "(checks: 3 ok, 1 warning)",
        "storage copy:",
        "hold: tickled",
        "released by gate",
        "guest stopped on the source",
        "guest runs on hostB after 158 ms",
        "guest answering: yes (ping",
        "web1 runs on hostB. Guest stopped 158 ms",
    ):
        assert expected in text
    assert len(out) < 40


def with_a_name(state: str) -> list[Record]:
    """A migration that arrived, its name in this state at the end."""
    *records, end = sample_journal("success")
    told = {"name": "web.example.org", "state": state, "text": f"web.example.org is {state}"}
    changed = Record(at=end.at, mono_s=end.mono_s, event="name_changed", fields=told)
    hint = {"name_state": state, "hint": "virtgrid migration recover X --yes"} if state != "settled" else {}
    return [
        *records,
        changed,
        Record(at=end.at, mono_s=end.mono_s, event="finished", fields={**end.fields, **hint}),
    ]


def test_a_name_that_did_not_follow_is_told_with_what_mends_it() -> None:
    missed, followed = shown(with_a_name("lowered")), shown(with_a_name("settled"))
    assert "web.example.org was NOT pointed to it" in " ".join(missed.split())
    assert "hint: virtgrid migration recover X --yes" in missed
    assert "NOT" not in followed
    assert "hint" not in followed
    out: list[str] = []
    lines = PlainLines(out.append)
    for record in with_a_name("settled"):
        lines.on_record(record)
    assert any(line.endswith("web.example.org is settled") for line in out)


def test_lines_are_plain_text() -> None:
    out: list[str] = []
    lines = PlainLines(out.append)
    lines.on_record(sample_journal("success")[0])
    note = Record(
        at=START + timedelta(seconds=1), mono_s=MONO_S + 1, event="note", fields={"text": "a\nb\x1b[2Jc"}
    )
    lines.on_record(note)
    assert all(line.isprintable() for line in out)
