"""The tracker beside vsftpd, with curl, lftp and Python's ftplib: control and data connections as one."""

from __future__ import annotations

import ftplib
import io
import socket
import subprocess
from pathlib import Path

import pytest
from following import Following, until

from virtgrid.lab.servers import layout
from virtgrid.lab.servers.ftp import FILES, FTP_PORT, INCOMING
from virtgrid.lab.servers.host import ServerHost

pytestmark = pytest.mark.lab

ADDRESSES = pytest.mark.parametrize("address", [layout.GUEST_V4, layout.GUEST_V6], ids=["v4", "v6"])
STALLED_BYTES = 4096


def url(path: str, address: str = layout.GUEST_V4) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"ftp://{host}/{path}"


def curl(host: ServerHost, *words: str) -> None:
    assert host.client("curl", "-sS", "--max-time", "20", *words).wait(30) == 0


def data_views(following: Following) -> list[tuple[str, int, int]]:
    """Protocol, bytes to and from the client of every connection that is not a control connection."""
    return [
        (one.protocol, one.bytes_to_client, one.bytes_to_server)
        for one in following.all()
        if not one.server.endswith(f":{FTP_PORT}")
    ]


class Ftp:
    """A control connection by hand: each command with the reply it got."""

    def __init__(self, host: ServerHost, address: str = layout.GUEST_V4) -> None:
        self.host = host
        self.address = address
        self.sock = host.connect(FTP_PORT, address=address)
        self.reader = self.sock.makefile("rb")
        self.reply()

    def reply(self) -> str:
        while True:
            line = self.reader.readline().decode()
            if line[3:4] == " " and line[:3].isdigit():
                return line

    def tell(self, command: str) -> None:
        self.sock.sendall(command.encode() + b"\r\n")

    def do(self, command: str) -> str:
        self.tell(command)
        return self.reply()

    def passive(self) -> socket.socket:
        """A data connection with a small receive buffer: what is not read stalls."""
        port = int(self.do("EPSV").split("|||")[1].split("|")[0])
        return self.host.connect(port, address=self.address, receive_bytes=STALLED_BYTES)

    def __enter__(self) -> Ftp:
        assert self.do("USER anonymous").startswith("230")
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.sock.close()


def read_all(sock: socket.socket) -> int:
    got = 0
    while part := sock.recv(1 << 20):
        got += len(part)
    sock.close()
    return got


@ADDRESSES
@pytest.mark.parametrize("name", list(FILES))
def test_a_passive_download_is_counted_with_its_data_connection(
    host: ServerHost, following: Following, address: str, name: str
) -> None:
    curl(host, "-o", "/dev/null", url(name, address))
    following.until_closed(2)
    one = following.only(FTP_PORT)
    # USER PWD EPSV TYPE SIZE RETR QUIT; the greeting and 150 are replies too.
    assert (one.protocol, one.requests, one.responses) == ("ftp", 7, 9)
    assert one.large_transfers == (1 if name == "large" else 0)
    assert data_views(following) == [("ftp-data", FILES[name], 0)]


@ADDRESSES
def test_an_active_download_belongs_to_its_control_connection(
    host: ServerHost, following: Following, address: str
) -> None:
    curl(host, "-P", "-", "-o", "/dev/null", url("medium", address))
    following.until_closed(2)
    one = following.only(FTP_PORT)
    # USER PWD EPRT TYPE SIZE RETR QUIT
    assert (one.requests, one.responses) == (7, 9)
    # The guest opened it: what it sends goes to that connection's server.
    assert data_views(following) == [("ftp-data", 0, FILES["medium"])]
    assert all("opened by the guest" not in change.reason for change in following.changes)


def test_an_active_download_announced_by_port_is_followed(host: ServerHost, following: Following) -> None:
    curl(host, "-P", "-", "--disable-eprt", "-o", "/dev/null", url("medium"))
    following.until_closed(2)
    assert following.only(FTP_PORT).responses == 9
    assert data_views(following) == [("ftp-data", 0, FILES["medium"])]


def test_an_upload_is_counted(host: ServerHost, following: Following, tmp_path: Path) -> None:
    source = host.directory / "upload.txt"
    source.write_bytes(b"x" * 30_000)
    curl(host, "-T", str(source), url(f"{INCOMING}/curl"))
    following.until_closed(2)
    one = following.only(FTP_PORT)
    # USER PWD CWD EPSV TYPE STOR QUIT
    assert (one.requests, one.responses) == (7, 9)
    assert data_views(following) == [("ftp-data", 0, 30_000)]


