"""IMAP as the built-in definition has it: tags, literals in both directions, IDLE."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk

from virtgrid.tracker.tracker import Tracker

MIB = 1 << 20
SIZES = [1, 2, 3, 7, 1448]


@pytest.fixture
def talk() -> Talk:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=143).open().answer(b"* OK ready\r\n")
    return talk.ask(b"a LOGIN u p\r\n").answer(b"* CAPABILITY IMAP4rev1\r\na OK in\r\n")


def counts(talk: Talk) -> tuple[int, int]:
    return talk.view.requests, talk.view.responses


def test_the_greeting_is_waited_for_and_answers_nothing() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=143).open()
    assert (talk.view.state, talk.view.reason) == ("new", "just connected, no greeting yet")
    talk.answer(b"* PREAUTH x\r\n")
    assert (talk.view.state, talk.view.protocol, counts(talk)) == ("new", "imap", (0, 0))
    talk.later(10.1)
    assert talk.view.suitable


@pytest.mark.parametrize("size", SIZES)
def test_a_command_is_waited_for_until_its_tagged_answer(talk: Talk, size: int) -> None:
    talk.ask(b"b SELECT INBOX\r\n", size).answer(b"* 3 EXISTS\r\n* OK [UIDNEXT 4] x\r\nc OK\r\n", size)
    assert talk.view.reason == "waiting for the response to b SELECT"
    talk.answer(b"b OK done\r\n", size)
    assert (talk.view.suitable, talk.view.state, talk.view.requests) == (True, "idle", 2)


def test_answers_may_come_in_any_order(talk: Talk) -> None:
    talk.ask(b"b FETCH 1 ALL\r\nc NOOP\r\nd NOOP\r\n").answer(b"c OK\r\nd NO\r\n")
    assert talk.view.reason == "waiting for the response to b FETCH"
    talk.answer(b"b BAD\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (4, 4))


@pytest.mark.parametrize("size", SIZES)
def test_a_literal_of_the_server_is_counted_and_its_line_goes_on(talk: Talk, size: int) -> None:
    talk.ask(b"b FETCH 1 (BODY[] BODY[1])\r\n", size)
    talk.answer(b"* 1 FETCH (BODY[] {11}\r\nb OK fake\r\n BODY[1] {2}\r\nxx UID 3)\r\n", size)
    assert not talk.view.suitable
    talk.answer(b"b OK\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (2, 2))


@pytest.mark.parametrize("size", SIZES)
def test_a_literal_of_the_client_comes_on_leave(talk: Talk, size: int) -> None:
    talk.ask(b"b LOGIN {3}\r\n", size)
    assert talk.view.reason == "waiting for the response to b LOGIN"
    talk.answer(b"+ go\r\n", size)
    assert not talk.view.suitable
    talk.ask(b"a b {12}\r\n", size).answer(b"+ go\r\n", size).ask(b"c NOOP\r\nd OK\r\n", size)
    assert talk.view.reason == "waiting for the response to b LOGIN"
    talk.answer(b"b OK\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (2, 2))


@pytest.mark.parametrize("size", SIZES)
def test_a_literal_that_needs_no_leave_is_counted(talk: Talk, size: int) -> None:
    talk.ask(b"b APPEND x {5+}\r\nc x\r\n) {3+}\r\nabc\r\n", size)
    assert talk.view.reason == "waiting for the response to b APPEND"
    talk.answer(b"b OK\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (2, 2))


def test_a_literal_refused_is_not_sent(talk: Talk) -> None:
    talk.ask(b"b APPEND x {50000}\r\n").answer(b"b NO too big\r\n")
    assert talk.view.suitable
    talk.ask(b"c NOOP\r\n")
    assert talk.view.reason == "waiting for the response to c NOOP"
    talk.answer(b"c OK\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (3, 3))


def test_literals_in_both_directions_can_be_large(talk: Talk) -> None:
    talk.ask(b"b FETCH 1 BODY[]\r\n")
    assert not talk.view.suitable
    talk.answer(b"* 1 FETCH (BODY[] {%d}\r\n" % (5 * MIB))
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    talk.answer(b"x" * 5 * MIB, 60_000)
    assert not talk.view.suitable, "its tagged answer is waited for"
    talk.answer(b")\r\nb OK\r\n").ask(b"c APPEND x {%d}\r\n" % (5 * MIB))
    assert not talk.view.suitable
    talk.answer(b"+ go\r\n")
    assert not talk.view.suitable, "nothing of it has come"
    talk.ask(b"x")
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    talk.ask(b"x" * (5 * MIB - 1), 60_000)
    assert not talk.view.suitable
    talk.ask(b"\r\n").answer(b"c OK\r\n").ask(b"d NOOP\r\n")
    assert not talk.view.suitable, "the next command is not large"


def test_a_client_that_idles_waits_for_news_and_not_for_an_answer(talk: Talk) -> None:
    talk.ask(b"b IDLE\r\n")
    assert not talk.view.suitable, "the server has not agreed yet"
    talk.answer(b"+ idling\r\n")
    assert (talk.view.state, talk.view.suitable) == ("waiting", True)
    assert talk.view.reason == "the client waits for news, nothing else outstanding"
    talk.answer(b"* 4 EXI")
    assert not talk.view.suitable
    talk.answer(b"STS\r\n")
    assert talk.view.suitable
    talk.ask(b"DO")
    assert not talk.view.suitable
    talk.ask(b"NE\r\n")
    assert talk.view.reason == "waiting for the response to b IDLE"
    talk.answer(b"b OK\r\n")
    assert (talk.view.suitable, talk.view.state, counts(talk)) == (True, "idle", (2, 2))


def test_idle_refused_is_an_answer(talk: Talk) -> None:
    talk.ask(b"b IDLE\r\n").answer(b"b BAD\r\n").ask(b"c NOOP\r\n")
    assert talk.view.reason == "waiting for the response to c NOOP"


def test_a_dialogue_of_authentication_is_one_exchange(talk: Talk) -> None:
    talk.ask(b"b AUTHENTICATE LOGIN\r\n").answer(b"+ VXNl\r\n").ask(b"x NOOP\r\n").answer(b"+ UGFz\r\n")
    assert not talk.view.suitable
    talk.ask(b"eA==\r\n").answer(b"b OK\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (2, 2))


def test_after_starttls_the_records_decide(talk: Talk) -> None:
    talk.ask(b"b STARTTLS\r\n").answer(b"b OK go\r\n")
    assert (talk.view.protocol, talk.view.state, counts(talk)) == ("tls", "opaque", (2, 2))


def test_seen_in_the_middle_a_command_makes_it_known() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=143)
    talk.answer(b"* 3 EXISTS\r\n").ask(b"A7 UID FETCH 1 FLAGS\r\n")
    assert talk.view.reason == "waiting for the response to A7 UID"
    talk.answer(b"A7 OK\r\n")
    assert talk.view.suitable


def test_frames_cut_short_are_unknown_until_the_tagged_answer() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=143, snap=400).open().answer(b"* OK ready\r\n")
    talk.ask(b"a LOGIN u p\r\n").answer(b"a OK in\r\n").ask(b"b FETCH 1:9 BODY[]\r\n")
    talk.answer(b"* 1 FETCH (BODY[] {1000}\r\n" + b"x" * 1000 + b")\r\n* 2 FETCH (FLAGS ())\r\n", 60_000)
    assert (talk.view.verdict.value, talk.view.suitable) == ("unknown", False)
    talk.answer(b"b OK done\r\n")
    assert (talk.view.state, talk.view.suitable, talk.view.responses) == ("idle", True, 2)


def test_a_line_of_empty_text_or_nonsense_is_no_trouble(talk: Talk) -> None:
    talk.ask(b"\r\n\r\nx\r\n").answer(b"\r\n* BAD x\r\n")
    assert (talk.view.suitable, talk.view.requests) == (True, 1)
