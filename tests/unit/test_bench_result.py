"""Figures are honest: a goal is met by what was measured, never by what is missing."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from virtgrid.bench.result import (
    COLUMNS,
    Result,
    at_least,
    at_most,
    figure,
    ratio,
    rows,
    shown,
)
from virtgrid.bench.where import environment


def test_a_figure_has_value_spread_and_number_of_its_samples() -> None:
    found = figure("x", [1.0, None, 4.0, 10.0], "s", of=statistics.median)
    assert (found.value, found.spread, found.n, found.ok) == (4.0, (1.0, 10.0), 3, None)


def test_nothing_measured_meets_no_goal() -> None:
    found = figure("x", [None, math.nan], goal=at_most(5))
    assert (found.value, found.spread, found.n, found.ok) == (None, None, 0, False)
    assert ratio("r", found, found, goal=at_most(1)).ok is False


@pytest.mark.parametrize(("value", "met"), [(150.0, True), (150.1, False)])
def test_a_goal_is_judged_on_the_value(value: float, met: bool) -> None:
    found = figure("x", [value], "ms", goal=at_most(150, "ms, median"))
    assert (found.ok, found.goal) == (met, "≤ 150 ms, median")


def test_a_peer_gives_a_ratio() -> None:
    plain, gated = figure("p", [10.0, 14.0]), figure("g", [3.0], peer=12.0)
    assert gated.ratio == 0.25
    assert ratio("g_vs_p", gated, plain, goal=at_most(1)).value == 0.25


def test_the_json_has_the_agreed_form_and_no_infinities() -> None:
    found = Result(
        bench="hold",
        environment={"kernel": "6"},
        figures=(figure("held", [60.0], "s", goal=at_least(60)), figure("nothing", [])),
        raw={"runs": [1]},
    )
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(told) == {"bench", "environment", "figures", "raw"}
    fields = {"name", "value", "unit", "spread", "n", "peer", "ratio", "goal", "ok"}
    assert all(set(one) == fields for one in told["figures"])
    assert told["figures"][0]["spread"] == [60.0, 60.0]


def test_the_table_shows_what_was_missed() -> None:
    found = Result(bench="x", environment={}, figures=(figure("slow", [2.0, 3.0], goal=at_most(1)),))
    (row,) = rows(found)
    assert len(row) == len(COLUMNS)
    assert (row[1], row[3], row[-1]) == ("2.5", "2 … 3", "NO")
    assert [one.name for one in found.missed] == ["slow"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.12345, "0.123"), (12.0, "12"), (45678.4, "45,678"), (0.0, "0")]
)
def test_numbers_are_shown_with_the_digits_that_mean_something(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_the_environment_says_what_figures_depend_on() -> None:
    told = environment(rtt_s=0.1)
    assert {"kernel", "processors", "libvirt", "qemu", "load_before", "rtt_s"} <= set(told)
