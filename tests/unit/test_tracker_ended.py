"""What still comes of a connection that is over opens no new one, and hides none either."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.tracker.ended import Ended
from virtgrid.tracker.pcap import Frame
from virtgrid.tracker.replay import replay
from virtgrid.tracker.streams import Stream
from virtgrid.tracker.tracker import Tracker


@pytest.fixture
def talk() -> Talk:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get())
    return talk.answer(response(100) + b"x" * 100)


def closed(talk: Talk) -> Talk:
    return talk.fin(to_server=True).fin(to_server=False)


@pytest.mark.parametrize("after_s", [0.0, 0.2, 30.0])
def test_a_copy_that_comes_after_the_end_opens_nothing(talk: Talk, after_s: float) -> None:
    closed(talk).later(after_s)
    for frame in [frame for frame in talk.sent if len(frame[0]) > 60]:
        talk.tracker.feed(*frame, talk.at_s)
    assert not talk.is_open
    assert talk.tracker.unsuitable == 0


def test_bytes_behind_the_end_belong_to_another_connection(talk: Talk) -> None:
    closed(talk).ask(get("/new"))
    assert talk.is_open


def test_a_copy_after_a_minute_is_looked_at(talk: Talk) -> None:
    closed(talk).later(61)
    talk.tracker.feed(*talk.sent[2], talk.at_s)
    assert talk.is_open


def test_the_port_may_be_used_again_at_once(talk: Talk) -> None:
    closed(talk)
    talk.client_seq = talk.server_seq = 100
    talk.open().ask(get("/again"))
    assert talk.view.requests == 1


def test_what_was_under_way_to_a_client_that_reset_opens_nothing(talk: Talk) -> None:
    talk.ask(get()).answer(response(50_000) + b"x" * 5000)
    talk.reset(to_server=True).later(0.1).answer(b"x" * 20_000)
    assert not talk.is_open
    talk.later(1).answer(b"x")
    assert talk.is_open


def test_a_client_that_goes_on_after_a_reset_has_not_been_reset(talk: Talk) -> None:
    # A reset that its receiver did not believe: what its alleged sender says counts at once.
    talk.reset(to_server=True).ask(get("/still-here"))
    assert talk.view.state == "busy"


def test_a_capture_file_read_in_blocks_tells_the_same(talk: Talk) -> None:
    closed(talk)
    frames = [Frame(100.0 + number * 0.001, length, data) for number, (data, length) in enumerate(talk.sent)]
    copies = [Frame(100.3 + number * 0.001, f.wire_len, f.data) for number, f in enumerate(frames[2:4])]
    (one,) = replay([*frames, *copies])
    assert (one.view.requests, one.view.responses, one.end) == (1, 1, "closed")


def test_ends_are_forgotten_when_they_are_many() -> None:
    ended = Ended()
    for number in range(70_000):
        ended.reset(Stream(number.to_bytes(12, "big"), True), 1.0)
    assert len(ended) == 1 << 16
