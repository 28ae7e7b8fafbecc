"""FTP as the built-in definition has it: a control connection and the data connections it announces."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from tracker_wire import GUEST_MAC, Talk

from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import Verdict

MIB = 1 << 20
SIZES = [1, 2, 3, 7, 1448]


@dataclass
class Session:
    """A control connection, logged in, and data connections as they are announced."""

    tracker: Tracker
    control: Talk
    ports: int = 50_000

    def passive(self, *, extended: bool = False) -> Talk:
        """Announced by the server, opened by the client."""
        self.ports += 1
        high, low = divmod(self.ports, 256)
        if extended:
            self.control.ask(b"EPSV\r\n").answer(b"229 Extended (|||%d|)\r\n" % self.ports)
        else:
            # The address is another one, as behind NAT: it is not believed.
            self.control.ask(b"PASV\r\n").answer(b"227 Entering (192,0,2,1,%d,%d).\r\n" % (high, low))
        return self.data(client_port=self.ports + 1000, server_port=self.ports)

    def active(self, *, extended: bool = False) -> Talk:
        """Announced by the client, opened by the server."""
        self.ports += 1
        high, low = divmod(self.ports, 256)
        if extended:
            family = b"2" if ":" in self.control.client else b"1"
            command = b"EPRT |%s|%s|%d|\r\n" % (family, self.control.client.encode(), self.ports)
        else:
            command = b"PORT 10,0,0,9,%d,%d\r\n" % (high, low)
        self.control.ask(command).answer(b"200 ok\r\n")
        control = self.control
        return Talk(
            self.tracker,
            client=control.server,
            server=control.client,
            client_port=20,
            server_port=self.ports,
            by_guest=True,
            at_s=control.at_s,
        )

    def data(self, client_port: int, server_port: int) -> Talk:
        control = self.control
        return Talk(
            self.tracker,
            client=control.client,
            server=control.server,
            client_port=client_port,
            server_port=server_port,
            at_s=control.at_s,
        )


def login(**options: object) -> Session:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    talk = Talk(tracker, server_port=21, **options).open().answer(b"220 ready\r\n")  # type: ignore[arg-type]
    talk.ask(b"USER a\r\n").answer(b"331 password\r\n").ask(b"PASS b\r\n").answer(b"230 in\r\n")
    return Session(tracker, talk)


@pytest.fixture
def session() -> Session:
    return login()


def test_the_greeting_is_waited_for_and_then_the_first_command() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=21).open()
    assert (talk.view.state, talk.view.reason) == ("new", "just connected, no greeting yet")
    talk.answer(b"220-Welcome\r\n 220 not yet\r\n226 nor now\r\n220 ready\r\n")
    assert (talk.view.state, talk.view.protocol, talk.view.responses) == ("new", "ftp", 1)
    talk.later(10.1)
    assert talk.view.suitable


@pytest.mark.parametrize("size", SIZES)
def test_a_reply_over_several_lines_ends_with_its_code(session: Session, size: int) -> None:
    talk = session.control.ask(b"FEAT\r\n", size)
    talk.answer(b"211-Features:\r\n EPSV\r\n212 x\r\n211-more\r\n2110\r\n", size)
    assert not talk.view.suitable
    talk.answer(b"211 End\r\n", size)
    view = talk.view
    assert (view.suitable, view.state, view.requests, view.responses) == (True, "idle", 3, 4)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("mode", ["passive", "active"])
def test_a_transfer_is_waited_for_until_its_last_reply(session: Session, mode: str, extended: bool) -> None:
    control = session.control
    data = getattr(session, mode)(extended=extended)
    assert control.view.suitable
    control.ask(b"RETR x\r\n")
    assert control.view.reason == "waiting for the response to RETR x"
    data.open()
    assert (data.view.protocol, data.view.state, data.view.suitable) == ("ftp-data", "busy", False)
    control.answer(b"150 here it comes\r\n")
    (data.ask if mode == "active" else data.answer)(b"x" * 5000)
    assert (data.view.suitable, data.view.reason) == (False, "data connection, 4.9 KiB so far")
    assert session.tracker.unsuitable == 2
    data.fin(to_server=mode == "active")
    assert data.view.suitable
    assert not control.view.suitable, "its last reply is waited for"
    control.answer(b"226 done\r\n")
    assert (control.view.suitable, session.tracker.unsuitable) == (True, 0)


def test_ipv6_has_data_connections_too() -> None:
    session = login(client="2001:db8::9", server="2001:db8::1")
    for data in (session.active(extended=True), session.passive(extended=True)):
        session.control.ask(b"LIST\r\n").answer(b"150 x\r\n")
        data.open()
        assert (data.view.protocol, data.view.state) == ("ftp-data", "busy")
        session.control.answer(b"226 done\r\n")


@pytest.mark.parametrize("mode", ["passive", "active"])
@pytest.mark.parametrize("command", [b"RETR", b"STOR"])
def test_both_connections_of_a_large_transfer_are_suitable_while_it_runs(
    session: Session, mode: str, command: bytes
) -> None:
    control = session.control
    data = getattr(session, mode)().open()
    by_opener = (mode == "passive") == (command == b"STOR")
    send = data.ask if by_opener else data.answer
    control.ask(command + b" x\r\n").answer(b"150 go\r\n")
    send(b"x" * (4 * MIB - 1), 60_000)
    assert session.tracker.unsuitable == 2
    send(b"x")
    assert (control.view.state, data.view.state, session.tracker.unsuitable) == ("moving", "moving", 0)
    assert control.view.reason == "large transfer over a data connection, 4.0 MiB so far"
    data.fin(to_server=by_opener)
    assert not control.view.suitable, "its last reply is waited for"
    control.answer(b"226 done\r\n").ask(b"NOOP\r\n")
    assert not control.view.suitable, "the next command is not a large transfer"
    control.answer(b"200 ok\r\n")
    small = getattr(session, mode)().open()
    control.ask(command + b" y\r\n").answer(b"150 go\r\n")
    (small.ask if by_opener else small.answer)(b"x" * 100)
    assert session.tracker.unsuitable == 2, "nor is the next transfer"
    assert control.view.large_transfers == 1


def test_a_size_that_is_announced_counts_from_the_first_byte(session: Session) -> None:
    control = session.control
    data = session.passive().open()
    control.ask(b"RETR x\r\n").answer(b"150 Opening BINARY mode data connection for x (9000000 bytes).\r\n")
    assert not control.view.suitable, "nothing of it has come"
    data.answer(b"x")
    assert (control.view.suitable, data.view.suitable) == (True, True)
    assert control.view.reason.endswith("1 B of 8.6 MiB so far")
    control.answer(b"426 aborted\r\n")
    assert control.view.state == "idle"
    data.later(0.1)
    assert not data.view.suitable, "its bytes may still be on their way"
    data.later(3)
    assert data.view.suitable


def test_a_reset_data_connection_ends_the_large_transfer(session: Session) -> None:
    data = session.passive().open()
    session.control.ask(b"RETR x\r\n").answer(b"150 x (9000000 bytes)\r\n")
    data.answer(b"x" * 1000)
    assert session.control.view.suitable
    data.reset(to_server=True)
    assert not session.control.view.suitable
    session.control.answer(b"426 broken\r\n")
    assert session.control.view.suitable


def test_a_data_connection_without_a_command_is_new(session: Session) -> None:
    data = session.passive().open()
    assert (data.view.state, data.view.reason) == ("new", "just connected, no transfer yet")
    data.later(5.1)
    assert data.view.suitable
    session.control.ask(b"RETR x\r\n")
    assert not data.view.suitable


def test_a_refused_transfer_is_an_answer(session: Session) -> None:
    session.passive().open()
    session.control.ask(b"RETR x\r\n").answer(b"550 no such file\r\n")
    assert session.control.view.suitable


def test_an_aborted_transfer_is_answered_twice(session: Session) -> None:
    session.passive().open()
    control = session.control.ask(b"RETR x\r\n").answer(b"150 go\r\n").ask(b"\xff\xf4\xff\xf2ABOR\r\n")
    control.answer(b"426 aborted\r\n")
    assert not control.view.suitable
    control.answer(b"226 abort successful\r\n")
    assert control.view.suitable


def test_a_data_connection_outlives_its_control_connection_as_a_guess(session: Session) -> None:
    data = session.passive().open()
    session.control.ask(b"RETR x\r\n").answer(b"150 go\r\n")
    data.answer(b"x" * 100)
    session.control.reset(to_server=True)
    assert (data.view.state, data.view.suitable) == ("opaque", False)
    assert data.later(2.1).view.suitable


def test_nobody_can_claim_a_connection_of_others(session: Session) -> None:
    # The address in the message is another machine's; what is expected is between these two only.
    session.control.ask(b"PORT 192,0,2,7,31,144\r\n").answer(b"200 ok\r\n")
    other = Talk(session.tracker, client="10.0.0.1", server="192.0.2.7", client_port=4000, server_port=8080)
    other.by_guest = True
    other.open().ask(b"GET / HTTP/1.1\r\n\r\n")
    assert other.view.protocol == "http"


def test_what_a_client_can_make_the_tracker_expect_is_bounded(session: Session) -> None:
    for port in range(1000, 3000):
        session.control.ask(b"EPRT |1|10.0.0.9|%d|\r\n" % port)
    expected = session.tracker._machine.expected
    assert len(expected) == 4
    session.control.reset(to_server=True)
    assert len(expected) == 0


@pytest.mark.parametrize(
    "command", [b"PORT 1,2,3,4,999,1", b"PORT 10,0,0,9,0,0", b"EPRT |1|x|99999|", b"PORT 12"]
)
def test_a_malformed_announcement_is_none(session: Session, command: bytes) -> None:
    session.control.ask(command + b"\r\n").answer(b"501 what\r\n")
    assert (session.control.view.suitable, len(session.tracker._machine.expected)) == (True, 0)


def test_after_auth_tls_the_records_decide() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=21).open().answer(b"220 x\r\n")
    talk.ask(b"AUTH TLS\r\n").answer(b"234 go\r\n").ask(b"\x16\x03\x01\x00\x02a")
    assert (talk.view.protocol, talk.view.reason) == ("tls", "TLS, inside a record")


def test_commands_sent_together_are_all_waited_for(session: Session) -> None:
    talk = session.control.ask(b"TYPE I\r\nPWD\r\nSYST\r\n").answer(b"200 ok\r\n257 x\r\n")
    assert talk.view.reason == "waiting for the response to SYST"
    talk.answer(b"215 UNIX\r\n")
    assert talk.view.suitable


def test_seen_in_the_middle_a_command_makes_it_known() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=21)
    talk.answer(b"226 done\r\n")
    assert (talk.view.protocol, talk.view.verdict) == ("ftp", Verdict.SUITABLE)
    talk.ask(b"RETR x\r\n")
    assert talk.view.reason == "waiting for the response to RETR x"


def test_a_data_connection_is_the_servers_when_it_is_seen_from_the_middle(session: Session) -> None:
    data = session.passive()
    session.control.ask(b"RETR x\r\n").answer(b"150 go\r\n")
    data.answer(b"x" * 100)
    assert (data.view.protocol, data.view.suitable) == ("ftp-data", False)
