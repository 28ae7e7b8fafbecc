"""The figures of ``bench sandbox`` are made from its samples as they are, goals missed included."""

from __future__ import annotations

from virtgrid.bench.result import Figure
from virtgrid.bench.sandbox import Crowd, Samples, SandboxPlan, figures


def _figures(samples: Samples, *, many: int = 64, leaks: tuple[str, ...] = ()) -> dict[str, Figure]:
    crowd = Crowd(up_s=9.0, down_s=3.0, memory_mib=(10.0, 11.0), leaks=leaks)
    return {one.name: one for one in figures(SandboxPlan(many=many), samples, crowd)}


def test_every_figure_of_the_contract_is_there() -> None:
    names = "up_ms up_vs_lxc_start up_staged_ms dead_ms done_ms up64_s down64_s leaks memory_mib"
    assert {*names.split(), "hook_overhead_share"} <= _figures(Samples()).keys()


def test_medians_and_ratios() -> None:
    found = _figures(
        Samples(up=[100, 110, 500], lxc=[50, 60, 70], bare=[100], without_hook=[50, 50], with_hook=[60, 60]),
        leaks=("mount x",),
    )
    assert (found["up_ms"].value, found["up_ms"].ok) == (110, True)
    assert found["up_vs_lxc_start"].ok is False
    assert found["up_vs_libvirt_bare"].value == 1.1
    assert round(found["hook_overhead_share"].value, 3) == 0.2
    assert found["hook_overhead_share"].ok is False
    assert (found["leaks"].value, found["leaks"].ok) == (1, False)


def test_nothing_measured_meets_no_goal_and_a_small_crowd_has_none() -> None:
    found = _figures(Samples(), many=8)
    assert found["up_ms"].ok is False
    assert found["hook_overhead_share"].ok is False
    assert found["up8_s"].goal is None
