"""Scoring what clients felt, by the paper's limits and by a strict modern one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.lab.load import qos, records
from virtgrid.lab.load.records import Request


def request(
    took_s: float, *, start_s: float = 0.0, kind: str = "page", url: str = "/p", size: int = 1000,
    session: int = 0, error: str | None = None,
) -> Request:  # fmt: skip
    return Request(
        session=session, connection=1, kind=kind, url=url, start_s=start_s, first_byte_s=start_s,  # type: ignore[arg-type]
        end_s=start_s + took_s, count_bytes=size, status=0 if error else 200, error=error,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("took_s", "grade"),
    [(0.1, "good"), (3.0, "good"), (3.1, "tolerable"), (5.0, "tolerable"), (5.1, "failed")],
)
def test_a_request_is_graded_by_its_time(took_s: float, grade: str) -> None:
    assert qos.grade(request(took_s)) == grade


@pytest.mark.parametrize(("bytes_s", "grade"), [(120e3, "good"), (97e3, "tolerable"), (90e3, "failed")])
def test_a_download_is_graded_by_its_rate(bytes_s: float, grade: str) -> None:
    assert qos.grade(request(40, kind="download", size=round(40 * bytes_s))) == grade


def test_no_answer_is_a_failure_however_quick() -> None:
    assert qos.grade(request(0.01, error="ConnectionResetError")) == "failed"
    assert qos.quality([request(1), request(9)]).good_tolerable == 0.5
    assert qos.quality([]).good_tolerable is None


def test_a_slow_page_is_not_delayed_when_it_always_takes_so_long() -> None:
    usual = [request(2.0, start_s=n, url="/slow") for n in range(20)]
    quick = [request(0.01, start_s=n, url="/img", kind="image") for n in range(20)]
    assert qos.delayed(usual + quick) == 0
    assert qos.delayed([*usual, *quick, request(2.3, url="/slow")]) == 1
    assert qos.delayed([*usual, *quick, request(0.2, url="/img", kind="image")]) == 1


def test_a_session_far_away_is_compared_with_itself() -> None:
    near = [request(0.01, session=1, start_s=n) for n in range(30)]
    far = [request(0.25, session=2, start_s=n) for n in range(9)]
    assert qos.delayed(near + far) == 0


def test_only_requests_that_overlap_the_window_count() -> None:
    asked = [request(1.0, start_s=float(n), url=f"/{n}") for n in range(10)]
    assert qos.quality(asked, (2.5, 3.5)).total == 2
    assert qos.quality(asked, (20, 30)).total == 0


def test_outstanding_requests_are_weighted_by_time() -> None:
    found = qos.burstiness([request(1.0, start_s=0.0), request(1.0, start_s=0.5)], (0.0, 2.0))
    assert found == qos.Burstiness(mean=1.0, variance=0.5, zero_share=0.25, peak=2)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0.001, 30), st.sampled_from(["page", "image", "download"])),
        max_size=40,
    )
)
def test_scores_are_consistent_whatever_happened(raw: list[tuple[float, float, str]]) -> None:
    asked = [request(took_s, start_s=start_s, kind=kind) for start_s, took_s, kind in raw]
    found = qos.quality(asked)
    assert found.total == len(asked)
    small = [one for one in asked if one.kind != "download"]
    assert 0 <= qos.delayed(asked) <= len(small)
    outstanding = qos.burstiness(asked, (0.0, 100.0))
    assert 0 <= outstanding.mean <= outstanding.peak <= len(small)
    assert 0 <= outstanding.zero_share <= 1.0 + 1e-9


def test_records_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    asked = [request(1.0), request(2.0, error="x")]
    records.write(tmp_path / "r.jsonl", asked)
    assert records.read(tmp_path / "r.jsonl") == asked
