"""The demo works: two migrations under load, told side by side, and nothing left of its lab."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtgrid.core import journal
from virtgrid.lab import demo
from virtgrid.lab.layout import Layout
from virtgrid.report.lines import PlainLines

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]


def test_the_demo_shows_both_migrations_and_leaves_a_report(lab_possible: None, tmp_path: Path) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def watching() -> Iterator[demo.Watcher]:
        yield PlainLines(said.append)

    plan = demo.DemoPlan(sessions=10, rate_bytes_s=125e6, rtt_s=0.0)
    plain, gated, lab = demo.play(plan, said.append, watching)

    assert (plain.journey.source, gated.journey.source) == ("alice", "bob")
    assert plain.timeline.hold is None
    assert gated.timeline.hold is not None
    for half in (plain, gated):
        assert half.timeline.answering == "yes"
        assert half.timeline.unsuitable_at_pause is not None
        assert half.felt.requests > 0
    assert any("guest stopped on the source" in line for line in said)
    assert len(demo.rows(plain, gated)) == 9

    written = demo.write_report(tmp_path / "report", plain, gated)
    assert (tmp_path / "report" / "demo.html").read_text().count("<svg") >= 2
    assert {path.name for path in written if path.suffix == ".png"} == {"demo-plain.png", "demo-gated.png"}
    assert journal.read(tmp_path / "report" / "demo-gated.jsonl")[-1].event == "finished"
    assert not Layout.of(lab).root.exists()
