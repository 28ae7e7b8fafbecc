"""Two clocks; the fake one lets an hour pass at once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from virtgrid.core.clock import FakeClock, SystemClock


async def test_sleeping_on_a_fake_clock_takes_no_time_and_moves_both_clocks() -> None:
    clock = FakeClock(datetime(2026, 1, 1, tzinfo=UTC))
    await clock.sleep(3600)
    clock.advance(0.5)
    assert clock.monotonic_s() == 3600.5
    assert clock.utc() == datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=1, seconds=0.5)


async def test_the_system_clock_speaks_utc_and_does_not_go_back() -> None:
    clock = SystemClock()
    before = clock.monotonic_s()
    await clock.sleep(0)
    assert clock.monotonic_s() >= before
    assert clock.utc().utcoffset() == timedelta(0)
