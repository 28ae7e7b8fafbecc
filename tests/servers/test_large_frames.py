"""Messages that end and begin within frames of 64 KB, behind what a slot of the ring holds of them.

A guest leaves segmentation to others, and a client that stalls makes it send what has queued up in
frames as large as they go. The live tracker finds what lies deep in them all the same: it comes
to what whole frames come to.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
from following import Following, until, until_quiet
from mailboxes import IMAP, LARGE, MEDIUM, POP3, Lines, imap, pop3
from test_http_servers import ask, read_answer, read_answer_exactly
from test_smtp_server import SMTP, begin, reply, smtp

from virtgrid.lab.servers import mail
from virtgrid.lab.servers.host import ServerHost
from virtgrid.lab.servers.web import APACHE_PORT, NGINX_PORT, NGINX_TLS_PORT
from virtgrid.tracker.tracker import LARGE_BYTES

pytestmark = pytest.mark.lab


Line = TypeVar("Line")


def followed(
    host: ServerHost,
    tmp_path: Path,
    connect: Callable[[], AbstractContextManager[Line]],
    talk: Callable[[Following, Line], None],
) -> tuple[int, int, int]:
    """Follow a conversation of one connection; its requests, answers and gaps in the recording.

    The connection outlives the recording: what a server says to a client that has hung up (Exim: ``421
    lost input connection``) comes soon after, or too late to be recorded, and is no part of it.
    """
    until_quiet(host)
    with ExitStack() as hanging_up, Following.on(host, tmp_path / "conversation.pcap") as following:
        talk(following, hanging_up.enter_context(connect()))
    following.check_replay()
    (one,) = following.replayed()
    return one.view.requests, one.view.responses, one.view.gaps


@pytest.mark.parametrize("port", [NGINX_PORT, APACHE_PORT], ids=["nginx", "apache"])
def test_pipelined_answers(host: ServerHost, tmp_path: Path, port: int) -> None:
    names = ("small", "page", "medium", "small")

    def talk(following: Following, sock: socket.socket) -> None:
        for name in names:
            ask(sock, "GET", name)
        following.until_unsuitable("", port)
        for name in names:
            # Most of the third is still to come. Behind it the fourth may have come as well.
            if name != "small":
                assert not following.open(port)[0].suitable
            assert read_answer_exactly(sock) == 200
        ask(sock, "GET", "small")
        assert read_answer(sock) == 200
        following.until_state("idle", port)

    assert followed(host, tmp_path, lambda: host.connect(port, receive_bytes=4096), talk) == (5, 5, 0)


def test_an_answer_under_tls(host: ServerHost, tmp_path: Path) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])

    def talk(following: Following, sock: socket.socket) -> None:
        ask(sock, "GET", "medium")
        following.until_unsuitable("TLS, inside a record", NGINX_TLS_PORT)
        assert read_answer_exactly(sock) == 200
        # Every record has come to its end, those that begin deep in a frame too.
        following.until_suitable(NGINX_TLS_PORT)
        assert following.open(NGINX_TLS_PORT)[0].reason.startswith("TLS, quiet for 2.")

    def connect() -> socket.socket:
        return context.wrap_socket(host.connect(NGINX_TLS_PORT, receive_bytes=4096))

    assert followed(host, tmp_path, connect, talk) == (0, 0, 0)


def test_messages_by_pop3(host: ServerHost, tmp_path: Path, user: str) -> None:
    def talk(following: Following, box: Lines) -> None:
        for number in (MEDIUM, LARGE, 3):
            box.tell(f"RETR {number}")
            until(lambda: following.open(POP3)[0].state != "idle", "it is asked for")
            box.until_dot()
            box.tell("NOOP")
            box.line()
            following.until_state("idle", POP3)

    assert followed(host, tmp_path, lambda: pop3(host, user, stalling=True), talk) == (8, 9, 0)


def test_messages_by_imap(host: ServerHost, tmp_path: Path, user: str) -> None:
    def talk(following: Following, box: Lines) -> None:
        for number in (MEDIUM, LARGE, 3):
            box.tell(f"f{number} FETCH {number} BODY.PEEK[]")
            until(lambda: following.open(IMAP)[0].state != "idle", "it is asked for")
            box.until_line(f"f{number} OK")
            box.tell(f"n{number} NOOP")
            box.until_line(f"n{number} OK")
            following.until_state("idle", IMAP)

    assert followed(host, tmp_path, lambda: imap(host, user, stalling=True), talk) == (8, 8, 0)


def test_a_large_append(host: ServerHost, tmp_path: Path, user: str) -> None:
    text = mail.message(1, 5 << 20)

    def talk(following: Following, box: Lines) -> None:
        box.tell(f"a3 APPEND INBOX {{{len(text)}}}")
        assert box.line().startswith("+")
        box.sock.sendall(text + b"\r\n")
        box.until_line("a3 OK")
        following.until_state("idle", IMAP)

    assert followed(host, tmp_path, lambda: imap(host, user), talk) == (3, 3, 0)


def test_messages_by_smtp(host: ServerHost, tmp_path: Path) -> None:
    def talk(following: Following, lines: Lines) -> None:
        for size in (20_000, 1 << 20, 6 << 20):
            begin(lines)
            lines.tell("DATA")
            assert reply(lines).startswith("354")
            lines.sock.sendall(mail.message(1, size))
            if size > LARGE_BYTES:
                assert following.until_state("moving", SMTP).suitable
            else:
                following.until_unsuitable("request body, ", SMTP)
            lines.sock.sendall(b".\r\n")
            assert reply(lines).startswith("250")
            following.until_state("idle", SMTP)

    assert followed(host, tmp_path, lambda: smtp(host), talk) == (10, 14, 0)
