"""The test's own HTTP server: it answers when the test says so. One thread per connection.

Its answers are made by hand where a real server could not be told when to send which part.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import threading
from types import TracebackType

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_WAIT_S = 20.0


class App:
    """Listens on a port of every address of the namespace it is made in.

    /wait/NAME answers after ``go(NAME)``; /events sends a server-sent event for each ``go("events")`` and
    ends after ``go("over")``; /close answers until close; /trailers chunked with a trailer; /upload
    takes a body and tells its length; anything else is ``200`` with 2 bytes. An Upgrade to websocket
    is granted and echoed.
    """

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        self._listener.settimeout(0.2)
        self._gates: dict[str, threading.Semaphore] = {}
        self._lock = threading.Lock()
        self._ending = False
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, name="app", daemon=True)

    def __enter__(self) -> App:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._thread.join()
        self._listener.close()
        for sock in self._connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def go(self, name: str) -> None:
        """Let what waits for this name go on, once."""
        self._gate(name).release()

    def _gate(self, name: str) -> threading.Semaphore:
        with self._lock:
            return self._gates.setdefault(name, threading.Semaphore(0))

    def _wait(self, name: str) -> None:
        if not self._gate(name).acquire(timeout=_WAIT_S):
            raise TimeoutError(f"nobody said go for {name}")

    def _accept(self) -> None:
        while not self._ending:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, TimeoutError), sock, sock.makefile("rb") as reader:
            while line := reader.readline():
                _, target, _ = line.decode().split(" ", 2)
                fields: dict[str, str] = {}
                while (field := reader.readline().strip()) != b"":
                    name, _, value = field.decode().partition(":")
                    fields[name.lower()] = value.strip()
                if fields.get("expect", "").lower() == "100-continue":
                    self._wait("continue")
                    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = 0
                if fields.get("transfer-encoding") == "chunked":
                    while size := int(reader.readline().split(b";")[0], 16):
                        body += len(reader.read(size + 2)) - 2
                    while reader.readline() not in (b"\r\n", b""):
                        pass
                else:
                    body = len(reader.read(int(fields.get("content-length", "0"))))
                if not self._answer(sock, target, fields, body):
                    return

    def _answer(self, sock: socket.socket, target: str, fields: dict[str, str], body: int) -> bool:
        """Whether the connection is kept."""
        if fields.get("upgrade", "").lower() == "websocket":
            accept = base64.b64encode(
                hashlib.sha1(fields["sec-websocket-key"].encode() + _GUID).digest()
            ).decode()
            sock.sendall(
                f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
            )
            while data := sock.recv(4096):
                sock.sendall(data)
            return False
        match target.strip("/").split("/"):
            case ["wait", name]:
                self._wait(name)
            case ["events"]:
                sock.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                    b"Cache-Control: no-store\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for _ in range(3):
                    self._wait("events")
                    sock.sendall(b"d\r\ndata: event\n\n\r\n")
                self._wait("over")
                sock.sendall(b"0\r\n\r\n")
                return True
            case ["close"]:
                sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"x" * 3000)
                self._wait("close")
                sock.sendall(b"y" * 3000)
                return False
            case ["trailers"]:
                sock.sendall(
                    b"HTTP/1.1 200 OK\r\nTrailer: Checksum\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b"5;note=1\r\nhello\r\n3\r\nyou\r\n"
                )
                self._wait("trailers")
                sock.sendall(b"0\r\nChecksum: 12\r\n")
                sock.sendall(b"\r\n")
                return True
            case ["upload"]:
                text = str(body).encode()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                return True
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        return True
