"""The live view of connections shows what hurts first, fits the screen, and passes no control characters."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from virtgrid.cli.track import selection
from virtgrid.core.errors import UsageError
from virtgrid.report.tracking import ORDERS, Scene, Selection, change_line, count_line, render
from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import ConnectionView, Snapshot, Verdict


def view(port: int, verdict: str = "suitable", **more: object) -> ConnectionView:
    known = {
        "client": f"192.0.2.9:{port}",
        "server": "192.0.2.1:80",
        "protocol": "http",
        "state": "idle",
        "verdict": Verdict(verdict),
        "reason": "keep-alive, nothing outstanding",
        "since_s": 90.0,
    }
    return ConnectionView(**{**known, **more})  # type: ignore[arg-type]


def scene(*connections: ConnectionView, **more: object) -> Scene:
    known = {"domain": "web", "tap": "vnet0", "capture": "ebpf", "elapsed_s": 12.0, "dropped": 0}
    return Scene(**{**known, **more}, snapshot=Snapshot(at_s=100.0, connections=connections))  # type: ignore[arg-type]


def screen(one: Scene, chosen: Selection | None = None, *, width: int = 150, height: int = 20) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height, markup=False)
    console.print(render(one, chosen or Selection(), width=width, height=height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_who_waits_longest_stands_first() -> None:
    lines = screen(
        scene(
            view(1, "suitable", since_s=10.0),
            view(2, "unsuitable", since_s=98.0),
            view(3, "unknown", since_s=20.0),
            view(4, "unsuitable", since_s=30.0),
        )
    )
    assert [line.split()[0] for line in lines[1:6]] == [
        "VERDICT", "unsuitable", "unsuitable", "unknown", "suitable",
    ]  # fmt: skip
    assert "192.0.2.9:4" in lines[2]
    assert "1m10s" in lines[2]


def test_the_first_line_counts_all_whatever_is_shown() -> None:
    one = scene(view(1), view(2, "unsuitable"), view(3, "unknown"), dropped=7)
    assert count_line(one) == (
        "web on vnet0: 3 connections, 1 unsuitable, 1 unknown   capture ebpf   12.0 s   7 frames lost"
    )
    lines = screen(one, Selection(verdicts=frozenset({"unsuitable"})))
    assert lines[0] == count_line(one)
    assert lines[-1] == "1 of 3 shown   [q] quit"
    assert len(lines) == 4


def test_filters_take_protocol_verdict_and_network() -> None:
    one = Snapshot(
        at_s=100.0,
        connections=(
            view(1),
            view(2, protocol="ftp"),
            view(3, "unsuitable"),
            view(4, client="[2001:db8::7]:4"),
            view(5, client="198.51.100.7:5"),
        ),
    )

    def ports(**options: list[str]) -> list[str]:
        words = {"protocols": [], "verdicts": [], "clients": [], **options}
        return [c.client.rpartition(":")[2] for c in selection(**words, order="client").chosen(one)]

    assert sorted(ports()) == ["1", "2", "3", "4", "5"]
    assert ports(protocols=["ftp"]) == ["2"]
    assert ports(verdicts=["unsuitable", "unknown"]) == ["3"]
    assert ports(clients=["2001:db8::/32", "198.51.100.7"]) == ["5", "4"]
    assert ports(clients=["192.0.2.0/24"], protocols=["http"], verdicts=["suitable"]) == ["1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"order": "colour"}, "--sort: 'colour' is none of verdict"),
        ({"verdicts": ["fine"]}, "--verdict: 'fine' is none of suitable"),
        ({"clients": ["somewhere"]}, "--client: 'somewhere' does not"),
    ],
)
def test_an_option_that_means_nothing_is_refused_with_what_would(words: dict[str, object], said: str) -> None:
    known = {"protocols": [], "verdicts": [], "clients": [], "order": "verdict"}
    with pytest.raises(UsageError) as error:
        selection(**{**known, **words})  # type: ignore[arg-type]
    assert error.value.what.startswith(said)


@given(
    count=st.integers(0, 300),
    width=st.integers(40, 220),
    height=st.integers(4, 60),
    order=st.sampled_from(sorted(ORDERS)),
    reason=st.text(max_size=80),
)
def test_the_screen_is_never_larger_than_the_terminal(
    count: int, width: int, height: int, order: str, reason: str
) -> None:
    connections = [
        view(port, list(Verdict)[port % 3], reason=reason, client=f"[2001:db8:aaaa:bbbb::{port:x}]:{port}")
        for port in range(count)
    ]
    lines = screen(scene(*connections), Selection(order=order), width=width, height=height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width for line in lines)
    assert "\x1b" not in "".join(lines)


def test_a_narrow_terminal_gives_up_counters_before_the_reason() -> None:
    narrow = screen(scene(view(1, "unsuitable", reason="response, 3.1 KiB left")), width=60)
    assert "REASON" in narrow[1]
    assert "RECEIVED" not in narrow[1]
    assert "response, 3.1" in narrow[2]
    wide = screen(scene(view(1, "unsuitable", reason="response, 3.1 KiB left")), width=160)
    assert "RECEIVED" in wide[1]


def test_what_does_not_fit_is_counted() -> None:
    lines = screen(scene(*(view(port) for port in range(50))), height=10)
    assert lines[-1] == "and 45 more below   [q] quit"
    assert len(lines) == 8


def test_an_empty_screen_says_why() -> None:
    assert "no TCP connection seen yet" in screen(scene())[1]
    assert (
        "no connection that is asked for" in screen(scene(view(1)), Selection(protocols=frozenset({"x"})))[1]
    )


def test_a_change_is_one_line_without_control_characters() -> None:
    change = Change(
        1.0, "192.0.2.9:1", "192.0.2.1:80", "http", "unsuitable", "waiting for\x1b[31m GET /\n", "busy"
    )
    line = change_line(change, "12:00:00.000")
    assert line.startswith("12:00:00.000 unsuitable http     192.0.2.9:1 → 192.0.2.1:80  waiting for")
    assert line.isprintable()
    assert Selection(verdicts=frozenset({"unsuitable"})).wants(change)
    ended = change._replace(verdict="closed")
    assert Selection(verdicts=frozenset({"unsuitable"})).wants(ended)
    assert not Selection(protocols=frozenset({"ftp"})).wants(ended)
