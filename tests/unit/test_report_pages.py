"""The report as page and picture: self-contained, escaped, for every kind of end."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser

import pytest

from tests.unit.journals import KINDS, MONO_S, START, sample_journal
from virtgrid.core.events import Record
from virtgrid.report.figure import (
    Scale,
    build,
    choose_lanes,
    segments,
    spread,
    step_of,
    thin,
    unsuitable_series,
)
from virtgrid.report.html import render_comparison, render_html
from virtgrid.report.model import Lane, LaneSpan
from virtgrid.report.png import HEIGHT_PX, WIDTH_PX, render_png
from virtgrid.report.timeline import Timeline

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Tidy(HTMLParser):
    """Checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag


def tidy(page: str) -> set[str]:
    parser = Tidy()
    parser.feed(page)
    parser.close()
    assert parser.stack == []
    return parser.seen


def timeline(kind: str = "success", **more: object) -> Timeline:
    return Timeline.from_records(sample_journal(kind, **more), lambda pid, started: False)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_needs_neither_network_nor_script(kind: str) -> None:
    page = render_html(timeline(kind, clients=8))
    seen = tidy(page)
    assert "script" not in seen
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org)""", page)


def test_the_header_has_the_verdict_and_the_four_numbers() -> None:
    page = render_html(timeline())
    for expected in (
        "web1 runs on hostB",
        "29.9 s",
        "6.0 s",
        "158 ms",
        ">yes<",
        "tickled hold",
        "Who it waited for",
    ):
        assert expected in page


def test_a_plain_migration_names_whom_the_pause_hit() -> None:
    page = render_html(timeline("plain"))
    hit = page.partition("Not suitable when the guest was stopped")[2].partition("</table>")[0]
    assert hit.count("<tr><td>") == timeline("plain").unsuitable_at_pause


def test_nothing_of_a_journal_becomes_markup() -> None:
    evil = "\"><script>alert(1)</script><b x='&amp;\x1b[2J\u202e"
    records = [
        replace(r, fields={k: evil if isinstance(v, str) and k not in {"phase", "verdict"} else v
                           for k, v in r.fields.items()})
        for r in sample_journal("success", clients=4)
    ]  # fmt: skip
    page = render_html(Timeline.from_records(records))
    assert "script" not in tidy(page)
    assert "\x1b" not in page
    assert "\u202e" not in page
    page.encode()


def test_a_single_event_is_enough_for_a_report() -> None:
    tidy(render_html(Timeline.from_records(sample_journal()[:1])))
    tidy(render_html(Timeline.from_records([])))


@pytest.mark.parametrize("kind", ["success", "failed"])
def test_the_picture_has_its_size(kind: str) -> None:
    png = render_png(timeline(kind, clients=5))
    assert png.startswith(b"\x89PNG")
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == (WIDTH_PX, HEIGHT_PX)


def test_a_picture_of_strange_names_is_still_a_picture() -> None:
    records = sample_journal("success", clients=2)
    start = replace(records[0], fields={**records[0].fields, "domain": "$x_{$ 日本 \x00 [b]"})
    assert render_png(Timeline.from_records([start, *records[1:]])).startswith(b"\x89PNG")


def test_a_comparison_has_both_figures_and_the_rows_given() -> None:
    page = render_comparison(
        {"plain": timeline("plain"), "gated": timeline()},
        [("requests delayed", 17, 0, "of 900"), ("x", None, 1.5, "s")],
    )
    assert tidy(page) >= {"svg", "table"}
    assert page.count("<svg") == 2
    assert "requests delayed" in page
    assert re.search(r"stopped the guest while \d+ connections were unsuitable", page)
    with pytest.raises(ValueError, match="two"):
        render_comparison({"plain": timeline("plain")})


def test_a_short_hold_after_a_long_copy_gets_room() -> None:
    figure = build(timeline(storage_s=600.0, hold_s=4.0, clients=3))
    assert figure.hold is not None
    whole, pause = figure.panels
    assert whole.changes
    assert whole.scale.x(figure.hold[1]) - whole.scale.x(figure.hold[0]) > 0.3
    assert pause.scale.x(figure.hold[1]) < 0.5


def test_the_scale_keeps_the_order_of_time() -> None:
    scale = Scale(((0.0, 10.0, 0.0, 0.3), (10.0, 12.0, 0.3, 1.0)))
    positions = [scale.x(t) for t in (-1, 0, 5, 10, 11, 12, 99)]
    assert positions == sorted(positions)
    assert positions[0] == 0.0
    assert positions[-1] == 1.0


def test_those_that_the_pause_hit_are_never_left_out() -> None:
    plain = timeline("plain")
    lanes, left_out = choose_lanes(plain, 12)
    stop = plain.stopped_s
    assert stop is not None
    hit = {
        lane.client
        for lane in plain.lanes
        for span in lane.spans
        if span.verdict != "suitable" and span.start_s <= stop and (span.end_s is None or span.end_s > stop)
    }
    assert hit <= {lane.client for lane in lanes}
    assert len(lanes) + left_out == len(plain.lanes)


def test_no_blip_disappears_from_a_lane() -> None:
    spans = tuple(
        LaneSpan(verdict=("suitable", "unsuitable")[i % 2], start_s=i * 1e-4, end_s=(i + 1) * 1e-4, reason="")
        for i in range(2000)
    )
    lane = Lane(client="c", server="s", protocol="http", spans=spans)
    drawn = segments(lane, Scale(((0.0, 1.0, 0.0, 1.0),)), finest=0.001)
    assert len(drawn) < 10
    assert {verdict for verdict, _, _ in drawn} == {"suitable", "unsuitable"}


def test_thinning_keeps_peaks_and_zeros() -> None:
    points = [(i / 100, 5.0) for i in range(20_000)]
    points[7_777] = (77.77, 0.0)
    points[8_888] = (88.88, 50.0)
    kept = thin(points, 100)
    assert len(kept) <= 400
    assert (77.77, 0.0) in kept
    assert (88.88, 50.0) in kept
    assert list(kept) == sorted(kept)


def test_the_curve_at_the_pause_agrees_with_the_count() -> None:
    plain = timeline("plain")
    assert plain.stopped_s is not None
    before = [value for t, value in unsuitable_series(plain) if t <= plain.stopped_s]
    assert before[-1] == plain.unsuitable_at_pause


def test_the_mean_is_over_time() -> None:
    steps = [(0.0, 4.0), (1.0, 0.0), (4.0, 8.0)]
    assert spread(steps, 0.0, 4.0) == (0.0, 1.0, 8.0)
    assert spread(steps, 2.0, 3.0) == (0.0, 0.0, 0.0)
    assert spread([], 0.0, 4.0) is None
    assert spread(steps, 4.0, 4.0) is None


def test_ticks_are_round_and_few() -> None:
    assert step_of(6.0, 6) == 1
    assert step_of(4000.0, 8) == 600


def test_a_large_journal_gives_a_page_of_modest_size() -> None:
    records = sample_journal(clients=3)
    end = records[-1]
    more = [
        Record(
            at=START + timedelta(seconds=1 + i / 2000),
            mono_s=MONO_S + 1 + i / 2000,
            event="connection",
            fields={
                "client": f"10.0.{i % 200}.1:99", "server": "s:80", "protocol": "http", "reason": "x",
                "verdict": ("suitable", "unsuitable")[(i // 200) % 2],
            },
        )
        for i in range(10_000)
    ]  # fmt: skip
    page = render_html(Timeline.from_records([*records[:-1], *more, end]))
    assert len(page) < 1_500_000
