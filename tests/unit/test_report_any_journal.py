"""Whatever stands in a journal, its readers do not fail on it, and nothing of it steers a terminal."""

from __future__ import annotations

import io
import json
import unicodedata
from datetime import timedelta
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.unit.journals import START
from virtgrid.cli.output import plain
from virtgrid.core.events import EVENTS, PHASES, Record
from virtgrid.report.figure import build
from virtgrid.report.fold import Fold
from virtgrid.report.html import render_html
from virtgrid.report.lines import PlainLines
from virtgrid.report.timeline import Timeline
from virtgrid.report.view import render_model

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [*PHASES, "suitable", "unsuitable", "unknown", "closed", "hold", "release", "hostA", "\x1b[2J"]
    ),
    st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(
        st.text(max_size=3), st.one_of(st.integers(), st.dictionaries(st.text(), st.text())), max_size=2
    ),
)


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    out = []
    t = 0.0
    for name in draw(st.lists(st.sampled_from(sorted(EVENTS)), max_size=14)):
        row = EVENTS[name]
        names = draw(st.sets(st.sampled_from(sorted(row.required | row.optional or {"x"}))))
        fields: dict[str, Any] = {field: draw(VALUES) for field in sorted(names)}
        t += draw(st.floats(-5, 50))
        out.append(Record(at=START + timedelta(seconds=t), mono_s=100 + t, event=name, fields=fields))
    return out


def harmless(text: str) -> bool:
    return not any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in text)


@settings(max_examples=60, deadline=None)
@given(records(), st.integers(1, 200))
def test_every_reader_survives(journal: list[Record], width: int) -> None:
    said: list[str] = []
    lines = PlainLines(said.append, monotonic_s=lambda: 1000.0)
    for record in journal:
        lines.on_record(record)
    lines.tick()
    assert all(harmless(line) for line in said)
    fold = Fold()
    for record in journal:
        fold.add(record)
    status = fold.status(lambda pid, started: False)
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None)
    console.print(render_model(status, status.last_s + 1, width=width))
    assert isinstance(console.file, io.StringIO)
    assert harmless(console.file.getvalue().replace("\n", ""))
    timeline = Timeline.from_records(journal)
    json.dumps(plain(timeline), allow_nan=False)
    assert len(build(timeline).count_ticks) <= 6
    page = render_html(timeline)
    page.encode()
    assert "\x1b" not in page
