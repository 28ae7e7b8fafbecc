"""Text to bytes and seconds as people write them; what could mean two things is refused."""

from __future__ import annotations

import pytest

from virtgrid.core import units
from virtgrid.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "bytes_s"),
    [
        ("100mbit", 12.5e6),
        ("1Gbit", 125e6),
        ("8kbit", 1000),
        ("12mbps", 12e6),
        ("1.5 gbps", 1.5e9),
        ("8bit", 1),
    ],
)
def test_rates_are_tc_s(text: str, bytes_s: float) -> None:
    assert units.parse_rate(text) == pytest.approx(bytes_s)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("100ms", 0.1),
        ("40s", 40),
        ("5m", 300),
        ("5min", 300),
        ("2h", 7200),
        ("1d", 86400),
        ("7", 7),
        (" 1.5 s ", 1.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4MiB", 4 << 20),
        ("8G", 8 << 30),
        ("1k", 1024),
        ("1kB", 1000),
        ("1.5KiB", 1536),
        ("17", 17),
        ("2t", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["100", "", "mbit", "-1mbit", "1e3mbit", "1,5mbit", "10 m bit", "10mib", "nan", "inf"]
)
def test_what_is_no_rate_is_refused_and_the_units_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate") as caught:
        units.parse_rate(text)
    assert "mbit" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 week", "1:30", "nan", "inf", "1s2", "٣٣x"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        units.parse_duration(text)


@pytest.mark.parametrize("text", ["", "4XB", "-4MiB", "four", "4 Mi B", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0414, "41 ms"),
        (4.21, "4.2 s"),
        (70, "1m10s"),
        (7380, "2h03m"),
        (59.96, "1m00s"),
        (0.9996, "1.0 s"),
        (3600, "1h00m"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3_250_586, "3.1 MiB"),
        (8 << 30, "8.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (1023.7, "1.0 KiB"),
        (1048575, "1.0 MiB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert units.format_size(size) == text


def test_a_time_says_its_zone() -> None:
    assert units.parse_time("2026-11-27T10:00Z") == units.parse_time("2026-11-27T19:00:00+09:00")
    assert units.format_time(units.parse_time("2026-11-27T10:00Z")) == "2026-11-27T10:00:00Z"


@pytest.mark.parametrize("text", ["2026-11-27T10:00", "2026-11-27", "tomorrow", "", "2026-13-01T00:00Z"])
def test_a_time_without_a_zone_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        units.parse_time(text)
