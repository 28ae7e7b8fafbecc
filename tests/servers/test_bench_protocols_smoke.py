"""``virtgrid bench protocols`` from end to end, as short as it can be."""

from __future__ import annotations

import pytest

from virtgrid.bench.protocols import ARMS, ProtocolsPlan, measure

pytestmark = pytest.mark.lab


def test_every_arm_is_measured_and_no_client_fails(servers_possible: None) -> None:
    said: list[str] = []
    plan = ProtocolsPlan(protocols=("ftp",), rounds=1, sessions=4, max_wait_s=2.0)
    found = measure(plan, said.append)
    raw = found.raw["ftp"]
    assert raw["commands"] > 10
    # A held guest loses nothing: whoever waits is served when it runs again.
    assert raw["failed"] == 0
    assert {pause["arm"] for pause in raw["pauses"]} == set(ARMS)
    assert all(pause["lasted_s"] >= plan.pause_s for pause in raw["pauses"])
    assert all(pause["unsuitable"] is not None for pause in raw["pauses"])
    assert {one.n for one in found.figures} == {1}
    assert said
