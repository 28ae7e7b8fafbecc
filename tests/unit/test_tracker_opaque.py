"""What cannot be read is judged by records, direction and silence, and says that it is a guess."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.tracker.tracker import Tracker

MIB = 1 << 20


def record(length: int, kind: int = 23) -> bytes:
    return bytes([kind, 3, 3]) + length.to_bytes(2, "big") + b"\xaa" * length


@pytest.fixture
def talk() -> Talk:
    """A TLS connection, the handshake done."""
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=443).open()
    return talk.ask(record(200, 22)).answer(record(3000, 22))


@pytest.mark.parametrize("size", [1, 4, 5, 6, 1448])
def test_inside_a_tls_record_a_connection_is_unsuitable(talk: Talk, size: int) -> None:
    data = record(9000) + record(0) + record(16_000)
    talk.ask(record(100), size).answer(data[:-1], size).later(25)
    assert (talk.view.suitable, talk.view.reason) == (False, "TLS, inside a record")
    talk.answer(data[-1:])
    assert not talk.view.suitable
    talk.later(1.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert (talk.view.suitable, talk.view.reason) == (True, "TLS, quiet for 2.1 s")


def test_a_client_that_spoke_last_is_probably_waiting(talk: Talk) -> None:
    talk.ask(record(500)).later(9.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable


def test_a_server_that_spoke_last_has_probably_answered_whoever_spoke_before(talk: Talk) -> None:
    talk.later(3)
    assert talk.view.suitable
    talk.ask(record(500)).later(0.1).answer(record(3000))
    assert not talk.view.suitable
    talk.later(1.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert (talk.view.suitable, talk.view.reason) == (True, "TLS, quiet for 2.1 s")


def test_a_record_that_never_ends_is_not_waited_for_for_ever(talk: Talk) -> None:
    talk.answer(record(9000)[:100]).later(29.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable


def test_records_in_frames_cut_short_are_judged_by_silence() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=443, snap=400).open()
    talk.ask(record(200, 22)).answer(record(3000, 22) + record(3000), 60_000)
    talk.later(1.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable


def test_records_in_frames_cut_short_are_followed_where_the_rest_can_be_had() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=443, snap=400, rests=True).open()
    talk.ask(record(200, 22)).answer(record(3000, 22))
    data = 8 * record(16_000)
    talk.ask(record(100)).answer(data[:-1], 60_000).later(25)
    assert (talk.view.suitable, talk.view.reason) == (False, "TLS, inside a record")
    talk.answer(data[-1:]).later(2.1)
    assert talk.view.suitable


def test_what_only_begins_like_tls_is_judged_by_silence(talk: Talk) -> None:
    talk.answer(b"no record at all" * 3).later(2.1)
    assert talk.view.suitable


def test_a_missed_frame_loses_the_records_and_not_more(talk: Talk) -> None:
    talk.answer(record(100)).lose(to_server=False, length=205).answer(record(50))
    talk.ask(record(10)).answer(record(3)).later(2.1)
    assert talk.view.suitable


@pytest.mark.parametrize("first", [b"SSH-2.0-x\r\n", b"\x00\x01\x02\x03"])
def test_another_protocol_is_judged_by_who_spoke_last(first: bytes) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=22).open().ask(first)
    assert (talk.view.protocol, talk.view.state, talk.view.suitable) == ("opaque", "opaque", False)
    talk.later(9.9)
    assert not talk.view.suitable, "the client spoke last"
    talk.answer(b"y").later(1.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert (talk.view.suitable, talk.view.reason) == (True, "unknown protocol, quiet for 2.1 s")


EVENTS = response(None, "200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")


def test_a_stream_of_events_is_an_answer_that_has_not_ended() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get("/events"))
    talk.answer(EVENTS + b"9\r\ndata: 1\n\n\r\n").later(600)
    assert (talk.view.state, talk.view.suitable) == ("busy", False)
    talk.answer(b"0\r\n\r\n")
    assert talk.view.suitable


def test_a_stream_of_events_is_a_large_transfer_once_it_has_become_one() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get("/events")).answer(EVENTS)
    for _ in range(300):
        talk.answer(b"4000\r\n" + b"x" * 0x4000 + b"\r\n", 20_000)
    assert (talk.view.state, talk.view.suitable) == ("moving", True)


def test_a_long_poll_is_waited_for_however_long_it_is_silent() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get("/poll")).later(3000)
    assert not talk.view.suitable


@pytest.mark.parametrize(
    ("port", "greeting", "command", "shown"),
    [
        (21, b"220 x", b"PASS s3cret", "PASS"),
        (21, b"220 x", b"pass s3cret", "pass"),
        (21, b"220 x", b"s3cret", "(unknown command)"),
        (110, b"+OK", b"PASS s3cret", "PASS"),
        (110, b"+OK", b"APOP me s3cret", "APOP"),
        (110, b"+OK", b"AUTH PLAIN s3cret", "AUTH PLAIN"),
        (25, b"220 x", b"AUTH PLAIN s3cret=", "AUTH PLAIN"),
        (143, b"* OK", b"a LOGIN me s3cret", "a LOGIN"),
        (143, b"* OK", b"a AUTHENTICATE PLAIN s3cret", "a AUTHENTICATE"),
    ],
)
def test_no_reason_shows_a_password(port: int, greeting: bytes, command: bytes, shown: str) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open().answer(greeting + b"\r\n")
    first = b"x NOOP\r\n" if port == 143 else b"NOOP\r\n"
    talk.ask(first).answer(b"x OK\r\n" if port == 143 else greeting + b"\r\n").ask(command + b"\r\n")
    assert talk.view.reason == f"waiting for the response to {shown}"
    assert "s3cret" not in str(talk.tracker.changes())
    assert b"s3cret".hex().encode() not in talk.tracker.export_state(talk.at_s)
