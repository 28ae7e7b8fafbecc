"""What holds for every text, number and record: units, journal lines."""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtgrid.core import journal as journals
from virtgrid.core import units
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import UsageError, VirtgridError
from virtgrid.core.events import EVENTS
from virtgrid.core.journal import Journal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def events(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Any event of the vocabulary with any values in its fields."""
    name = draw(st.sampled_from(sorted(EVENTS)))
    row = EVENTS[name]
    optional = draw(st.sets(st.sampled_from(sorted(row.optional)))) if row.optional else set()
    return name, {field: draw(JSON) for field in sorted(row.required | optional)}


@given(st.lists(events(), max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(said: list[tuple[str, dict[str, Any]]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "j.jsonl"
        with Journal(path, clock := FakeClock()) as journal:
            for name, fields in said:
                clock.advance(0.25)
                journal.write(name, **fields)
        records = journals.read(path)
    assert [(record.event, dict(record.fields)) for record in records] == said
    assert [record.mono_s for record in records] == [0.25 * (n + 1) for n in range(len(said))]


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_file_of_anything_is_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "j.jsonl"
        path.write_bytes(data)
        with contextlib.suppress(VirtgridError):
            journals.read(path)


@given(st.text(max_size=40))
def test_any_text_is_a_quantity_or_a_usage_error(text: str) -> None:
    for parse in (units.parse_rate, units.parse_duration, units.parse_size):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert value >= 0


@given(
    st.text(alphabet="0123456789", min_size=290, max_size=400), st.sampled_from(["", "d", "gbit", "t", "ms"])
)
def test_a_number_of_any_length_is_a_finite_quantity_or_a_usage_error(digits: str, unit: str) -> None:
    for parse in (units.parse_rate, units.parse_duration, units.parse_size):
        try:
            value = parse(digits + unit)
        except UsageError:
            continue
        assert math.isfinite(value)


@given(st.integers(0, 1 << 60))
def test_a_size_for_people_is_read_back_within_its_rounding(size: int) -> None:
    back = units.parse_size(units.format_size(size))
    assert back == pytest.approx(size, rel=0.051, abs=0)


@given(st.floats(min_value=0.001, max_value=86400 * 30))
def test_a_duration_for_people_is_never_empty_and_has_no_60(seconds: float) -> None:
    text = units.format_duration(seconds)
    assert text
    assert "m60s" not in text
    assert "h60m" not in text
    assert text not in ("1000 ms", "60.0 s")


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_no_reference_reads_outside_of_the_directory(reference: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        inside = Path(directory) / "migrations"
        inside.mkdir()
        (Path(directory) / "outside.jsonl").write_text("{}")
        with pytest.raises(VirtgridError):
            journals.find(reference, inside)
