"""Real dirt: what comes twice, late, cut or not at all never makes a waiting client suitable."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, OTHER_MAC, Talk, get, response

from virtgrid.tracker.decode import ACK, SYN, decode, endpoints
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import Verdict


@pytest.fixture
def talk() -> Talk:
    return Talk(Tracker(guest_macs=[GUEST_MAC]))


def again(talk: Talk, count: int = 100) -> None:
    """Everything that was sent, once more."""
    for frame in talk.sent[-count:]:
        talk.tracker.feed(*frame, talk.at_s)


def test_retransmissions_change_nothing(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(3000) + b"x" * 2000)
    again(talk)
    assert talk.view.reason == "response, 1000 B left"
    talk.answer(b"x" * 1000)
    again(talk)
    view = talk.view
    assert (view.suitable, view.requests, view.responses, view.gaps, view.bytes_to_client) == (
        True,
        1,
        1,
        0,
        len(response(3000)) + 3000,
    )


def test_an_overlapping_retransmission_brings_only_its_new_bytes(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(10) + b"01234")
    talk.put(False, talk.server_seq - 3, talk.client_seq, ACK, b"23456789")
    assert (talk.view.suitable, talk.view.gaps) == (True, 0)


def test_reordered_segments_are_put_in_order(talk: Talk) -> None:
    request = get("/a" * 50)
    talk.open()
    begin = talk.client_seq
    parts = [(at, request[at : at + 20]) for at in range(0, len(request), 20)]
    for at, part in reversed(parts):
        talk.put(True, begin + at, talk.server_seq, ACK, part)
    talk.client_seq += len(request)
    assert (talk.view.requests, talk.view.gaps) == (1, 0)
    talk.answer(response(0))
    assert talk.view.suitable


def test_a_waiting_segment_that_overlaps_brings_only_its_new_bytes(talk: Talk) -> None:
    request = get()
    talk.open()
    begin = talk.client_seq
    talk.put(True, begin + 10, talk.server_seq, ACK, request[10:])
    talk.put(True, begin + 12, talk.server_seq, ACK, request[12:20])
    talk.put(True, begin, talk.server_seq, ACK, request[:15])
    talk.client_seq += len(request)
    assert (talk.view.requests, talk.view.gaps, talk.view.bytes_to_server) == (1, 0, len(request))
    assert talk.view.reason == "waiting for the response to GET /x"


def test_a_hole_in_a_head_is_waited_for_and_is_unsuitable(talk: Talk) -> None:
    talk.open()
    request = get()
    talk.put(True, talk.client_seq + 10, talk.server_seq, ACK, request[10:])
    assert talk.view.reason == "segments missing, waiting for their retransmission"
    assert not talk.view.suitable
    talk.ask(request[:10])
    assert talk.view.reason == "waiting for the response to GET /x"


def test_a_hole_inside_a_body_is_arithmetic(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(9000) + b"x" * 1000)
    talk.lose(to_server=False, length=5000).answer(b"x" * 2000)
    assert (talk.view.reason, talk.view.gaps) == ("response, 1000 B left", 0)
    talk.answer(b"x" * 1000)
    assert talk.view.suitable


def test_a_body_whose_last_bytes_were_missed_is_not_taken_for_complete(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(3000) + b"x" * 1000)
    talk.lose(to_server=False, length=2000)
    assert not talk.view.suitable
    talk.ask(get("/next"))
    assert not talk.view.suitable
    talk.answer(response(0))
    view = talk.view
    assert (view.suitable, view.requests, view.responses, view.gaps) == (True, 2, 2, 1)


def test_a_missed_response_head_is_a_gap_and_the_next_request_mends_it(talk: Talk) -> None:
    talk.open().ask(get()).lose(to_server=False, length=500)
    talk.ask(get("/2"))
    assert not talk.view.suitable
    talk.answer(b"x" * 100)
    assert talk.view.verdict is not Verdict.SUITABLE
    talk.later(1).ask(get("/3")).answer(response(2) + b"ok")
    assert talk.view.suitable


def test_a_missed_request_is_noticed_by_its_acknowledgement(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(0))
    talk.lose(to_server=True, length=80).answer(response(0))
    assert (talk.view.suitable, talk.view.responses) == (True, 2)
    talk.ask(get("/3"))
    assert (talk.view.suitable, talk.view.gaps) == (False, 1)
    talk.answer(response(0))
    assert talk.view.suitable


def test_seen_mid_stream_is_unknown_until_its_next_head(talk: Talk) -> None:
    talk.answer(b"some of a body", 5)
    assert (talk.view.verdict, talk.view.reason) == (Verdict.UNKNOWN, "state unknown (seen mid-stream)")
    assert talk.tracker.unsuitable == 1
    talk.ask(get())
    assert talk.view.reason == "waiting for the response to GET /x"
    talk.answer(response(1) + b"x")
    assert talk.view.suitable


def test_seen_mid_stream_with_an_answer_is_known(talk: Talk) -> None:
    talk.answer(response(10) + b"12345")
    assert talk.view.reason == "response, 5 B left"
    talk.answer(b"67890")
    assert (talk.view.suitable, talk.view.responses) == (True, 1)


def test_seen_mid_stream_and_silent_is_suitable_after_three_seconds(talk: Talk) -> None:
    talk.answer(b"some of a body").later(2.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert (talk.view.suitable, talk.view.reason) == (True, "no traffic for 3.1 s (seen mid-stream)")
    talk.answer(b"more of it")
    assert not talk.view.suitable


def test_a_download_seen_mid_stream_is_large_once_enough_was_seen(talk: Talk) -> None:
    for _ in range(80):
        talk.answer(b"x" * 60_000, 60_000)
    assert (talk.view.suitable, talk.view.state) == (True, "moving")
    talk.ask(get())
    assert not talk.view.suitable


def test_a_transfer_seen_mid_stream_for_five_seconds_does_not_block(talk: Talk) -> None:
    for _ in range(49):
        talk.answer(b"x" * 60_000, 6_000).later(0.1)
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.answer(b"x" * 60_000, 6_000).later(0.2)
    assert talk.view.suitable
    assert "a transfer seen mid-stream" in talk.view.reason
    talk.ask(get())
    assert not talk.view.suitable


def test_after_lost_frames_nothing_is_known_until_the_next_head(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(0))
    assert talk.view.suitable
    talk.tracker.frames_lost(talk.at_s)
    assert talk.view.verdict is Verdict.UNKNOWN
    assert talk.tracker.unsuitable == 1
    talk.lose(to_server=True, length=100).lose(to_server=False, length=1000)
    talk.ask(get()).answer(response(0))
    assert talk.view.suitable


def test_frames_lost_while_an_answer_was_due_are_given_longer(talk: Talk) -> None:
    talk.open().ask(get())
    talk.tracker.frames_lost(talk.at_s)
    talk.later(29)
    assert not talk.view.suitable
    talk.later(2)
    assert talk.view.suitable


def test_sequence_numbers_may_wrap() -> None:
    talk = Talk(Tracker(), client_seq=0xFFFFFFF0, server_seq=0xFFFFFF00)
    talk.open().ask(get()).answer(response(3000) + b"x" * 3000, 100)
    view = talk.view
    assert (view.suitable, view.requests, view.responses, view.gaps) == (True, 1, 1, 0)


def test_data_on_a_syn_counts_once(talk: Talk) -> None:
    request = get()
    talk.put(True, talk.client_seq, 0, SYN, request)
    talk.client_seq += 1
    talk.synack().ask(request)
    assert (talk.view.requests, talk.view.gaps) == (1, 0)
    talk.answer(response(0))
    assert talk.view.suitable


def test_a_port_used_again_is_a_new_connection(talk: Talk) -> None:
    talk.open().ask(get())
    talk.client_seq, talk.server_seq = 900_000, 800_000
    talk.open()
    assert (talk.view.state, talk.view.requests) == ("new", 0)
    assert [c.reason for c in talk.tracker.changes() if c.verdict == "closed"] == ["the port was used again"]


@pytest.mark.parametrize("vlan", [None, 42])
@pytest.mark.parametrize("addresses", [("10.0.0.9", "10.0.0.1"), ("2001:db8::9", "2001:db8::1")])
@pytest.mark.parametrize("offload", [False, True])
def test_addresses_tags_and_offload_make_no_difference(
    vlan: int | None, addresses: tuple[str, str], offload: bool
) -> None:
    client, server = addresses
    talk = Talk(Tracker(), client=client, server=server, vlan=vlan, offload=offload)
    talk.open().ask(get()).answer(response(50_000) + b"x" * 50_000, 20_000)
    view = talk.view
    assert (view.suitable, view.responses, view.gaps) == (True, 1, 0)
    assert view.server == ("[2001:db8::1]:80" if ":" in server else "10.0.0.1:80")


def test_frames_cut_short_lose_nothing_but_bodies() -> None:
    talk = Talk(Tracker(), snap=400)
    talk.open().ask(get()).answer(response(50_000) + b"x" * 50_000, 20_000)
    assert (talk.view.suitable, talk.view.gaps) == (True, 0)
    talk.ask(get("/1") + get("/2")).answer(response(9000) + b"x" * 9000 + response(0), 20_000)
    assert talk.view.verdict is Verdict.UNKNOWN, "the second head was not captured"


def test_a_chunk_boundary_behind_the_snap_length_is_unknown_not_guessed() -> None:
    talk = Talk(Tracker(), snap=400)
    head = response(None, "200 OK", "Transfer-Encoding: chunked")
    body = b"400\r\n" + b"x" * 1024 + b"\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n"
    talk.open().ask(get()).answer(head + body, 4000)
    assert talk.view.reason == "state unknown (a chunk's boundary was not captured)"
    talk.answer(b"0\r\n\r\n")
    assert talk.view.suitable
    talk.ask(get()).answer(head + body, 4000).ask(get("/3"))
    assert talk.view.reason == "waiting for the response to GET /3"
    talk.answer(response(0))
    assert (talk.view.suitable, talk.view.responses) == (True, 3)


def test_what_lies_deep_in_a_frame_is_found_where_the_rest_of_it_can_be_had() -> None:
    talk = Talk(Tracker(), snap=400, rests=True)
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    chunked = response(None, "200 OK", "Transfer-Encoding: chunked") + 20 * chunk + b"0\r\n\r\n"
    talk.open().ask(get("/1") + get("/2") + get("/3"))
    talk.answer(chunked + response(9000) + b"x" * 9000 + response(5)[:-1], 60_000)
    assert talk.view.reason == "response, head incomplete"
    talk.answer(b"\nhello")
    view = talk.view
    assert (view.suitable, view.state, view.requests, view.responses, view.gaps) == (True, "idle", 3, 3, 0)


def test_the_rest_of_a_frame_is_asked_for_only_where_it_matters() -> None:
    talk = Talk(Tracker(), snap=400)
    talk.open().ask(get())

    def nobody_asks() -> bytes:
        raise AssertionError

    for data in (response(50_000) + b"x" * 20_000, b"x" * 20_000, b"x" * 10_000):
        frame = talk.frame(False, talk.server_seq, talk.client_seq, ACK, data)
        talk.tracker.feed(*frame, talk.at_s, nobody_asks)
        talk.server_seq += len(data)
    assert (talk.view.suitable, talk.view.responses) == (True, 1)


def test_a_frame_that_comes_too_early_is_kept_whole() -> None:
    talk = Talk(Tracker(), snap=400, rests=True)
    talk.open().ask(get("/1") + get("/2"))
    first, second = response(3000) + b"x" * 3000, response(7) + b"y" * 7
    talk.lose(to_server=False, length=10).answer((first + second)[10:], 60_000)
    talk.server_seq -= len(first + second)
    assert talk.view.responses == 0
    talk.answer(first[:10])
    assert (talk.view.suitable, talk.view.responses, talk.view.gaps) == (True, 2, 0)


def test_frames_that_come_too_early_have_each_their_own_rest() -> None:
    talk = Talk(Tracker(), snap=100, rests=True).open().ask(get("/" + "a" * 60)).ask(get("/b"))
    first = response(3, "200 OK", "X: " + "x" * 60) + b"abc"
    second, third = response(30, "200 OK", "Y: " + "y" * 60), b"z" * 27
    begin = talk.server_seq
    for data, offset in ((second, 0), (third, len(second)), (first, -len(first))):
        talk.put(False, begin + len(first) + offset, talk.client_seq, ACK, data)
    assert (talk.view.responses, talk.view.gaps, talk.view.state) == (2, 0, "busy")
    talk.put(False, begin + len(first + second + third), talk.client_seq, ACK, b"end")
    assert talk.view.state == "idle"


def test_frames_of_other_machines_are_not_looked_at(talk: Talk) -> None:
    other = Talk(Tracker(guest_macs=[bytes(6)]))
    other.open().ask(get())
    assert other.tracker.total == 0


def test_a_connection_opened_by_the_guest_counts_and_says_so() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), by_guest=True)
    talk.open().ask(get())
    assert talk.tracker.unsuitable == 1
    assert talk.view.reason.endswith("(opened by the guest)")
    assert talk.tracker.server_ports == set()


def test_connections_opened_by_the_guest_can_be_left_out_of_the_count() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC], count_outgoing=False), by_guest=True)
    talk.open().ask(get())
    assert talk.tracker.unsuitable == 0
    assert talk.view.requests == 1


def test_the_ports_the_guest_serves_are_learned(talk: Talk) -> None:
    talk.server_port = 8443
    talk.open()
    assert talk.tracker.server_ports == {8443}


def test_what_was_the_count_then_can_be_asked_later(talk: Talk) -> None:
    talk.open()  # at 100
    talk.later(1).ask(get())
    talk.later(1).answer(response(0))  # at 102
    talk.later(1).ask(get())  # at 103
    tracker = talk.tracker
    assert [tracker.unsuitable_at(t) for t in (99.0, 100.0, 101.5, 102.0, 102.9, 103.0, 110.0)] == [
        0, 1, 1, 0, 0, 1, 1,
    ]  # fmt: skip


def test_silence_takes_effect_at_its_own_time_not_when_it_is_noticed(talk: Talk) -> None:
    talk.open().later(20)
    talk.tracker.tick(talk.at_s)
    assert [talk.tracker.unsuitable_at(t) for t in (104.9, 105.1)] == [1, 0]
    assert [(c.at_s, c.verdict) for c in talk.tracker.changes()] == [
        (100.0, "unsuitable"),
        (105.0, "suitable"),
    ]


def test_what_is_forgotten_is_forgotten_a_while_after_its_end_began() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get()).answer(response(0)).later(200)
    talk.fin(to_server=False).later(59)
    assert talk.is_open
    talk.later(2)
    assert not talk.is_open
    assert [c.at_s for c in talk.tracker.changes() if c.verdict == "closed"] == [360.0]


def test_a_moment_too_long_ago_is_not_answered(talk: Talk) -> None:
    talk.open()
    for _ in range(200):
        talk.later(1).ask(get()).later(1).answer(response(0))
    assert talk.tracker.unsuitable_at(101.0) is None
    assert talk.tracker.unsuitable_at(talk.at_s - 1) == 1
    assert talk.tracker.unsuitable_at(talk.at_s - 28) == 0


def test_the_number_of_connections_is_bounded() -> None:
    tracker = Tracker(connections_max=100)
    for port in range(1000, 1500):
        Talk(tracker, client_port=port).open()
    assert tracker.total == 100
    assert tracker.unsuitable == 100


def test_the_count_is_the_snapshots_count() -> None:
    tracker = Tracker()
    talks = [Talk(tracker, client_port=2000 + i).open() for i in range(20)]
    for talk in talks[:15]:
        talk.ask(get())
    for talk in talks[:5]:
        talk.answer(response(0))
    talks[19].answer(b"\x16\x03\x01\n")
    snapshot = tracker.snapshot(100.0)
    assert (snapshot.total, snapshot.unsuitable) == (20, 15)
    assert tracker.unsuitable == 15


def test_a_cut_or_foreign_frame_is_no_segment() -> None:
    talk = Talk(Tracker()).open().ask(get())
    frame, length = talk.sent[-1]
    assert decode(frame, length) is not None
    for cut in range(54):
        assert decode(frame[:cut], length) is None
    assert decode(frame[:12] + b"\x08\x06" + frame[14:], length) is None
    assert endpoints(decode(frame, length).key) == ("10.0.0.9:40022", "10.0.0.1:80")  # type: ignore[union-attr]
    assert OTHER_MAC != GUEST_MAC


def test_a_server_that_is_understood_tells_the_protocol_whatever_its_client_began_with(talk: Talk) -> None:
    talk.open().ask(b"\xdd\0\0\0 GET /x HTTP/1.1\r\n\r\n")
    assert talk.view.protocol == "opaque"
    talk.answer(response(10) + b"x" * 4)
    assert (talk.view.protocol, talk.view.suitable) == ("http", False)
    talk.answer(b"x" * 6).later(0.1)
    view = talk.view
    assert (view.requests, view.responses, view.state, view.suitable) == (0, 1, "idle", True)
    assert talk.ask(get()).view.reason == "waiting for the response to GET /x"


def test_the_request_behind_a_proxys_handshake_is_read(talk: Talk) -> None:
    talk.server_port = 1080
    talk.open().ask(b"\x05\x01\x00").answer(b"\x05\x00").ask(b"\x05\x01\x00\x01\n\0\0\1\0P")
    talk.answer(b"\x05\0\0\1\n\0\0\1\0P")
    assert talk.view.protocol == "opaque"
    view = talk.ask(get()).later(60).view
    assert (view.protocol, view.suitable, view.reason) == (
        "http",
        False,
        "waiting for the response to GET /x",
    )
    view = talk.answer(response(0)).view
    assert (view.state, view.requests, view.responses) == ("idle", 1, 1)


def test_text_deep_within_an_unknown_protocol_is_not_taken_for_a_request(talk: Talk) -> None:
    talk.open().ask(b"\0\1\2\3" * 400).answer(b"\0\1\2\3" * 400).ask(get()).answer(response(5))
    assert (talk.view.protocol, talk.view.requests) == ("opaque", 0)


@pytest.mark.parametrize("size", [5, 7, 200])
def test_seen_mid_stream_a_head_in_pieces_is_found(talk: Talk, size: int) -> None:
    talk.ask(b"x" * 20).ask(get("/" + "long" * 100), size)
    view = talk.later(60).view
    assert (view.protocol, view.state, view.suitable) == ("http", "busy", False)
    assert talk.answer(response(0)).view.state == "idle"


def test_seen_mid_stream_a_head_whose_middle_was_missed_is_not_made_up(talk: Talk) -> None:
    talk.ask(b"GE").lose(to_server=True, length=300).ask(b"T /x HTTP/1.1\r\n\r\n")
    assert (talk.view.state, talk.view.requests) == ("unknown", 0)


def test_connections_that_are_gone_are_not_kept_until_their_timers_are_due() -> None:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    for number in range(5000):
        talk = Talk(tracker, client_port=1024 + number, at_s=100 + number * 1e-4).open()
        talk.ask(get()).answer(response(0)).fin(to_server=False).fin(to_server=True)
    assert tracker.total == 0
    assert len(tracker.timers) <= 2000


def test_an_answer_after_lost_frames_is_not_taken_for_that_of_a_request_before_them() -> None:
    talk = Talk(Tracker()).open().ask(get("/x", "HEAD"))
    talk.tracker.frames_lost(talk.at_s)
    talk.lose(to_server=False, length=100).lose(to_server=True, length=100)
    # The answer to a GET that was missed: its body is still on its way.
    talk.answer(response(9000))
    assert not talk.view.suitable
    assert not talk.answer(b"d" * 8999).view.suitable
    assert talk.later(31).view.suitable, "not for ever"


def test_what_comes_behind_the_clients_end_confuses_nobody(talk: Talk) -> None:
    talk.open().ask(get()).fin(to_server=True)
    talk.put(True, talk.client_seq - 1, talk.server_seq, ACK, b"nonsense\r\n\r\n")
    view = talk.later(60).view
    assert (view.state, view.suitable, view.gaps) == ("busy", False, 0)
    assert talk.answer(response(0)).view.state == "closing"


def test_a_segment_from_its_own_destination_is_no_connection() -> None:
    tracker = Tracker()
    Talk(tracker, client="10.0.0.1", client_port=80).syn()
    assert (tracker.total, len(tracker.streams)) == (0, 0)


def test_a_line_of_a_body_seen_mid_stream_is_nobodys_command() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]))
    talk.answer(b"er search</p>\r\n").answer(b"a LIST of things\r\n220 people\r\n")
    assert (talk.view.protocol, talk.view.requests, talk.view.responses) == ("tcp", 0, 0)
    assert "opened by the guest" not in talk.view.reason
    talk.ask(get()).answer(response(0))
    assert (talk.view.protocol, talk.view.suitable) == ("http", True)


def test_seen_mid_stream_with_half_a_request_somebody_waits(talk: Talk) -> None:
    view = talk.ask(b"GET /x HTTP/1.1\r\nHost: a\r\n").later(60).view
    assert (view.state, view.suitable, view.reason) == ("busy", False, "request, head incomplete")
    assert talk.ask(b"\r\n").answer(response(0)).view.state == "idle"


def test_a_request_behind_a_hole_counts_from_when_the_hole_is_given_up() -> None:
    talk = Talk(Tracker()).open()
    talk.lose(to_server=True, length=10).ask(get("/x"))
    Talk(talk.tracker, client_port=9, at_s=110.0).open().ask(get())
    talk.later(31)
    assert talk.view.requests == 1
    conn = next(c for c in talk.tracker.connections if c.names[0].endswith(":40022"))
    assert [exchange.since_s for exchange in conn.queue] == [130.0]
