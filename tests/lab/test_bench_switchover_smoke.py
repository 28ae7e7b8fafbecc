"""The switchover bench, with as little as tells something: all figures, and no ping lost where flipped."""

from __future__ import annotations

import pytest

from virtgrid.bench.switchover import KINDS, SwitchoverPlan, measure

pytestmark = [pytest.mark.lab]


def test_the_bench_has_all_its_figures(lab_possible: None) -> None:
    told: list[str] = []
    plan = SwitchoverPlan(runs=1, rate_bytes_s=125e6, rtt_s=0.01, client_rtt_s=0.0)
    found = measure(plan, told.append)
    by_name = {one.name: one for one in found.figures}
    for figure in ("pings_lost", "stall_established_ms", "stall_new_ms", "pause_ms", "unsuitable"):
        for kind in KINDS:
            assert by_name[f"{figure}_{kind}"].value is not None, (figure, kind, told)
    assert by_name["migrations_failed"].value == 0
    assert by_name["pings_lost_flip"].value == 0
    assert by_name["pings_lost_drain"].value == 0
    assert (by_name["pings_lost_plain"].value or 0) > 0
