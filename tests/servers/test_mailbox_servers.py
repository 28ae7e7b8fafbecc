"""The tracker beside Dovecot: POP3 and IMAP, with curl and Python's poplib and imaplib."""

from __future__ import annotations

import imaplib
import poplib
import socket
import ssl
from pathlib import Path

import pytest
from following import Following, until
from mailboxes import IMAP, LARGE, MEDIUM, POP3, SIZES, Lines, imap, pop3

from virtgrid.lab.servers import layout, mail
from virtgrid.lab.servers.host import ServerHost

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("mtu_frames")]

ADDRESSES = pytest.mark.parametrize("address", [layout.GUEST_V4, layout.GUEST_V6], ids=["v4", "v6"])


def insecure() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


# -- POP3 ----------------------------------------------------------------------------------


@ADDRESSES
@pytest.mark.parametrize(("what", "large"), [("", 0), ("2", 0), (str(MEDIUM), 0), (str(LARGE), 1)])
def test_curl_over_pop3_is_counted(
    host: ServerHost, following: Following, user: str, address: str, what: str, large: int
) -> None:
    target = f"pop3://[{address}]/{what}" if ":" in address else f"pop3://{address}/{what}"
    client = host.client("curl", "-sS", "-o", "/dev/null", "-u", f"{user}:{mail.PASSWORD}", target)
    assert client.wait(30) == 0
    (one,) = following.until_closed()
    # CAPA, AUTH, LIST or RETR, QUIT; the greeting is an answer too.
    assert (one.protocol, one.requests, one.responses) == ("pop3", 4, 5)
    assert one.large_transfers == large


def test_poplib_on_one_connection_is_counted(host: ServerHost, following: Following, user: str) -> None:
    def session() -> None:
        box = poplib.POP3(layout.GUEST_V4, timeout=20)
        box.user(user)
        box.pass_(mail.PASSWORD)
        count, _ = box.stat()
        box.list()
        box.uidl()
        for number in range(1, count):
            box.retr(number)
        box.top(1, 0)
        box.quit()

    host.in_client(session)
    (one,) = following.until_closed()
    # USER PASS STAT LIST UIDL, 4 × RETR, TOP QUIT
    assert (one.requests, one.responses, one.gaps) == (11, 12, 0)


def test_a_pop3_message_that_is_not_fetched_holds_and_a_large_one_does_not(
    host: ServerHost, following: Following, user: str
) -> None:
    with pop3(host, user, stalling=True) as box:
        following.until_state("idle", POP3)
        box.tell(f"RETR {MEDIUM}")
        following.until_unsuitable("response, ", POP3)
        assert box.until_dot() > SIZES[MEDIUM - 1]
        following.until_state("idle", POP3)
        box.tell(f"RETR {LARGE}")
        one = following.until_state("moving", POP3)
        assert one.suitable
        assert one.reason.startswith("large download, ")
        assert box.until_dot() > SIZES[LARGE - 1]
        one = following.until_state("idle", POP3)
        assert (one.requests, one.responses, one.large_transfers) == (4, 5, 1)


def test_a_message_out_of_a_large_maildrop_is_large_once_its_sizes_are_known(
    host: ServerHost, following: Following, user: str
) -> None:
    with pop3(host, user, stalling=True) as box:
        box.tell("LIST")
        box.until_dot()
        following.until_state("idle", POP3)
        box.tell(f"RETR {MEDIUM}")
        assert following.until_state("moving", POP3).suitable
        box.until_dot()


def test_pipelined_pop3_commands_are_counted(host: ServerHost, following: Following, user: str) -> None:
    with pop3(host, user) as box:
        box.sock.sendall(b"STAT\r\nLIST 2\r\nRETR 1\r\nNOOP\r\nTOP 2 0\r\n")
        assert box.line().startswith("+OK 5 ")
        assert box.line().startswith("+OK 2 ")
        box.line()
        box.until_dot()
        assert box.line() == "+OK"
        box.line()
        box.until_dot()
        one = following.until_state("idle", POP3)
        assert (one.requests, one.responses) == (7, 8)


def test_a_pop3_login_that_is_refused_leaves_nothing_outstanding(
    host: ServerHost, following: Following, user: str
) -> None:
    with Lines(host, POP3) as box:
        box.tell(f"USER {user}")
        box.line()
        box.tell("PASS wrong")
        # Dovecot takes two seconds over a wrong password.
        following.until_unsuitable("waiting for the response to PASS", POP3)
        assert box.line().startswith("-ERR")
        one = following.until_state("idle", POP3)
        assert (one.requests, one.responses) == (2, 3)


