"""SMTP as the built-in definition has it: every command and every message is waited for to its reply."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk

from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import Verdict

MIB = 1 << 20
SIZES = [1, 2, 3, 7, 1448]


def smtp(**options: object) -> Talk:
    """Between two commands it is silent for as long as it takes to be suitable."""
    return Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=25, pace_s=0.3, **options)  # type: ignore[arg-type]


@pytest.fixture
def talk() -> Talk:
    """Greeted, EHLO answered."""
    talk = smtp().open().answer(b"220 mail.example ESMTP\r\n")
    return talk.ask(b"EHLO a\r\n").answer(b"250-mail.example\r\n250-PIPELINING\r\n250 SIZE\r\n")


def counts(talk: Talk) -> tuple[int, int]:
    return talk.view.requests, talk.view.responses


def waiting_for(talk: Talk, command: str) -> bool:
    view = talk.view
    return not view.suitable and view.reason.startswith(f"waiting for the response to {command}")


def test_before_the_greeting_a_connection_is_unsuitable_for_a_limited_time() -> None:
    talk = smtp().open()
    assert (talk.view.state, talk.view.reason) == ("new", "just connected, no greeting yet")
    talk.later(29.9)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable


def test_greeted_and_nothing_asked_is_unsuitable_for_a_limited_time_from_the_greeting_on() -> None:
    talk = smtp().open().later(20).answer(b"220-mail.example ESMTP\r\n").answer(b"220 ready\r\n")
    assert (talk.view.state, talk.view.suitable, counts(talk)) == ("new", False, (0, 1))
    assert talk.view.reason == "just connected, no request yet"
    talk.later(29.6)
    assert not talk.view.suitable
    talk.later(0.2)
    assert talk.view.suitable
    talk.ask(b"EHLO a\r\n")
    assert not talk.view.suitable


@pytest.mark.parametrize("size", SIZES)
def test_a_reply_ends_with_its_last_line(size: int) -> None:
    talk = smtp().open().answer(b"220 x\r\n", size).ask(b"EHLO a\r\n", size)
    assert waiting_for(talk, "EHLO")
    talk.answer(b"250-x\r\n250-y\r\n", size)
    assert not talk.view.suitable
    talk.answer(b"250 z\r\n", size)
    assert (talk.view.suitable, talk.view.state, counts(talk)) == (True, "idle", (1, 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mail", [b"", b"Subject: x\r\n\r\n..dots\r\n250 not a reply\r\nQUIT\r\n.x\r\n"])
def test_a_message_ends_with_its_dot_and_is_waited_for_until_its_reply(
    talk: Talk, size: int, mail: bytes
) -> None:
    talk.ask(b"DATA\r\n", size)
    assert waiting_for(talk, "DATA")
    talk.answer(b"354 go on\r\n", size)
    assert (talk.view.reason, talk.view.suitable) == ("request body, 0 B so far", False)
    talk.ask(mail + b".\r\n", size)
    assert waiting_for(talk, "DATA")
    talk.answer(b"250 queued\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (2, 4))
    talk.ask(b"QUIT\r\n", size).answer(b"221 bye\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (3, 5))


def test_a_refused_message_leaves_the_client_among_its_commands(talk: Talk) -> None:
    talk.ask(b"DATA\r\n").answer(b"503 no recipients\r\n")
    assert (talk.view.suitable, talk.view.state) == (True, "idle")
    talk.ask(b"RSET\r\n")
    assert waiting_for(talk, "RSET")
    talk.answer(b"250 ok\r\n")
    assert talk.view.suitable


def test_a_client_that_does_not_wait_for_leave_is_read_all_the_same(talk: Talk) -> None:
    talk.ask(b"DATA\r\nSubject: x\r\n\r\nQUIT\r\n.\r\n")
    assert not talk.view.suitable
    talk.answer(b"354 go on\r\n")
    assert waiting_for(talk, "DATA")
    talk.answer(b"250 queued\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (2, 4))


def test_commands_sent_together_are_all_waited_for(talk: Talk) -> None:
    talk.ask(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nDATA\r\n")
    assert waiting_for(talk, "MAIL")
    talk.answer(b"250 ok\r\n250 ok\r\n550 no\r\n")
    assert waiting_for(talk, "DATA")
    talk.answer(b"354 go on\r\n").ask(b"x\r\n.\r\nQUIT\r\n").answer(b"250 queued\r\n")
    assert waiting_for(talk, "QUIT")
    talk.answer(b"221 bye\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (6, 8))


@pytest.mark.parametrize("size", SIZES)
def test_chunks_are_counted(talk: Talk, size: int) -> None:
    talk.ask(b"BDAT 11\r\n\r\n.\r\nQUIT\r", size)
    assert talk.view.reason == "request body, 1 B left"
    talk.ask(b"\n", size)
    assert waiting_for(talk, "BDAT 11")
    talk.answer(b"250 ok\r\n", size).ask(b"BDAT 0 LAST\r\n", size)
    assert waiting_for(talk, "BDAT 0")
    talk.answer(b"250 ok\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (3, 4))


def test_pipelined_chunks_are_all_waited_for(talk: Talk) -> None:
    talk.ask(b"BDAT 3\r\nabcBDAT 4 LAST\r\ndefgRSET\r\n").answer(b"250 1\r\n250 2\r\n")
    assert waiting_for(talk, "RSET")
    talk.answer(b"250 3\r\n")
    assert talk.view.suitable


@pytest.mark.parametrize("size", SIZES)
def test_a_dialogue_of_authentication_is_one_exchange(talk: Talk, size: int) -> None:
    talk.ask(b"AUTH LOGIN\r\n", size).answer(b"334 VXNlcm5hbWU6\r\n", size)
    assert talk.view.reason == "the client's turn to go on with AUTH LOGIN"
    assert not talk.view.suitable
    talk.ask(b"QUITquit\r\n", size)
    assert waiting_for(talk, "AUTH LOGIN")
    talk.answer(b"334 UGFzc3dvcmQ6\r\n", size).ask(b"cGFzcw==\r\n", size)
    assert waiting_for(talk, "AUTH LOGIN")
    talk.answer(b"235 good\r\n", size).ask(b"NOOP\r\n", size)
    assert waiting_for(talk, "NOOP")
    talk.answer(b"250 ok\r\n", size)
    assert (talk.view.suitable, counts(talk)) == (True, (3, 6))


def test_authentication_in_one_step_or_refused_ends_at_once(talk: Talk) -> None:
    talk.ask(b"AUTH PLAIN AGEAYg==\r\n").answer(b"535 no\r\n").ask(b"AUTH LOGIN\r\n").answer(b"334 x\r\n")
    talk.ask(b"*\r\n").answer(b"501 cancelled\r\n").ask(b"QUIT\r\n")
    assert waiting_for(talk, "QUIT")


def test_after_starttls_the_records_decide(talk: Talk) -> None:
    talk.ask(b"STARTTLS\r\n")
    assert waiting_for(talk, "STARTTLS")
    talk.answer(b"220 go\r\n")
    assert (talk.view.protocol, talk.view.state, talk.view.suitable) == ("tls", "opaque", False)
    talk.ask(b"\x16\x03\x01\x00\x05hel")
    talk.later(29)
    assert (talk.view.suitable, talk.view.reason) == (False, "TLS, inside a record")
    talk.ask(b"lo").answer(b"\x16\x03\x03\x00\x02hi")
    talk.later(2.1)
    assert talk.view.suitable


def test_starttls_refused_changes_nothing(talk: Talk) -> None:
    talk.ask(b"STARTTLS\r\n").answer(b"454 not now\r\n")
    assert (talk.view.protocol, talk.view.state, talk.view.suitable) == ("smtp", "idle", True)


def test_a_large_message_is_suitable_from_its_first_byte_when_its_size_was_announced(talk: Talk) -> None:
    talk.ask(b"MAIL FROM:<a@b> SIZE=%d BODY=8BITMIME\r\n" % (5 * MIB)).answer(b"250 ok\r\n")
    talk.ask(b"DATA\r\n").answer(b"354 go on\r\n")
    assert not talk.view.suitable, "nothing of it has come"
    talk.ask(b"x" * 1000)
    assert (talk.view.state, talk.view.suitable) == ("moving", True)
    talk.ask(b"\r\n.\r\n")
    assert not talk.view.suitable, "its reply is waited for"
    talk.answer(b"250 queued\r\n").ask(b"MAIL FROM:<a@b>\r\nDATA\r\n").answer(b"250 ok\r\n354 go on\r\n")
    talk.ask(b"small")
    assert not talk.view.suitable, "the next message is not large"
    assert talk.view.large_transfers == 1


def test_a_message_of_unknown_size_is_large_once_it_has_become_large(talk: Talk) -> None:
    talk.ask(b"DATA\r\n").answer(b"354 go on\r\n").ask(b"x" * (4 * MIB - 1), 60_000)
    assert not talk.view.suitable
    talk.ask(b"x")
    assert (talk.view.suitable, talk.view.reason) == (True, "large upload, 4.0 MiB so far")


def test_a_large_chunk_is_suitable_while_it_runs(talk: Talk) -> None:
    talk.ask(b"BDAT %d LAST\r\n" % (5 * MIB) + b"x" * 100)
    assert (talk.view.state, talk.view.suitable) == ("moving", True)


def test_a_server_that_gives_up_says_so_unasked(talk: Talk) -> None:
    talk.later(300).answer(b"421 timeout\r\n")
    assert talk.view.suitable
    talk.ask(b"NOOP\r\n")
    assert waiting_for(talk, "NOOP")


def test_what_is_said_to_a_client_that_has_hung_up_is_a_reply_that_answers_nothing(talk: Talk) -> None:
    talk.ask(b"NOOP\r\n").answer(b"250 OK\r\n").fin(to_server=True)
    assert (talk.view.state, talk.view.suitable, counts(talk)) == ("closing", True, (2, 3))
    talk.answer(b"421 mail.example lost input connection\r\n")
    assert (talk.view.state, talk.view.suitable, counts(talk)) == ("closing", True, (2, 4))


def test_a_client_that_talks_before_the_greeting_is_waited_for() -> None:
    talk = smtp().open().ask(b"EHLO a\r\n")
    assert (talk.view.protocol, talk.view.state, talk.view.suitable) == ("smtp", "busy", False)
    talk.answer(b"220 x\r\n")
    assert waiting_for(talk, "EHLO")
    talk.answer(b"250 y\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (1, 2))


def test_lmtp_is_judged_by_silence() -> None:
    talk = smtp().open().answer(b"220 x LMTP\r\n").ask(b"LHLO a\r\n")
    assert (talk.view.state, talk.view.suitable) == ("opaque", False)


def test_the_clients_first_line_tells_smtp_from_ftp_on_any_port() -> None:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    mail = Talk(tracker, server_port=2600, client_port=1).open().answer(b"220 hello\r\n").ask(b"EHLO a\r\n")
    files = Talk(tracker, server_port=2601, client_port=2).open().answer(b"220 hello\r\n").ask(b"USER a\r\n")
    assert (mail.view.protocol, files.view.protocol) == ("smtp", "ftp")
    mail.answer(b"250 x\r\n").ask(b"DATA\r\n").answer(b"354 go\r\n").ask(b"x\r\n")
    assert mail.view.reason == "request body, 3 B so far"


def test_a_line_longer_than_its_limit_is_still_one_command(talk: Talk) -> None:
    talk.ask(b"RCPT TO:<" + b"a" * 100_000 + b">\r\n", 20_000)
    assert waiting_for(talk, "RCPT")
    talk.answer(b"500 too long\r\n")
    assert (talk.view.suitable, counts(talk)) == (True, (2, 3))


def test_seen_in_the_middle_a_command_or_its_reply_makes_it_known() -> None:
    talk = smtp().ask(b"x" * 100 + b"\r\n")
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.ask(b"MAIL FROM:<a@b>\r\n")
    assert waiting_for(talk, "MAIL")
    talk.answer(b"250 2.1.0 ok\r\n")
    assert (talk.view.suitable, talk.view.state) == (True, "idle")


def test_seen_in_the_middle_of_a_message_it_is_unknown_until_its_reply() -> None:
    talk = smtp().ask(b"Hello world\r\nDATA is what\r\n")
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.ask(b"more\r\n.\r\n")
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.answer(b"250 2.0.0 queued\r\n")
    assert talk.view.suitable


def test_after_a_gap_a_reply_may_answer_what_was_missed(talk: Talk) -> None:
    talk.ask(b"NOOP\r\n").tracker.frames_lost(talk.at_s)
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.answer(b"250 Ok\r\n")
    assert talk.view.verdict is Verdict.UNKNOWN
    talk.ask(b"NOOP\r\n").answer(b"250 Ok\r\n")
    assert (talk.view.suitable, talk.view.state) == (True, "idle")


def test_leave_captured_before_it_was_asked_for_makes_it_unknown(talk: Talk) -> None:
    talk.client_seq += 6
    talk.answer(b"354 go on\r\n")
    talk.client_seq -= 6
    talk.ask(b"DATA\r\n").ask(b"NOOP is no command here\r\n.\r\n")
    assert not talk.view.suitable
    talk.answer(b"250 2.0.0 queued\r\n")
    assert talk.view.suitable
    talk.ask(b"QUIT\r\n")
    assert waiting_for(talk, "QUIT")


def test_a_hole_in_a_message_hides_perhaps_its_end(talk: Talk) -> None:
    talk.ask(b"DATA\r\n").answer(b"354 go on\r\n").ask(b"x" * 1000)
    talk.lose(to_server=True, length=1000).ask(b"y" * 1000)
    assert not talk.view.suitable
    talk.answer(b"250 queued\r\n")
    assert talk.view.suitable
    talk.ask(b"QUIT\r\n")
    assert waiting_for(talk, "QUIT")


def test_a_message_in_frames_cut_short_is_never_called_suitable_before_its_reply() -> None:
    talk = smtp(snap=400).open().answer(b"220 x\r\n").ask(b"EHLO a\r\n").answer(b"250 y\r\n")
    talk.ask(b"DATA\r\n").answer(b"354 go on\r\n")
    for _ in range(100):
        talk.ask(b"x" * 60_000, 60_000)
        assert not talk.view.suitable
    talk.ask(b"x" * 1000 + b"\r\n.\r\n", 60_000)
    assert not talk.view.suitable
    talk.answer(b"250 queued\r\n")
    assert (talk.view.suitable, talk.view.state, talk.view.gaps) == (True, "idle", 0)


def test_a_large_message_in_frames_cut_short_is_moving_where_their_rest_can_be_had() -> None:
    talk = smtp(snap=400, rests=True).open().answer(b"220 x\r\n").ask(b"EHLO a\r\n").answer(b"250 y\r\n")
    talk.ask(b"DATA\r\n").answer(b"354 go on\r\n").ask(b"x" * (4 * MIB - 1), 60_000)
    assert not talk.view.suitable
    talk.ask(b"x" * 60_000, 60_000)
    assert (talk.view.suitable, talk.view.state) == (True, "moving")
    talk.ask(b"x" * 50_000 + b"\r\n.\r\nMAIL FROM:<a@b>\r\n", 60_000)
    assert (waiting_for(talk, "DATA"), talk.view.gaps) == (True, 0)
    talk.answer(b"250 queued\r\n250 ok\r\n")
    assert (talk.view.state, *counts(talk)) == ("idle", 3, 5)
