"""HTTP as the built-in definition has it: no client with a request outstanding is ever called suitable."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.tracker.tracker import Tracker, large_bytes_for
from virtgrid.tracker.views import Verdict

CHUNKED = response(None, "200 OK", "Transfer-Encoding: chunked")
MIB = 1 << 20


@pytest.fixture
def talk() -> Talk:
    return Talk(Tracker(guest_macs=[GUEST_MAC]))


def test_an_exchange_is_unsuitable_from_its_first_byte_to_its_last(talk: Talk) -> None:
    talk.open().ask(get("/a")[:10])
    assert talk.view.reason == "request, head incomplete"
    talk.ask(get("/a")[10:])
    assert (talk.view.verdict, talk.view.reason) == (
        Verdict.UNSUITABLE,
        "waiting for the response to GET /a",
    )
    talk.answer(response(3000)[:20])
    assert talk.view.reason == "response, head incomplete"
    talk.answer(response(3000)[20:] + b"x" * 1000)
    assert talk.view.reason == "response, 2.0 KiB left"
    talk.answer(b"x" * 1999)
    assert not talk.view.suitable
    talk.answer(b"x")
    assert (talk.view.suitable, talk.view.reason, talk.view.state) == (
        True,
        "keep-alive, nothing outstanding",
        "idle",
    )
    assert (talk.view.requests, talk.view.responses) == (1, 1)


def test_a_connection_without_a_request_holds_for_five_seconds(talk: Talk) -> None:
    talk.open()
    assert (talk.view.state, talk.view.verdict) == ("new", Verdict.UNSUITABLE)
    talk.later(4.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable
    assert talk.view.reason == "connected for 5.1 s, no request"
    talk.ask(get())
    assert not talk.view.suitable


def test_an_unanswered_syn_holds_for_one_second_only(talk: Talk) -> None:
    talk.syn()
    assert talk.view.reason == "connecting, not answered by the server yet"
    assert not talk.view.suitable
    talk.later(1.1)
    assert talk.view.suitable
    talk.later(60)
    assert not talk.is_open


def test_pipelined_requests_are_all_waited_for(talk: Talk) -> None:
    talk.open().ask(get("/1") + get("/2") + get("/3"))
    assert talk.view.reason == "waiting for the response to GET /1 (2 more waiting)"
    talk.answer(response(5) + b"12345" + response(2) + b"1")
    assert talk.view.reason == "response, 1 B left (1 more waiting)"
    talk.answer(b"2")
    assert not talk.view.suitable
    talk.answer(response(0))
    assert talk.view.suitable
    assert (talk.view.requests, talk.view.responses) == (3, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1448])
def test_a_chunked_body_ends_behind_its_trailer(talk: Talk, size: int) -> None:
    body = b"5\r\nhello\r\nA;name=value\r\n0\r\n\r\n12345\r\n0\r\nChecksum: 1\r\nMore: 2\r\n\r\n"
    talk.open().ask(get()).answer(CHUNKED + body[:-1], size)
    assert not talk.view.suitable
    talk.answer(body[-1:])
    assert talk.view.suitable
    talk.ask(get()).answer(CHUNKED + b"0\r\n\r\n", size)
    assert (talk.view.suitable, talk.view.requests, talk.view.responses) == (True, 2, 2)


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "304 Not Modified"), ("DELETE", "204 No Content")]
)
def test_answers_without_a_body_are_complete_with_their_head(talk: Talk, method: str, status: str) -> None:
    talk.open().ask(get("/", method)).answer(response(5000, status))
    assert talk.view.suitable
    talk.ask(get()).answer(response(1) + b"x")
    assert (talk.view.suitable, talk.view.responses, talk.view.gaps) == (True, 2, 0)


def test_an_interim_answer_is_no_answer(talk: Talk) -> None:
    talk.open().ask(get("/up", "PUT", "Expect: 100-continue", "Content-Length: 10"))
    talk.answer(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert not talk.view.suitable
    talk.ask(b"0123456789").answer(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
    assert not talk.view.suitable
    talk.answer(response(0, "201 Created"))
    assert (talk.view.suitable, talk.view.responses) == (True, 1)


def test_a_refused_expectation_leaves_room_for_the_next_request(talk: Talk) -> None:
    talk.open().ask(get("/up", "PUT", "Expect: 100-continue", "Content-Length: 1000"))
    talk.answer(response(0, "417 Expectation Failed"))
    assert talk.view.suitable
    talk.ask(get("/next"))
    assert talk.view.reason == "waiting for the response to GET /next"
    talk.answer(response(0))
    assert (talk.view.suitable, talk.view.requests) == (True, 2)


def test_a_refused_expectation_may_be_followed_by_the_body_all_the_same(talk: Talk) -> None:
    talk.open().ask(get("/up", "PUT", "Expect: 100-continue", "Content-Length: 10"))
    talk.answer(response(0, "417 Expectation Failed"))
    talk.ask(b"01234")
    assert talk.view.reason == "request body, 5 B left"
    talk.ask(b"56789" + get("/next")).answer(response(0))
    assert (talk.view.suitable, talk.view.requests, talk.view.responses) == (True, 2, 2)


def test_a_body_until_close_ends_with_the_connection(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(None) + b"x" * 5000)
    assert talk.view.reason.endswith(" so far")
    assert not talk.view.suitable
    talk.fin(to_server=False)
    assert (talk.view.suitable, talk.view.reason) == (True, "closing, nothing outstanding")
    talk.fin(to_server=True)
    assert not talk.is_open


def test_a_client_that_half_closes_is_still_waiting(talk: Talk) -> None:
    talk.open().ask(get()).fin(to_server=True)
    assert not talk.view.suitable
    talk.answer(response(5) + b"12345")
    assert talk.view.suitable


def test_a_reset_ends_the_connection(talk: Talk) -> None:
    talk.open().ask(get()).reset(to_server=True)
    assert not talk.is_open
    assert talk.tracker.unsuitable == 0
    assert [c.verdict for c in talk.tracker.changes()] == ["unsuitable", "closed"]


def test_a_reset_from_outside_the_window_is_not_believed(talk: Talk) -> None:
    talk.open().ask(get())
    talk.put(True, talk.client_seq + (1 << 28), 0, 0x04)
    assert talk.is_open


def test_a_connect_tunnel_is_judged_by_silence(talk: Talk) -> None:
    talk.open().ask(get("a:443", "CONNECT")).answer(response(None, "200 OK"))
    assert (talk.view.state, talk.view.suitable) == ("opaque", False)
    talk.ask(b"\x16\x03\x01 hello").later(1.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable
    assert talk.view.reason == "tunnel or upgraded connection, quiet for 2.1 s"
    talk.answer(b"more")
    assert not talk.view.suitable


def test_a_refused_connect_is_an_ordinary_answer(talk: Talk) -> None:
    talk.open().ask(get("a:443", "CONNECT")).answer(response(2, "403 Forbidden") + b"no")
    assert (talk.view.state, talk.view.suitable) == ("idle", True)


def test_an_upgraded_connection_is_judged_by_silence(talk: Talk) -> None:
    talk.open().ask(get("/ws", "GET", "Upgrade: websocket", "Connection: upgrade"))
    talk.answer(response(None, "101 Switching Protocols") + b"\x81\x05hello")
    assert (talk.view.state, talk.view.suitable, talk.view.responses) == ("opaque", False, 1)
    talk.later(2.1)
    assert talk.view.suitable


@pytest.mark.parametrize(
    ("first", "protocol"),
    [(b"\x16\x03\x01\x00\x03\x01\x00", "tls"), (b"SSH-2.0-x\r\n", "opaque"), (b"\x00\x01\x02", "opaque")],
)
def test_what_is_not_http_is_judged_by_silence(talk: Talk, first: bytes, protocol: str) -> None:
    talk.open().ask(first + b"\x00").answer(b"\x16\x03\x03\x00\x01\n")
    assert (talk.view.protocol, talk.view.suitable) == (protocol, False)
    talk.later(2.1)
    assert talk.view.suitable


def test_a_server_that_speaks_first_is_another_protocol(talk: Talk) -> None:
    talk.open().answer(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert (talk.view.protocol, talk.view.state) == ("opaque", "opaque")


def test_an_upload_is_outstanding_until_answered(talk: Talk) -> None:
    talk.open().ask(get("/up", "POST", "Content-Length: 5000") + b"x" * 3000)
    assert talk.view.reason == "request body, 2.0 KiB left"
    talk.ask(b"x" * 2000)
    assert talk.view.reason == "waiting for the response to POST /up"
    talk.answer(response(0))
    assert talk.view.suitable


def test_an_early_answer_does_not_hide_an_upload_still_running(talk: Talk) -> None:
    talk.open().ask(get("/up", "POST", "Content-Length: 5000") + b"x" * 1000)
    talk.answer(response(3, "413 Too Large") + b"big")
    assert not talk.view.suitable
    talk.ask(b"x" * 4000)
    assert talk.view.suitable
    talk.ask(get()).answer(response(0))
    assert (talk.view.requests, talk.view.responses) == (2, 2)


def test_a_large_download_is_suitable_while_it_runs(talk: Talk) -> None:
    talk.open().ask(get("/iso"))
    assert not talk.view.suitable
    talk.answer(response(8 * MIB) + b"x" * 1000)
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    assert talk.view.reason == "large download, 8.0 MiB of 8.0 MiB left"
    assert talk.view.large_transfers == 1
    talk.answer(b"x" * (8 * MIB - 1000), 60_000)
    assert talk.view.state == "idle"
    talk.ask(get("/small"))
    assert not talk.view.suitable, "the next exchange is not large"


def test_a_download_below_the_threshold_is_not_large(talk: Talk) -> None:
    talk.open().ask(get("/iso")).answer(response(4 * MIB - 1) + b"x" * 60_000, 60_000)
    assert not talk.view.suitable


def test_the_threshold_can_be_chosen() -> None:
    talk = Talk(Tracker(large_bytes=10_000))
    talk.open().ask(get()).answer(response(10_000))
    assert talk.view.suitable


def test_the_threshold_for_a_pause_is_what_ten_pauses_carry() -> None:
    assert large_bytes_for(0.3, 12_500_000) == 37_500_000
    assert large_bytes_for(0.03, 1_250_000) == 375_000
    assert large_bytes_for(0, 0) == 1
    talk = Talk(Tracker(large_bytes=large_bytes_for(0.1, 10_000)))
    talk.open().ask(get()).answer(response(9_999) + b"x")
    assert not talk.view.suitable
    talk.answer(b"x" * 9_998).ask(get()).answer(response(10_000) + b"x")
    assert talk.view.suitable


def test_a_download_of_unknown_length_is_large_once_it_has_become_large(talk: Talk) -> None:
    talk.open().ask(get()).answer(response(None) + b"x" * (4 * MIB - 1000), 60_000)
    assert not talk.view.suitable
    talk.answer(b"x" * 2000)
    assert talk.view.suitable
    assert talk.view.reason == "large download, 4.0 MiB so far"


def test_only_the_oldest_exchange_makes_a_connection_suitable(talk: Talk) -> None:
    talk.open().ask(get("/a") + get("/up", "PUT", f"Content-Length: {5 * MIB}") + b"x" * 5000)
    assert not talk.view.suitable, "GET /a is waiting, large upload behind it or not"
    talk.answer(response(0))
    assert talk.view.suitable
    assert talk.view.reason.startswith("large upload, 5.0 MiB of ")
    talk.ask(b"x" * (5 * MIB - 5000), 60_000)
    assert talk.view.reason == "waiting for the response to PUT /up"
    assert not talk.view.suitable


def test_a_large_upload_that_waits_for_leave_to_begin_is_unsuitable(talk: Talk) -> None:
    talk.open().ask(get("/up", "PUT", "Expect: 100-continue", f"Content-Length: {5 * MIB}"))
    assert not talk.view.suitable
    talk.answer(b"HTTP/1.1 100 Continue\r\n\r\n").ask(b"x")
    assert talk.view.suitable


def test_a_late_request_that_was_answered_already_does_not_wait_for_ever(talk: Talk) -> None:
    # The capture shows the answer before its request; the acknowledgement tells.
    talk.open()
    request = get()
    talk.client_seq += len(request)
    talk.answer(response(2) + b"ok")
    talk.client_seq -= len(request)
    talk.ask(request)
    assert (talk.view.suitable, talk.view.requests, talk.view.responses) == (True, 1, 1)
    talk.ask(get("/next"))
    assert not talk.view.suitable


def test_an_answer_nobody_asked_for_answers_no_later_request(talk: Talk) -> None:
    talk.open().answer(response(0, "408 Request Timeout")).ask(get())
    assert not talk.view.suitable


def test_empty_lines_before_a_request_are_ignored(talk: Talk) -> None:
    talk.open().ask(b"\r\n\r\n" + get()).answer(response(0)).ask(b"\r\n")
    assert (talk.view.suitable, talk.view.requests) == (True, 1)


def test_reasons_carry_nothing_dangerous_from_the_wire(talk: Talk) -> None:
    talk.open().ask(b"GET /\x1b[31m\xff" + b"a" * 500 + b" HTTP/1.1\r\n\r\n")
    reason = talk.view.reason
    assert reason.startswith("waiting for the response to GET /?[31m?aaa")
    assert reason.isprintable()
    assert len(reason) < 120


def test_a_head_longer_than_its_limit_is_given_up(talk: Talk) -> None:
    talk.open().ask(b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, 60_000)
    assert (talk.view.verdict, talk.view.reason) == (
        Verdict.UNKNOWN,
        "state unknown (a head is longer than its limit)",
    )
