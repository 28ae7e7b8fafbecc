"""POP3 as the built-in definition has it: answers of one line and of many, and the sizes they announce."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk

from virtgrid.tracker.tracker import Tracker

MIB = 1 << 20
SIZES = [1, 2, 3, 7, 1448]


def pop3(**options: object) -> Talk:
    """Between two commands it is silent for as long as it takes to be suitable."""
    return Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=110, pace_s=0.3, **options)  # type: ignore[arg-type]


@pytest.fixture
def talk() -> Talk:
    """Greeted and logged in."""
    talk = pop3().open().answer(b"+OK ready\r\n")
    return talk.ask(b"USER a\r\n").answer(b"+OK\r\n").ask(b"pass b\r\n").answer(b"+OK\r\n")


def counts(talk: Talk) -> tuple[int, int]:
    return talk.view.requests, talk.view.responses


def test_the_greeting_is_waited_for() -> None:
    talk = pop3().open()
    assert (talk.view.state, talk.view.reason) == ("new", "just connected, no greeting yet")
    talk.answer(b"+OK ready\r\n")
    assert (talk.view.state, talk.view.protocol, talk.view.suitable) == ("new", "pop3", False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mail", [b"", b"x\r\n", b"+OK\r\n..\r\n.x\r\n\r\n"])
def test_a_message_is_waited_for_until_its_dot(talk: Talk, size: int, mail: bytes) -> None:
    talk.ask(b"RETR 1\r\n", size)
    assert talk.view.reason == "waiting for the response to RETR 1"
    talk.answer(b"+OK 120 octets\r\n" + mail + b".\r", size)
    assert not talk.view.suitable
    talk.answer(b"\n", size)
    assert (talk.view.suitable, talk.view.state, counts(talk)) == (True, "idle", (3, 4))


@pytest.mark.parametrize("command", [b"LIST", b"UIDL", b"CAPA", b"AUTH", b"TOP 1 0"])
@pytest.mark.parametrize("size", SIZES)
def test_an_answer_of_many_lines_is_waited_for(talk: Talk, command: bytes, size: int) -> None:
    talk.ask(command + b"\r\n", size).answer(b"+OK\r\n1 120\r\n2 x\r\n", size)
    assert not talk.view.suitable
    talk.answer(b".\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (3, 4))


@pytest.mark.parametrize("command", [b"LIST 1", b"UIDL 1", b"STAT", b"DELE 1", b"NOOP", b"RETR 9", b"XYZ"])
def test_an_answer_of_one_line_or_an_error_ends_at_once(talk: Talk, command: bytes) -> None:
    talk.ask(command + b"\r\n")
    assert not talk.view.suitable
    talk.answer(b"-ERR no\r\n" if command == b"RETR 9" else b"+OK 1 2\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (3, 4))


def test_pipelined_commands_are_all_waited_for(talk: Talk) -> None:
    talk.ask(b"RETR 1\r\nDELE 1\r\nLIST\r\n").answer(b"+OK\r\nmail\r\n.\r\n+OK\r\n")
    assert talk.view.reason == "waiting for the response to LIST"
    talk.answer(b"+OK\r\n.\r\n")
    assert talk.view.suitable


def test_a_large_message_is_suitable_as_soon_as_it_comes(talk: Talk) -> None:
    talk.ask(b"RETR 1\r\n")
    assert not talk.view.suitable
    talk.answer(b"+OK %d octets\r\nx" % (5 * MIB))
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    talk.answer(b"\r\n.\r\n").ask(b"RETR 2\r\n").answer(b"+OK 100 octets\r\nx")
    assert not talk.view.suitable, "the next one is not large"


def test_messages_out_of_a_large_maildrop_count_as_one_large_transfer(talk: Talk) -> None:
    talk.ask(b"LIST\r\n").answer(b"+OK 3 messages:\r\n1 2000000\r\n2 2000000\r\n3 2000000\r\n")
    assert not talk.view.suitable, "the list itself is not large"
    talk.answer(b".\r\n").ask(b"RETR 1\r\n")
    assert not talk.view.suitable, "its answer has not begun"
    talk.answer(b"+OK 2000000 octets\r\nx")
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    talk.answer(b"\r\n.\r\n").ask(b"UIDL\r\n").answer(b"+OK\r\n1 x\r\n")
    assert not talk.view.suitable
    talk.answer(b".\r\n").ask(b"LIST\r\n").answer(b"+OK\r\n1 20\r\n.\r\n").ask(b"RETR 1\r\n")
    talk.answer(b"+OK\r\nx")
    assert not talk.view.suitable, "a small list now"


def test_the_size_of_the_maildrop_may_come_from_stat(talk: Talk) -> None:
    talk.ask(b"STAT\r\n").answer(b"+OK 700 9000000\r\n").ask(b"RETR 1\r\n").answer(b"+OK\r\nx")
    assert talk.view.suitable


def test_a_dialogue_of_authentication_is_one_exchange() -> None:
    talk = pop3().open().answer(b"+OK\r\n")
    talk.ask(b"AUTH PLAIN\r\n").answer(b"+ \r\n").ask(b"UUIT\r\n")
    assert talk.view.reason == "waiting for the response to AUTH PLAIN"
    talk.answer(b"+OK\r\n").ask(b"QUIT\r\n")
    assert talk.view.reason == "waiting for the response to QUIT"
    assert counts(talk) == (2, 2)


def test_after_stls_the_records_decide() -> None:
    talk = pop3().open().answer(b"+OK\r\n")
    talk.ask(b"STLS\r\n").answer(b"+OK go\r\n").ask(b"\x16\x03\x01\x00\x02ab")
    assert (talk.view.protocol, talk.view.state, talk.view.suitable) == ("tls", "opaque", False)
    talk.later(5)
    assert not talk.view.suitable, "the client spoke last"
    talk.later(6)
    assert talk.view.suitable


def test_seen_in_the_middle_of_a_message_it_is_unknown_until_the_next_command() -> None:
    talk = pop3()
    talk.answer(b"line of a mail\r\n")
    assert talk.view.verdict.value == "unknown"
    talk.ask(b"DELE 1\r\n")
    assert talk.view.reason == "waiting for the response to DELE"
    talk.answer(b"+OK\r\n")
    assert talk.view.suitable


def test_a_large_message_in_frames_cut_short_may_have_ended_in_any_of_them() -> None:
    talk = pop3(snap=400).open().answer(b"+OK\r\n")
    talk.ask(b"RETR 1\r\n").answer(b"+OK 100000 octets\r\n" + b"x" * 60_000, 60_000)
    assert talk.view.verdict.value == "unknown"
    talk.answer(b"y" * 39_000, 39_000).answer(b"\r\n.\r\n")
    assert (talk.view.state, talk.view.suitable, talk.view.gaps) == ("idle", True, 0)


def test_between_two_commands_it_is_suitable_once_it_has_been_silent() -> None:
    talk = pop3().open().answer(b"+OK ready\r\n").ask(b"STAT\r\n")
    talk.pace_s = 0.0
    talk.answer(b"+OK 2 320\r\n").later(0.2)
    assert (talk.view.state, talk.view.suitable) == ("idle", False)
    assert talk.view.reason == "nothing outstanding, last traffic 0.2 s ago"
    talk.later(0.1)
    assert (talk.view.suitable, talk.view.reason) == (True, "keep-alive, nothing outstanding")
    talk.ask(b"RETR 1\r\n").later(10)
    assert talk.view.reason == "waiting for the response to RETR 1"
