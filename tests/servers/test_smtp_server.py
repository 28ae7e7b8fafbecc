"""The tracker beside Exim, with swaks, curl and Python's smtplib."""

from __future__ import annotations

import smtplib
import ssl
from pathlib import Path

import pytest
from following import Following
from mailboxes import Lines

from virtgrid.lab.servers import layout, mail
from virtgrid.lab.servers.host import ServerHost

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("mtu_frames")]

SMTP = mail.SMTP_PORT
ADDRESSES = pytest.mark.parametrize("address", [layout.GUEST_V4, layout.GUEST_V6], ids=["v4", "v6"])
SENDER, RECIPIENT = "sender@client.test", "user@guest.test"


def reply(lines: Lines) -> str:
    """The last line of the next reply."""
    while (line := lines.line())[3:4] == "-":
        pass
    return line


def smtp(host: ServerHost) -> Lines:
    """Greeted, and said EHLO."""
    lines = Lines(host, SMTP)
    lines.tell("EHLO client.test")
    assert reply(lines).startswith("250")
    return lines


def begin(lines: Lines) -> None:
    """MAIL and RCPT."""
    for command in (f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{RECIPIENT}>"):
        lines.tell(command)
        assert reply(lines).startswith("250")


@ADDRESSES
def test_curl_over_smtp_is_counted(host: ServerHost, following: Following, address: str) -> None:
    text = host.directory / "message"
    text.write_bytes(mail.message(1, 20_000))
    name = f"[{address}]" if ":" in address else address
    client = host.client(
        "curl",
        "-g",
        "-sS",
        f"smtp://{name}",
        "--mail-from",
        SENDER,
        "--mail-rcpt",
        RECIPIENT,
        "-T",
        str(text),
    )
    assert client.wait(30) == 0
    (one,) = following.until_closed()
    # EHLO MAIL RCPT DATA QUIT; the greeting and 354 are replies too.
    assert (one.protocol, one.requests, one.responses) == ("smtp", 5, 7)
    assert one.bytes_to_server > 20_000


@pytest.mark.parametrize("words", [(), ("--pipeline",)], ids=["lockstep", "pipelined"])
def test_swaks_is_counted(host: ServerHost, following: Following, words: tuple[str, ...]) -> None:
    client = host.client(
        "swaks",
        "--server",
        layout.GUEST_V4,
        "--from",
        SENDER,
        "--to",
        f"{RECIPIENT},other@guest.test",
        *words,
    )
    assert client.wait(30) == 0
    (one,) = following.until_closed()
    # EHLO MAIL RCPT RCPT DATA QUIT
    assert (one.requests, one.responses) == (6, 8)


def test_swaks_under_tls_is_opaque(host: ServerHost, following: Following) -> None:
    client = host.client("swaks", "--server", layout.GUEST_V4, "--from", SENDER, "--to", RECIPIENT, "--tls")
    assert client.wait(30) == 0
    (one,) = following.until_closed()
    # EHLO STARTTLS
    assert (one.protocol, one.requests, one.responses) == ("tls", 2, 3)


def test_smtplib_with_several_messages_is_counted(host: ServerHost, following: Following) -> None:
    def session() -> None:
        with smtplib.SMTP(layout.GUEST_V4, timeout=20) as server:
            for number in range(3):
                server.sendmail(SENDER, [RECIPIENT], mail.message(number, 3000))
            server.sendmail(SENDER, [RECIPIENT, "nobody@guest.test"], mail.message(9, 100))

    host.in_client(session)
    (one,) = following.until_closed()
    # EHLO; 4 × MAIL RCPT DATA; one RCPT more, refused; QUIT
    assert (one.requests, one.responses) == (15, 1 + 15 + 4)


def test_a_message_that_is_half_sent_holds(host: ServerHost, following: Following) -> None:
    text = mail.message(1, 3000)
    with smtp(host) as lines:
        begin(lines)
        following.until_state("idle", SMTP)
        lines.tell("DATA")
        assert reply(lines).startswith("354")
        # The client has leave to send: nothing has come yet, and it is its turn.
        following.until_unsuitable("", SMTP)
        lines.sock.sendall(text[:1000])
        following.until_unsuitable("request body, ", SMTP)
        lines.sock.sendall(text[1000:])
        following.until_unsuitable("request body, ", SMTP)
        lines.sock.sendall(b"\r\n.")
        following.until_unsuitable("request body, ", SMTP)
        lines.sock.sendall(b"\r\n")
        assert reply(lines).startswith("250")
        one = following.until_state("idle", SMTP)
        assert (one.requests, one.responses) == (4, 6)


def test_a_server_that_thinks_about_a_recipient_holds(host: ServerHost, following: Following) -> None:
    with smtp(host) as lines:
        lines.tell(f"MAIL FROM:<{SENDER}>")
        reply(lines)
        lines.tell(f"RCPT TO:<{mail.SLOW_RECIPIENT}>")
        following.until_unsuitable("waiting for the response to RCPT", SMTP)
        assert reply(lines).startswith("250")
        following.until_state("idle", SMTP)


def test_a_pipelined_envelope_is_suitable_only_when_its_last_command_is_answered(
    host: ServerHost, following: Following
) -> None:
    with smtp(host) as lines:
        envelope = f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{mail.SLOW_RECIPIENT}>\r\nRCPT TO:<{RECIPIENT}>\r\nDATA"
        lines.tell(envelope)
        following.until_unsuitable("waiting for the response to RCPT (2 more waiting)", SMTP)
        assert [reply(lines)[:3] for _ in range(4)] == ["250", "250", "250", "354"]
        following.until_unsuitable("", SMTP)
        lines.sock.sendall(mail.message(1, 500) + b".\r\n")
        assert reply(lines).startswith("250")
        one = following.until_state("idle", SMTP)
        assert (one.requests, one.responses) == (5, 7)


def test_bdat_is_a_counted_body(host: ServerHost, following: Following) -> None:
    text = mail.message(1, 3000)
    with smtp(host) as lines:
        begin(lines)
        lines.sock.sendall(b"BDAT %d\r\n" % len(text) + text[:1000])
        following.until_unsuitable(f"request body, {(len(text) - 1000) / 1024:.1f} KiB left", SMTP)
        lines.sock.sendall(text[1000:])
        assert reply(lines).startswith("250")
        following.until_state("idle", SMTP)
        lines.sock.sendall(b"BDAT 5 LAST\r\nend\r\n")
        assert reply(lines).startswith("250")
        one = following.until_state("idle", SMTP)
        assert (one.requests, one.responses) == (5, 6)


def test_a_large_chunk_is_a_large_transfer(host: ServerHost, following: Following) -> None:
    text = mail.message(1, 5 << 20)
    with smtp(host) as lines:
        begin(lines)
        lines.sock.sendall(b"BDAT %d LAST\r\n" % len(text) + text[:1000])
        one = following.until_state("moving", SMTP)
        assert one.suitable
        assert one.reason.startswith("large upload, ")
        lines.sock.sendall(text[1000:])
        assert reply(lines).startswith("250")
        assert following.until_state("idle", SMTP).large_transfers == 1


def test_a_large_message_is_a_large_transfer(host: ServerHost, following: Following) -> None:
    text = mail.message(1, 6 << 20)
    with smtp(host) as lines:
        lines.tell(f"MAIL FROM:<{SENDER}> SIZE={len(text)}")
        reply(lines)
        lines.tell(f"RCPT TO:<{RECIPIENT}>")
        reply(lines)
        lines.tell("DATA")
        assert reply(lines).startswith("354")
        lines.sock.sendall(text[:1000])
        assert following.until_state("moving", SMTP).reason.startswith("large upload, ")
        lines.sock.sendall(text[1000:])
        assert following.until_state("moving", SMTP).suitable
        lines.sock.sendall(b".\r\n")
        assert reply(lines).startswith("250")
        one = following.until_state("idle", SMTP)
        assert (one.requests, one.responses) == (4, 6)


def test_smtplib_under_tls_is_opaque(host: ServerHost, following: Following) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def session() -> None:
        with smtplib.SMTP(layout.GUEST_V4, timeout=20) as server:
            server.starttls(context=context)
            server.sendmail(SENDER, [RECIPIENT], mail.message(1, 1000))

    host.in_client(session)
    (one,) = following.until_closed()
    assert (one.protocol, one.requests, one.responses) == ("tls", 2, 3)


def test_a_session_whose_start_was_missed_is_unknown_until_a_known_command(
    host: ServerHost, tmp_path: Path
) -> None:
    with smtp(host) as lines, Following.on(host, tmp_path / "late.pcap") as following:
        begin(lines)
        one = following.until_state("idle", SMTP)
        assert (one.protocol, one.requests, one.responses) == ("smtp", 2, 2)
    following.check_replay()