def test_no_password_gets_into_a_reason(host: ServerHost, following: Following, user: str) -> None:
    with Lines(host, POP3) as box:
        for command in (f"USER {user}", f"PASS {mail.PASSWORD}", "QUIT"):
            box.tell(command)
            assert box.line().startswith("+OK")
            # Silent for a moment it is suitable: then the next command is a change, with its reason.
            until(lambda: not following.open(POP3) or following.open(POP3)[0].suitable, "a moment of silence")
    reasons = [change.reason for change in following.changes]
    assert any("PASS" in reason for reason in reasons)
    assert not [reason for reason in reasons if mail.PASSWORD in reason]


def test_pop3_under_tls_is_opaque(host: ServerHost, following: Following, user: str) -> None:
    def session() -> None:
        box = poplib.POP3(layout.GUEST_V4, timeout=20)
        box.stls(insecure())
        box.user(user)
        box.pass_(mail.PASSWORD)
        box.retr(2)
        box.quit()

    host.in_client(session)
    (one,) = following.until_closed()
    # CAPA (poplib asks first) and STLS
    assert (one.protocol, one.requests, one.responses) == ("tls", 2, 3)


# -- IMAP ----------------------------------------------------------------------------------


@ADDRESSES
@pytest.mark.parametrize(("number", "large"), [(2, 0), (MEDIUM, 0), (LARGE, 1)])
def test_curl_over_imap_is_counted(
    host: ServerHost, following: Following, user: str, address: str, number: int, large: int
) -> None:
    name = f"[{address}]" if ":" in address else address
    target = f"imap://{name}/INBOX;MAILINDEX={number}"
    client = host.client("curl", "-g", "-sS", "-o", "/dev/null", "-u", f"{user}:{mail.PASSWORD}", target)
    assert client.wait(30) == 0
    (one,) = following.until_closed()
    # CAPABILITY AUTHENTICATE SELECT FETCH LOGOUT
    assert (one.protocol, one.requests, one.responses) == ("imap", 5, 5)
    assert one.large_transfers == large


def test_imaplib_with_literals_in_both_directions_is_counted(
    host: ServerHost, following: Following, user: str
) -> None:
    def session() -> None:
        box = imaplib.IMAP4(layout.GUEST_V4, timeout=20)
        box.login(user, mail.PASSWORD)
        box.select()
        assert len(box.fetch("1:4", "(RFC822.SIZE BODY.PEEK[HEADER])")[1]) >= 4
        box.fetch("1:3", "(BODY.PEEK[])")
        box.append("INBOX", None, None, mail.message(9, 30_000))
        box.store("1", "+FLAGS", "\\Seen")
        box.search(None, "ALL")
        box.noop()
        box.close()
        box.logout()

    host.in_client(session)
    (one,) = following.until_closed()
    # CAPABILITY LOGIN SELECT 2 × FETCH APPEND STORE SEARCH NOOP CLOSE LOGOUT
    assert (one.requests, one.responses) == (11, 11)
    assert one.bytes_to_server > 30_000


def test_an_imap_message_that_is_not_fetched_holds_and_a_large_one_does_not(
    host: ServerHost, following: Following, user: str
) -> None:
    with imap(host, user, stalling=True) as box:
        following.until_state("idle", IMAP)
        box.tell(f"a3 FETCH {MEDIUM} BODY.PEEK[]")
        following.until_unsuitable("response, ", IMAP)
        box.until_line("a3 OK")
        following.until_state("idle", IMAP)
        box.tell(f"a4 FETCH {LARGE} BODY.PEEK[]")
        one = following.until_state("moving", IMAP)
        assert one.suitable
        assert one.reason.startswith("large download, ")
        box.until_line("a4 OK")
        one = following.until_state("idle", IMAP)
        assert (one.requests, one.responses, one.large_transfers) == (4, 4, 1)


def test_an_append_that_is_half_sent_holds(host: ServerHost, following: Following, user: str) -> None:
    text = mail.message(1, 2000)
    with imap(host, user) as box:
        box.tell(f"a3 APPEND INBOX {{{len(text)}}}")
        assert box.line().startswith("+")
        following.until_unsuitable("", IMAP)
        box.sock.sendall(text[:500])
        following.until_unsuitable(f"request body, {(len(text) - 500) / 1024:.1f} KiB left", IMAP)
        box.sock.sendall(text[500:])
        # Its literal is complete, its command is not: the line's end is missing.
        following.until_unsuitable("", IMAP)
        box.tell("")
        box.until_line("a3 OK")
        one = following.until_state("idle", IMAP)
        assert (one.requests, one.responses) == (3, 3)


