"""How the lab's link treats frames: rate, delay, queue, loss, cut. No clock: times are numbers here."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.core.errors import UsageError
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.wan import FRAMING_BYTES, Direction, LinkState, wire_bytes
from virtgrid.net.tap import VNET_HEADER_BYTES


def frame(length: int, *, header: int = 0, segment: int = 0) -> bytes:
    kind = 1 if segment else 0
    return struct.pack("<BBHHHH", 0, kind, header, segment, 0, 0) + bytes(length)


def test_a_plain_frame_costs_its_length_and_ethernets_framing() -> None:
    assert len(frame(0)) == VNET_HEADER_BYTES
    assert wire_bytes(frame(1514)) == 1514 + FRAMING_BYTES


def test_a_super_frame_costs_what_its_segments_would() -> None:
    payload, header, segment = 14480, 66, 1448
    assert wire_bytes(frame(header + payload, header=header, segment=segment)) == 10 * (
        header + segment + FRAMING_BYTES
    )


def test_a_super_frame_that_says_nonsense_costs_at_least_itself() -> None:
    assert wire_bytes(frame(10, header=60000, segment=1)) == 10 + FRAMING_BYTES


def test_frames_leave_at_the_rate_and_arrive_after_half_the_rtt() -> None:
    way = Direction(spec=LinkSpec(rate_bytes_s=1e6, rtt_s=0.1, queue_s=1))
    for _ in range(2):
        assert way.push(5.0, frame(1000 - FRAMING_BYTES))
    assert [when for when, _ in way.in_flight] == pytest.approx([5.051, 5.052])
    assert way.due_s() == pytest.approx(5.051)
    assert way.counters() == {"frames": 2, "bytes": 2000, "dropped": 0}


def test_a_frame_that_would_wait_longer_than_the_queue_is_dropped() -> None:
    way = Direction(spec=LinkSpec(rate_bytes_s=1e6, queue_s=0.0101))
    sent = [way.push(0.0, frame(1000 - FRAMING_BYTES)) for _ in range(20)]
    assert sent == [True] * 11 + [False] * 9
    assert way.push(0.1, frame(100))


@given(
    st.lists(st.tuples(st.floats(0, 0.01), st.integers(60, 65000)), max_size=60),
    st.floats(1e5, 1e8),
    st.floats(0.001, 0.2),
)
def test_never_faster_than_the_rate_never_out_of_order(
    arrivals: list[tuple[float, int]], rate: float, queue_s: float
) -> None:
    way = Direction(spec=LinkSpec(rate_bytes_s=rate, queue_s=queue_s, rtt_s=0.02))
    now = 0.0
    sent = 0
    for gap, length in arrivals:
        now += gap
        if way.push(now, frame(length)):
            sent += wire_bytes(frame(length))
            assert way.in_flight[-1][0] >= now + 0.01
    times = [when for when, _ in way.in_flight]
    assert times == sorted(times)
    if times:
        assert sent <= rate * (times[-1] - 0.01) * (1 + 1e-9) + 1
    assert way.frames + way.dropped == len(arrivals)


def test_a_cut_loses_what_is_under_way_and_what_comes() -> None:
    spec = LinkSpec(rtt_s=1.0)
    way = Direction(spec=spec)
    way.push(0.0, frame(100))
    way.change(0.1, spec, cut=True)
    assert way.due_s() is None
    assert not way.push(0.2, frame(100))
    assert way.dropped == 2
    way.change(0.3, spec, cut=False)
    assert way.push(0.4, frame(100))


def test_what_waits_is_sent_at_the_new_rate() -> None:
    way = Direction(spec=LinkSpec(rate_bytes_s=1e6, queue_s=1))
    way.push(0.0, frame(100_000 - FRAMING_BYTES))
    way.change(0.05, LinkSpec(rate_bytes_s=1e7, queue_s=1), cut=False)
    assert way.free_at_s == pytest.approx(0.055)


def test_loss_loses_its_share() -> None:
    way = Direction(spec=LinkSpec(rate_bytes_s=0, loss=0.25), random=random.Random(1))
    for _ in range(4000):
        way.push(0.0, frame(100))
    assert 800 < way.dropped < 1200


def test_a_fault_for_a_while_expires_and_keeps_what_it_did_not_mention() -> None:
    state = LinkState(base=LinkSpec(rate_bytes_s=1e6, rtt_s=0.1))
    state.break_(10.0, {"do": "break", "loss": 0.5, "for_s": 2})
    assert state.spec == LinkSpec(rate_bytes_s=1e6, rtt_s=0.1, loss=0.5)
    assert not state.expired(11.9)
    assert state.expired(12.0)
    assert state.as_dict(11.0)["restored_in_s"] == 1.0
    state.restore()
    assert state.spec == state.base
    assert not state.expired(99.0)


@pytest.mark.parametrize(
    "order", [{"for_s": 0}, {"for_s": -1}, {"rate_bytes_s": 1}, {"loss": 2}, {"rtt_s": "x"}]
)
def test_a_senseless_fault_changes_nothing(order: dict[str, object]) -> None:
    state = LinkState(base=LinkSpec())
    with pytest.raises((UsageError, ValueError)):
        state.break_(0.0, order)
    assert (state.spec, state.cut, state.until_s) == (state.base, False, None)
