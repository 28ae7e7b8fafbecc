"""The tracker beside real web servers and real clients: what is outstanding is unsuitable, and counted."""

from __future__ import annotations

import socket
import ssl
import subprocess
from pathlib import Path

import pytest
from following import Following, until
from own_server import App

from virtgrid.lab.servers import layout
from virtgrid.lab.servers.host import ServerHost
from virtgrid.lab.servers.web import (
    APACHE_PORT,
    BACKEND_PORT,
    NGINX_PORT,
    NGINX_TLS_PORT,
    PAGES,
    UPLOAD_MAX_BYTES,
)

pytestmark = pytest.mark.lab

BOTH = pytest.mark.parametrize("port", [NGINX_PORT, APACHE_PORT], ids=["nginx", "apache"])
ADDRESSES = pytest.mark.parametrize("address", [layout.GUEST_V4, layout.GUEST_V6], ids=["v4", "v6"])
#: So small that a stalled reader stops the server after some tens of kilobytes.
STALLED_BYTES = 4096


def url(port: int, path: str, address: str = layout.GUEST_V4) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/{path}"


def curl(host: ServerHost, *words: str) -> subprocess.Popen[bytes]:
    return host.client("curl", "-sS", "--max-time", "20", *words)


def done(process: subprocess.Popen[bytes], status: int = 0) -> None:
    assert process.wait(30) == status


def ask(sock: socket.socket, method: str, path: str, *fields: str, body: bytes = b"") -> None:
    lines = [f"{method} /{path} HTTP/1.1", "Host: guest.test", *fields, "", ""]
    sock.sendall("\r\n".join(lines).encode() + body)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = sock.recv(65536)
        assert part, f"closed before {end!r}: {data[-200:]!r}"
        data += part
    return data


def read_answer(sock: socket.socket, *, body: bool = True) -> int:
    """Read one answer with a counted body; its status."""
    data = read_until(sock, b"\r\n\r\n")
    head, _, rest = data.partition(b"\r\n\r\n")
    if body:
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        got = len(rest)
        while got < length:
            part = sock.recv(1 << 20)
            assert part, "closed in the middle"
            got += len(part)
    return int(head.split(b" ")[1])


# -- downloads -----------------------------------------------------------------------------


@BOTH
@ADDRESSES
def test_every_answer_on_a_kept_connection_is_counted(
    host: ServerHost, following: Following, port: int, address: str
) -> None:
    names = ("small", "page", "small", "medium", "large")
    words = [word for name in names for word in ("-o", "/dev/null", url(port, name, address))]
    done(curl(host, *words))
    (one,) = following.until_closed()
    assert (one.protocol, one.requests, one.responses) == ("http", 5, 5)
    assert one.large_transfers == 1
    assert one.bytes_to_client > sum(PAGES[name] for name in names)
    assert following.verdicts(port)[-2:] == ["suitable", "closed"]


@BOTH
def test_wget_on_one_connection_is_counted(host: ServerHost, following: Following, port: int) -> None:
    done(
        host.client(
            "wget", "-q", "-O", "/dev/null", *[url(port, name) for name in ("small", "page", "medium")]
        )
    )
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (3, 3)


@BOTH
def test_a_small_answer_that_is_not_fetched_holds_and_a_large_one_does_not(
    host: ServerHost, following: Following, port: int
) -> None:
    with host.connect(port, receive_bytes=STALLED_BYTES) as sock:
        ask(sock, "GET", "medium")
        following.until_unsuitable(" left", port)
        assert following.reason(port).startswith("response, ")
        assert read_answer(sock) == 200
        following.until_state("idle", port)
        ask(sock, "GET", "large")
        one = following.until_state("moving", port)
        assert one.suitable
        assert one.reason.startswith("large download, ")
        assert read_answer(sock) == 200
        one = following.until_state("idle", port)
    assert (one.requests, one.responses, one.large_transfers, one.gaps) == (2, 2, 1, 0)