def test_a_large_append_is_a_large_transfer(host: ServerHost, following: Following, user: str) -> None:
    text = mail.message(1, 5 << 20)
    with imap(host, user) as box:
        box.tell(f"a3 APPEND INBOX {{{len(text)}}}")
        assert box.line().startswith("+")
        box.sock.sendall(text[:1000])
        assert following.until_state("moving", IMAP).reason.startswith("large upload, ")
        box.sock.sendall(text[1000:])
        box.tell("")
        box.until_line("a3 OK")
        assert following.until_state("idle", IMAP).large_transfers == 1


def test_an_idle_mailbox_is_suitable_and_stays_so_when_mail_arrives(
    host: ServerHost, following: Following, user: str
) -> None:
    with imap(host, user) as box, imap(host, user) as other:
        box.tell("a3 IDLE")
        assert box.line().startswith("+")
        view = next(
            iter(one for one in following.open(IMAP) if one.client.endswith(f":{box.sock.getsockname()[1]}"))
        )

        def state() -> str:
            mine = [one for one in following.open(IMAP) if one.client == view.client]
            return mine[0].state if mine else ""

        until(lambda: state() == "waiting", "IDLE is recognised")
        text = mail.message(7, 300)
        other.tell(f"a3 APPEND INBOX {{{len(text)}}}")
        other.line()
        other.sock.sendall(text + b"\r\n")
        other.until_line("a3 OK")
        assert box.until_line("* 6 EXISTS")
        until(lambda: state() == "waiting", "still waiting for news")
        assert all(one.suitable for one in following.open(IMAP))
        box.tell("DONE")
        box.until_line("a3 OK")
        until(lambda: state() == "idle", "IDLE has ended")
        (mine,) = [one for one in following.open(IMAP) if one.client == view.client]
        assert (mine.requests, mine.responses) == (3, 3)


def test_pipelined_imap_commands_are_counted_by_their_tags(
    host: ServerHost, following: Following, user: str
) -> None:
    with imap(host, user) as box:
        box.sock.sendall(b"x1 NOOP\r\nx2 FETCH 2 BODY.PEEK[]\r\nx3 STATUS INBOX (MESSAGES)\r\nx4 NOOP\r\n")
        # Dovecot answers them in an order of its own.
        tags = {"x1 OK", "x2 OK", "x3 OK", "x4 OK"}
        while tags:
            tags.discard(box.line()[:5])
        following.until_suitable(IMAP)
        one = following.until_counted(6, 6, IMAP)
        assert one.gaps == 0


def test_imap_under_tls_is_opaque(host: ServerHost, following: Following, user: str) -> None:
    def session() -> None:
        box = imaplib.IMAP4(layout.GUEST_V4, timeout=20)
        box.starttls(insecure())
        box.login(user, mail.PASSWORD)
        box.select()
        box.logout()

    host.in_client(session)
    (one,) = following.until_closed()
    assert one.protocol == "tls"
    # CAPABILITY and STARTTLS
    assert (one.requests, one.responses) == (2, 2)


@pytest.mark.parametrize("port", [mail.POP3S_PORT, mail.IMAPS_PORT], ids=["pop3s", "imaps"])
def test_tls_from_the_first_byte_is_opaque_and_suitable_when_silent(
    host: ServerHost, following: Following, port: int
) -> None:
    with insecure().wrap_socket(host.connect(port)) as sock:
        sock.recv(100)
        one = following.until_unsuitable("TLS, ", port)
        assert (one.protocol, one.state) == ("tls", "opaque")
        until(lambda: following.open(port)[0].suitable, "silence")
        assert following.reason(port).startswith("TLS, quiet for ")


@pytest.mark.parametrize(
    ("port", "first", "second"), [(POP3, "NOOP", "RETR 1"), (IMAP, "b1 NOOP", "b2 FETCH 1 BODY.PEEK[]")]
)
def test_a_mailbox_connection_whose_start_was_missed_is_unknown_until_a_known_command(
    host: ServerHost, user: str, tmp_path: Path, port: int, first: str, second: str
) -> None:
    login = pop3 if port == POP3 else imap
    with login(host, user) as box, Following.on(host, tmp_path / "late.pcap") as following:
        box.tell(first)
        box.line()
        box.tell(second)
        box.until_dot() if port == POP3 else box.until_line("b2 OK")
        following.until_suitable(port)
        one = following.until_counted(2, 2, port)
        assert one.protocol == ("pop3" if port == POP3 else "imap")


def test_a_connection_without_a_greeting_read_is_still_one(host: ServerHost, following: Following) -> None:
    with host.connect(POP3) as sock:
        assert isinstance(sock, socket.socket)
        one = following.until_unsuitable("no request yet", POP3)
        assert (one.protocol, one.state, one.requests, one.responses) == ("pop3", "new", 0, 1)
