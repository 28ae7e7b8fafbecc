"""Whether and how long to drain: by what was under way lately, and how long it took."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.migration.drain import STOPS_AFTER_S, DrainConfig, Spells, decide
from virtgrid.tracker.changes import Change

CONFIG = DrainConfig()


def change(at_s: float, port: int, verdict: str, state: str = "") -> Change:
    return Change(at_s, f"10.0.0.9:{port}", "10.0.0.1:80", "http", verdict, "", state)


def seen(took: list[float], *, now: int = 1) -> Spells:
    """Requests one after the other, each for so long; as many under way at every look."""
    spells = Spells().look(0.0, now, [])
    at_s = 0.0
    for port, spell_s in enumerate(took):
        changes = [change(at_s, port, "unsuitable"), change(at_s + spell_s, port, "suitable")]
        at_s += spell_s
        spells = spells.look(at_s, now, changes)
    return spells


def test_requests_that_end_soon_are_drained_for_as_long_as_most_of_them_take() -> None:
    found = decide(seen([0.01] * 9 + [0.05]), 1, CONFIG)
    assert found.for_s == pytest.approx(0.01)
    assert "90%" in found.reason or "100%" in found.reason
    assert found.lead_s == 0.0, "QEMU takes longer than that to stop the guest"
    longer = decide(seen([0.15] * 10), 1, CONFIG)
    assert longer.for_s == pytest.approx(0.15)
    assert longer.lead_s == pytest.approx(0.15 - STOPS_AFTER_S)


def test_nobody_waits_where_nobody_would_be_caught() -> None:
    found = decide(seen([0.01] * 10, now=0), 0, CONFIG)
    assert (found.for_s, found.lead_s) == (0.0, 0.0)
    assert "caught" in found.reason


def test_a_quiet_moment_in_a_busy_time_is_drained_all_the_same() -> None:
    assert decide(seen([0.02] * 10, now=4), 0, CONFIG).for_s > 0


def test_requests_longer_than_a_drain_may_be_are_not_waited_for() -> None:
    found = decide(seen([3.0] * 3 + [0.01] + [0.3] * 6), 2, CONFIG)
    assert found.for_s == 0.0
    assert "only 10%" in found.reason


def test_with_too_few_requests_seen_nothing_is_known() -> None:
    assert "not known" in decide(seen([0.01] * 3), 3, CONFIG).reason
    assert decide(Spells(), 3, CONFIG).for_s == 0.0


def test_what_was_long_ago_is_forgotten() -> None:
    spells = seen([0.01] * 10)
    later = [change(99.0, 1, "unsuitable"), change(99.01, 1, "suitable")]
    assert len(spells.look(100.0, 1, later).ended) == 1


def test_a_spell_counts_when_it_was_seen_from_its_beginning_to_a_good_end() -> None:
    changes = [
        change(1.0, 1, "suitable"),  # its beginning was not seen
        change(1.0, 2, "unsuitable"),
        change(1.1, 2, "unsuitable"),  # another reason, the same spell
        change(1.2, 2, "suitable"),
        change(1.0, 3, "unsuitable"),
        change(1.3, 3, "closed"),
        change(1.0, 4, "unsuitable"),
        change(1.0, 5, "unsuitable", "new"),  # being opened: no request yet
        change(1.9, 5, "suitable"),
    ]
    spells = Spells().look(2.0, 1, changes)
    assert spells.ended == ((1.2, pytest.approx(0.2)),)
    assert {connection[0] for connection, _ in spells.open} == {"10.0.0.9:4"}


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(0, 50))
def test_a_drain_is_never_longer_than_it_may_be(took: list[float], now: int) -> None:
    found = decide(seen(took, now=now), now, CONFIG)
    assert 0.0 <= found.for_s <= CONFIG.max_s
    assert 0.0 <= found.lead_s <= CONFIG.max_s
    assert found.reason