@pytest.mark.usefixtures("mtu_frames")
def test_the_end_of_a_large_answer_is_not_yet_the_end_of_a_small_one_behind_it(
    host: ServerHost, following: Following
) -> None:
    with host.connect(NGINX_PORT, receive_bytes=STALLED_BYTES) as sock:
        ask(sock, "GET", "large")
        ask(sock, "GET", "medium")
        following.until_state("moving", NGINX_PORT)
        assert read_answer_exactly(sock) == 200
        following.until_unsuitable("response, ", NGINX_PORT)
        assert read_answer(sock) == 200
        assert following.until_state("idle", NGINX_PORT).responses == 2


def read_answer_exactly(sock: socket.socket) -> int:
    """Read one answer with a counted body and not a byte of the next."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    left = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while left:
        left -= len(sock.recv(min(left, 1 << 20)))
    return int(head.split(b" ")[1])


@pytest.mark.parametrize(
    ("port", "prefix"),
    [(NGINX_PORT, "app/"), (APACHE_PORT, "app/"), (BACKEND_PORT, "")],
    ids=["nginx", "apache", "own"],
)
def test_pipelined_requests_are_suitable_only_when_the_last_is_answered(
    host: ServerHost, following: Following, app: App, port: int, prefix: str
) -> None:
    with host.connect(port) as sock:
        for name in ("first", "second", "third"):
            ask(sock, "GET", f"{prefix}wait/{name}")
        following.until_unsuitable("(2 more waiting)", port)
        app.go("first")
        assert read_answer_exactly(sock) == 200
        following.until_unsuitable("(1 more waiting)", port)
        app.go("second")
        assert read_answer_exactly(sock) == 200
        one = following.until_unsuitable("wait/third", port)
        assert (one.requests, one.responses) == (3, 2)
        app.go("third")
        assert read_answer_exactly(sock) == 200
        assert following.until_state("idle", port).responses == 3
    assert following.verdicts(port)[:2] == ["unsuitable", "suitable"]


@BOTH
def test_the_answer_to_head_has_no_body(host: ServerHost, following: Following, port: int) -> None:
    with host.connect(port) as sock:
        for number in range(1, 4):
            ask(sock, "HEAD", "medium")
            assert read_answer(sock, body=False) == 200
            one = following.until_counted(number, number, port)
            assert one.state == "idle"


@BOTH
def test_a_client_that_breaks_a_download_off_leaves_nothing_behind(
    host: ServerHost, following: Following, port: int
) -> None:
    with host.connect(port, receive_bytes=STALLED_BYTES) as sock:
        ask(sock, "GET", "medium")
        following.until_unsuitable("response, ", port)
    # What was still under way when it closed opens no connection of its own.
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (1, 1)
    assert [change.reason for change in following.changes if "mid-stream" in change.reason] == []


def test_no_content_is_complete_at_once(host: ServerHost, following: Following) -> None:
    with host.connect(NGINX_PORT) as sock:
        for _ in range(3):
            ask(sock, "GET", "nothing")
            assert read_answer(sock, body=False) == 204
        one = following.until_state("idle", NGINX_PORT)
    assert (one.requests, one.responses) == (3, 3)


@BOTH
def test_not_modified_is_complete_at_once(host: ServerHost, following: Following, port: int) -> None:
    with host.connect(port) as sock:
        ask(sock, "HEAD", "page")
        head = read_until(sock, b"\r\n\r\n")
        tag = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"etag:")).split(b" ", 1)[
            1
        ]
        ask(sock, "GET", "page", f"If-None-Match: {tag.decode()}")
        assert read_answer(sock, body=False) == 304
        one = following.until_state("idle", NGINX_PORT if port == NGINX_PORT else APACHE_PORT)
    assert (one.requests, one.responses) == (2, 2)


def test_a_zipped_chunked_answer_is_followed_to_its_last_chunk(
    host: ServerHost, following: Following
) -> None:
    fetch = ("--compressed", "-o", "/dev/null", url(NGINX_PORT, "zipped/page"))
    done(curl(host, *fetch, *fetch))
    (one,) = following.until_closed()
    assert (one.requests, one.responses, one.gaps) == (2, 2, 0)


def test_a_chunked_answer_ends_with_its_trailer(host: ServerHost, following: Following, app: App) -> None:
    target = url(BACKEND_PORT, "trailers")
    client = curl(host, "-o", "/dev/null", target, "-o", "/dev/null", url(BACKEND_PORT, "plain"))
    following.until_unsuitable("response, ", BACKEND_PORT)
    app.go("trailers")
    done(client)
    (one,) = following.until_closed()
    assert (one.requests, one.responses, one.gaps) == (2, 2, 0)


def test_an_answer_until_close_ends_with_the_connection(
    host: ServerHost, following: Following, app: App
) -> None:
    client = curl(host, "--http1.0", "-o", "/dev/null", url(BACKEND_PORT, "close"))
    following.until_unsuitable("response, 2.9 KiB so far", BACKEND_PORT)
    app.go("close")
    done(client)
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (1, 1)
    assert "suitable" not in following.verdicts(BACKEND_PORT)[:-2]


def test_http_1_0_without_keep_alive_is_counted(host: ServerHost, following: Following) -> None:
    done(curl(host, "--http1.0", "-H", "Connection: close", "-o", "/dev/null", url(NGINX_PORT, "page")))
    done(curl(host, "--http1.0", "-H", "Connection: close", "-o", "/dev/null", url(APACHE_PORT, "page")))
    for one in following.until_closed(2):
        assert (one.requests, one.responses, one.gaps) == (1, 1, 0)


# -- servers that take their time ----------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "prefix"),
    [(NGINX_PORT, "app/"), (APACHE_PORT, "app/"), (BACKEND_PORT, "")],
    ids=["nginx", "apache", "own"],
)
def test_a_server_that_thinks_holds_for_as_long_as_it_thinks(
    host: ServerHost, following: Following, app: App, port: int, prefix: str
) -> None:
    with host.connect(port) as sock:
        ask(sock, "GET", f"{prefix}wait/thought")
        one = following.until_unsuitable("waiting for the response to GET", port)
        assert (one.requests, one.responses) == (1, 0)
        app.go("thought")
        assert read_answer(sock) == 200
        assert following.until_state("idle", port).suitable


def test_server_sent_events_hold_until_the_stream_ends(
    host: ServerHost, following: Following, app: App
) -> None:
    client = curl(host, "-N", "-o", "/dev/null", url(NGINX_PORT, "app/events"))
    following.until_unsuitable("response, ", NGINX_PORT)
    before = following.open(NGINX_PORT)[0].bytes_to_client
    for number in range(3):
        app.go("events")
        until(
            lambda wanted=before + (number + 1) * 13: following.open(NGINX_PORT)[0].bytes_to_client >= wanted,
            f"event {number}",
        )
        assert following.reason(NGINX_PORT).startswith("response, ")
        assert not following.open(NGINX_PORT)[0].suitable
    app.go("over")
    done(client)
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (1, 1)


# -- uploads -------------------------------------------------------------------------------


@BOTH
def test_an_upload_is_counted_and_a_large_one_is_large(
    host: ServerHost, following: Following, port: int
) -> None:
    small, large = (host.directory / "www" / name for name in ("page", "large"))
    target = url(port, f"put/{port}")
    done(curl(host, "-T", str(small), target, "--next", "-sS", "-T", str(large), target))
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (2, 2)
    assert one.large_transfers == 1
    assert one.bytes_to_server > PAGES["page"] + PAGES["large"]


@BOTH
def test_an_upload_that_stalls_holds_unless_it_is_large(
    host: ServerHost, following: Following, port: int
) -> None:
    with host.connect(port) as sock:
        ask(sock, "PUT", f"put/s{port}", "Content-Length: 1000", body=b"x" * 400)
        following.until_unsuitable("request body, 600 B left", port)
        sock.sendall(b"x" * 600)
        assert read_answer(sock, body=False) in (201, 204)
        following.until_suitable(port)
        ask(sock, "PUT", f"put/l{port}", f"Content-Length: {5 << 20}", body=b"x" * 400)
        one = following.until_state("moving", port)
        assert one.suitable
        assert one.reason.startswith("large upload, ")
        sock.sendall(b"x" * ((5 << 20) - 400))
        assert read_answer(sock, body=False) in (201, 204)
        following.until_counted(2, 2, port)


def test_a_client_that_waits_for_leave_to_send_is_not_called_suitable(
    host: ServerHost, following: Following, app: App
) -> None:
    source = host.directory / "www" / "large"
    client = curl(
        host, "-H", "Expect: 100-continue", "--expect100-timeout", "20", "-o", "/dev/null", "-T", str(source),
        url(BACKEND_PORT, "upload"),
    )  # fmt: skip
    following.until_unsuitable("request body, 8.0 MiB left", BACKEND_PORT)
    app.go("continue")
    done(client)
    (one,) = following.until_closed()
    assert (one.requests, one.responses, one.large_transfers) == (1, 1, 1)


@BOTH
def test_curl_asks_a_real_server_for_leave_and_the_counts_stay_right(
    host: ServerHost, following: Following, app: App, port: int
) -> None:
    source, target = host.directory / "www" / "large", url(port, f"put/e{port}")
    done(curl(host, "-H", "Expect: 100-continue", "-T", str(source), target, "-o", "/dev/null", target))
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (2, 2)


@BOTH
def test_an_upload_that_is_refused_early_is_counted_once(
    host: ServerHost, following: Following, app: App, port: int
) -> None:
    source = host.directory / "www" / "medium"
    target = url(port, "limited/upload")
    client = curl(
        host, "-H", "Expect: 100-continue", "-o", "/dev/null", "-w", "%{http_code}", "-T", str(source), target
    )
    client.wait(30)
    (one,) = following.until_closed()
    assert (one.requests, one.responses) == (1, 1)
    assert PAGES["medium"] > UPLOAD_MAX_BYTES


def test_a_refused_upload_that_is_sent_all_the_same_holds_until_it_is_through(
    host: ServerHost, following: Following
) -> None:
    with host.connect(NGINX_PORT) as sock:
        ask(sock, "POST", "limited/upload", "Content-Length: 300000", body=b"x" * 1000)
        assert read_answer(sock) == 413
        one = following.until_counted(1, 1, NGINX_PORT)
        # nginx reads on for a while ("lingering close") before it closes.
        assert one.state in {"busy", "closing"}
    following.until_closed()


def test_a_chunked_upload_with_a_trailer_is_followed(host: ServerHost, following: Following) -> None:
    with host.connect(APACHE_PORT) as sock:
        ask(sock, "PUT", "put/chunked", "Transfer-Encoding: chunked", "Trailer: Checksum", body=b"5\r\nhel")
        following.until_unsuitable("request body", APACHE_PORT)
        sock.sendall(b"lo\r\n0\r\nChecksum: 12\r\n")
        following.until_unsuitable("request body", APACHE_PORT)
        sock.sendall(b"\r\n")
        assert read_answer(sock, body=False) in (201, 204)
        following.until_suitable(APACHE_PORT)
        ask(sock, "GET", "small")
        read_until(sock, b"HTTP/1.1 200")
        following.until_counted(2, 2, APACHE_PORT)


# -- opaque and unknown --------------------------------------------------------------------


@pytest.mark.parametrize(("port", "prefix"), [(NGINX_PORT, "app/"), (BACKEND_PORT, "")], ids=["nginx", "own"])
def test_a_websocket_is_a_tunnel_from_its_first_frame(
    host: ServerHost, following: Following, app: App, port: int, prefix: str
) -> None:
    with host.connect(port) as sock:
        ask(
            sock, "GET", f"{prefix}socket", "Connection: Upgrade", "Upgrade: websocket",
            "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        )  # fmt: skip
        assert b" 101 " in read_until(sock, b"\r\n\r\n")
        frame = b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"
        sock.sendall(frame)
        assert read_until(sock, frame) == frame
        one = following.until_state("opaque", port)
        assert (one.protocol, one.requests, one.responses) == ("tunnel", 1, 1)
        assert "tunnel or upgraded connection" in one.reason


def test_a_connect_through_apache_is_a_tunnel(host: ServerHost, following: Following, app: App) -> None:
    client = curl(
        host, "-p", "-x", f"http://{layout.GUEST_V4}:{APACHE_PORT}", "-o", "/dev/null",
        url(BACKEND_PORT, "wait/tunnel"),
    )  # fmt: skip
    one = following.until_state("opaque", APACHE_PORT)
    assert (one.protocol, one.requests, one.responses) == ("tunnel", 1, 1)
    app.go("tunnel")
    done(client)
    following.until_closed()


def test_https_is_opaque_and_suitable_when_it_is_silent(host: ServerHost, following: Following) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(host.connect(NGINX_TLS_PORT)) as sock:
        for _ in range(2):
            ask(sock, "GET", "page")
            assert read_answer(sock) == 200
            one = following.until_unsuitable("TLS, ", NGINX_TLS_PORT)
            assert (one.protocol, one.state, one.requests) == ("tls", "opaque", 0)
            # The server spoke last: two seconds of silence are enough, not the ten after a request.
            following.until_suitable(NGINX_TLS_PORT)
            assert following.reason(NGINX_TLS_PORT).startswith("TLS, quiet for 2.")


def test_curl_over_tls_is_opaque_too(host: ServerHost, following: Following) -> None:
    done(curl(host, "-k", "-o", "/dev/null", f"https://{layout.GUEST_V4}:{NGINX_TLS_PORT}/page"))
    (one,) = following.until_closed()
    assert (one.protocol, one.requests, one.responses) == ("tls", 0, 0)


def test_a_connection_whose_start_was_missed_is_unknown_until_its_next_request(
    host: ServerHost, tmp_path: Path
) -> None:
    with host.connect(NGINX_PORT, receive_bytes=STALLED_BYTES) as sock:
        ask(sock, "GET", "medium")
        data = read_until(sock, b"\r\n\r\n")
        left = PAGES["medium"] - len(data.partition(b"\r\n\r\n")[2])
        with Following.on(host, tmp_path / "late.pcap") as following:
            while not following.open():
                left -= len(sock.recv(4096))
            (one,) = following.open()
            assert (one.state, one.verdict) == ("unknown", "unknown")
            assert "seen mid-stream" in one.reason
            while left:
                left -= len(sock.recv(min(left, 1 << 20)))
            ask(sock, "GET", "small")
            assert read_answer(sock) == 200
            one = following.until_state("idle", NGINX_PORT)
            assert (one.protocol, one.requests, one.responses) == ("http", 1, 1)
        # The two captures may have begun a frame apart.
        (offline,) = following.replayed()
        assert (offline.view.requests, offline.view.responses, offline.view.state) == (1, 1, "idle")


def test_a_browsers_spare_connection_stops_counting_after_five_seconds(
    host: ServerHost, following: Following
) -> None:
    with host.connect(NGINX_PORT):
        following.until_unsuitable("just connected, no request yet", NGINX_PORT)
        until(lambda: following.open(NGINX_PORT)[0].suitable, "the spare connection is forgiven", 10)
        assert following.open(NGINX_PORT)[0].state == "new"