def test_every_command_of_lftp_is_counted(host: ServerHost, following: Following) -> None:
    script = f"open {layout.GUEST_V4}; ls; get small -o /dev/null; put vsftpd/root/small -o {INCOMING}/lftp"
    client = host.client("lftp", "-d", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = client.communicate(timeout=30)
    following.until_closed(4)
    one = following.only(FTP_PORT)
    commands = [line for line in said.split(b"\n") if line.startswith(b"---> ")]
    interim = [line for line in said.split(b"\n") if line.startswith(b"<--- 150")]
    assert len(interim) == 3
    assert one.requests == len(commands)
    assert one.responses == 1 + len(commands) + len(interim)
    assert sorted(view[0] for view in data_views(following)) == ["ftp-data"] * 3


def test_ftplib_on_one_control_connection_is_counted(host: ServerHost, following: Following) -> None:
    def session() -> None:
        with ftplib.FTP(layout.GUEST_V4, timeout=20) as ftp:
            ftp.login()
            ftp.nlst()
            for name in ("small", "medium", "small"):
                ftp.retrbinary(f"RETR {name}", lambda _: None)
            ftp.storbinary(f"STOR {INCOMING}/ftplib", io.BytesIO(b"x" * 5000))
            ftp.voidcmd("NOOP")

    host.in_client(session)
    following.until_closed(6)
    one = following.only(FTP_PORT)
    # USER; TYPE PASV NLST; 3 × TYPE PASV RETR; TYPE PASV STOR; NOOP; QUIT
    assert (one.requests, one.responses) == (18, 1 + 18 + 5)
    assert sum(to_client for _, to_client, _ in data_views(following)) > 2 * FILES["small"] + FILES["medium"]
    assert following.verdicts(FTP_PORT)[-2:] == ["suitable", "closed"]


@ADDRESSES
def test_a_small_download_that_stalls_holds_and_a_large_one_does_not(
    host: ServerHost, following: Following, address: str
) -> None:
    with Ftp(host, address) as ftp:
        following.until_state("idle", FTP_PORT)
        with ftp.passive() as data:
            ftp.tell("RETR medium")
            following.until_unsuitable("waiting for the response to RETR medium", FTP_PORT)
            following.until_unsuitable("data connection, ")
            assert ftp.reply().startswith("150")
            following.until_unsuitable("waiting for the response to RETR medium", FTP_PORT)
            assert read_all(data) == FILES["medium"]
        assert ftp.reply().startswith("226")
        following.until_state("idle", FTP_PORT)
        with ftp.passive() as data:
            ftp.tell("RETR large")
            assert ftp.reply().startswith("150")
            # Its size is in the reply: it need not have been sent to be large.
            one = following.until_state("moving", FTP_PORT)
            assert one.suitable
            assert one.reason.startswith("large transfer over a data connection")
            until(
                lambda: all(view.suitable for view in following.open()), "the data connection is moving too"
            )
            assert read_all(data) == FILES["large"]
        assert ftp.reply().startswith("226")
        following.until_state("idle", FTP_PORT)


def test_an_upload_that_stalls_holds_until_it_has_become_large(
    host: ServerHost, following: Following
) -> None:
    with Ftp(host) as ftp, ftp.passive() as data:
        assert ftp.do(f"STOR {INCOMING}/stalled").startswith("150")
        data.sendall(b"x" * 1000)
        following.until_unsuitable("data connection, 1000 B so far")
        following.until_unsuitable("waiting for the response to STOR", FTP_PORT)
        data.sendall(b"x" * (5 << 20))
        assert following.until_state("moving", FTP_PORT).suitable
        data.close()
        assert ftp.reply().startswith("226")
        following.until_state("idle", FTP_PORT)


def test_a_transfer_between_command_and_data_is_not_suitable(host: ServerHost, following: Following) -> None:
    with Ftp(host) as ftp:
        # The client has announced a port and listens; the guest is about to connect.
        def listen() -> socket.socket:
            return socket.create_server((layout.CLIENT_V4, 0))

        with host.in_client(listen) as listener:
            port = listener.getsockname()[1]
            assert ftp.do(f"EPRT |1|{layout.CLIENT_V4}|{port}|").startswith("200")
            following.until_state("idle", FTP_PORT)
            ftp.tell("RETR small")
            peer, _ = listener.accept()
            assert read_all(peer) == FILES["small"]
        assert ftp.reply().startswith("150")
        assert ftp.reply().startswith("226")
        one = following.until_state("idle", FTP_PORT)
        assert (one.requests, one.responses) == (3, 5)


def test_pipelined_commands_and_replies_of_many_lines_are_counted(
    host: ServerHost, following: Following
) -> None:
    with Ftp(host) as ftp:
        ftp.sock.sendall(b"FEAT\r\nNOOP\r\nPWD\r\nHELP\r\nTYPE I\r\n")
        codes = [ftp.reply()[:3] for _ in range(5)]
        assert codes == ["211", "200", "257", "214", "200"]
        one = following.until_state("idle", FTP_PORT)
        assert (one.requests, one.responses) == (6, 7)


def test_a_control_connection_under_tls_is_opaque(host: ServerHost, following: Following) -> None:
    curl(host, "-k", "--ssl-reqd", "-o", "/dev/null", url("medium"))
    following.until_closed(2)
    one = following.only(FTP_PORT)
    # AUTH is all that could be read.
    assert (one.protocol, one.requests, one.responses) == ("tls", 1, 2)
    ((protocol, to_client, _),) = data_views(following)
    assert protocol == "tls"
    assert to_client > FILES["medium"]
    assert "PASS" not in " ".join(change.reason for change in following.changes)


def test_a_refused_download_leaves_nothing_outstanding(host: ServerHost, following: Following) -> None:
    with Ftp(host) as ftp, ftp.passive():
        assert ftp.do("RETR nothing").startswith("550")
        one = following.until_state("idle", FTP_PORT)
        assert (one.requests, one.responses) == (3, 4)


def test_a_control_connection_whose_start_was_missed_is_unknown_until_its_next_command(
    host: ServerHost, tmp_path: Path
) -> None:
    with Ftp(host) as ftp, Following.on(host, tmp_path / "late.pcap") as following:
        ftp.tell("NOOP")
        ftp.reply()
        one = following.until_state("idle", FTP_PORT)
        assert (one.protocol, one.requests, one.responses) == ("ftp", 1, 1)
        with ftp.passive() as data:
            ftp.tell("RETR medium")
            following.until_unsuitable("RETR medium", FTP_PORT)
            assert read_all(data) == FILES["medium"]
        assert ftp.reply().startswith("150")
        assert ftp.reply().startswith("226")
        one = following.until_state("idle", FTP_PORT)
        assert (one.requests, one.responses) == (3, 4)
    following.check_replay()
