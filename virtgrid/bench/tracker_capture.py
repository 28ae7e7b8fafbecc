"""Captures of web traffic that never was: what ``bench tracker`` replays. Seeded, by scale.

At scale 1 about 850,000 packets and 1 GB, as in the traffic that the tracker's goals were set for:
large downloads, medium and chunked ones on kept connections, a great many small requests, and
connections for one request each. An answer's head has its object's ETag and its second's Date, so heads
repeat as a server's do. Times run as in a network of 0.4 ms; every fifth segment is acknowledged, as
receivers do whose network card puts segments together. All of it is IPv4 with TCP time stamps;
checksums are left out, as offload leaves them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from heapq import heapify, heappop, heapreplace
from pathlib import Path
from random import Random
from typing import BinaryIO, Final, NamedTuple

from virtgrid.core.frames import FrameBlock, block_of

MTU_PAYLOAD: Final = 1448
#: Offload puts segments together as the window and the queue allow: up to 64 KB, 21 KB on average.
LARGE_PAYLOAD: Final = 44 * MTU_PAYLOAD
_TOGETHER: Final = (2, 4, 8, 16, 44)
_ACK_EVERY: Final = 5
_TRIP_S: Final = 0.0002
_RATE_BYTES_S: Final = 30e6
_FIN, _SYN, _ACK = 0x01, 0x02, 0x10
_MB: Final = 1 << 20

_FRAME: Final = struct.Struct("!14sBBHHHBBH4s4sHHIIHHHH12s")
#: Of each kind, and all are asked for alike: more different ones than where some are more popular.
_OBJECTS: Final = 1000
_BEGIN_S: Final = 1_700_000_000
_RECORD: Final = struct.Struct("<IIII")
_MACS: Final = (bytes.fromhex("5254000000010252540000020800"), bytes.fromhex("0252540000025254000000010800"))
_OPTIONS: Final = b"\x01\x01\x08\x0a" + bytes(range(8))
_SERVER: Final = bytes((10, 0, 0, 1))
_REQUEST: Final = (
    "GET /{} HTTP/1.1\r\nHost: 10.0.0.1\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
    "Accept: */*\r\nAccept-Encoding: gzip, deflate\r\n\r\n"
)
_RESPONSE: Final = (
    "HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: {}\r\n"
    "Content-Type: application/octet-stream\r\n{}\r\nLast-Modified: Mon, 23 Nov 2026 09:00:00 GMT\r\n"
    'Connection: keep-alive\r\nETag: "{:x}-{:x}"\r\nAccept-Ranges: bytes\r\n\r\n'
)


class Written(NamedTuple):
    """A capture: its file, and what is in it."""

    path: Path
    packets: int
    bytes: int
    exchanges: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Connections of a kind, at scale 1. pause_s: between an answer and the next request, on average."""

    connections: int
    requests: int
    body_bytes: int
    chunk_bytes: int = 0
    pause_s: float = 0.001

    def scaled(self, scale: float) -> Kind:
        """Fewer requests, then smaller bodies or fewer connections."""
        requests = max(1, round(self.requests * scale))
        less = min(1.0, self.requests * scale)
        large = self.body_bytes >= _MB
        return Kind(
            connections=self.connections if large else max(1, round(self.connections * less)),
            requests=requests,
            body_bytes=max(1, round(self.body_bytes * less)) if large else self.body_bytes,
            chunk_bytes=self.chunk_bytes,
            pause_s=self.pause_s,
        )


SMALL: Final = Kind(connections=24, requests=2200, body_bytes=1024)
MIXED: Final = (
    Kind(connections=4, requests=2, body_bytes=50 * _MB),
    Kind(connections=2, requests=20, body_bytes=8 * _MB),
    Kind(connections=8, requests=750, body_bytes=10 << 10),
    Kind(connections=4, requests=750, body_bytes=16 << 10, chunk_bytes=6000),
    SMALL,
    Kind(connections=6000, requests=1, body_bytes=1024),
)


def write(path: Path, kinds: tuple[Kind, ...], *, scale: float, payload: int, seed: int) -> Written:
    """Write a pcap file. payload: of the largest segment: MTU_PAYLOAD or LARGE_PAYLOAD."""
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 1))
        return _Writer(path, file, payload, seed).write([kind.scaled(scale) for kind in kinds])


class _Writer:
    def __init__(self, path: Path, file: BinaryIO, payload: int, seed: int) -> None:
        self._path = path
        self._file = file
        self._payload = payload
        self._random = Random(seed)  # noqa: S311
        self._pool = self._random.randbytes(1 << 18)
        self._whole = {n * MTU_PAYLOAD: self._pool[1 : 1 + n * MTU_PAYLOAD] for n in (1, *_TOGETHER)}
        self._packets = self._bytes = self._exchanges = 0
        self._now_s = 0.0

    def write(self, kinds: list[Kind]) -> Written:
        """The connections' packets in the order of their times."""
        streams = []
        number = 0
        for kind in kinds:
            for _ in range(kind.connections):
                number += 1
                # Connections for one request come one after the other, the others at once.
                begin_s = self._random.uniform(0, 4.0 if kind.requests == 1 else 0.2)
                streams.append((begin_s, number, self._connection(number, kind)))
        heapify(streams)
        out: list[bytes] = []
        while streams:
            at_s, number, packets = streams[0]
            self._now_s = at_s
            found = next(packets, None)
            if found is None:
                heappop(streams)
                continue
            wait_s, header, payload = found
            size = len(header) + len(payload)
            seconds = int(at_s)
            stamp = _RECORD.pack(_BEGIN_S + seconds, int((at_s - seconds) * 1e6), size, size)
            out += (stamp, header, payload)
            self._packets += 1
            self._bytes += size
            if len(out) > 3000:
                self._file.write(b"".join(out))
                out.clear()
            heapreplace(streams, (at_s + wait_s, number, packets))
        self._file.write(b"".join(out))
        return Written(self._path, self._packets, self._bytes, self._exchanges)

    def _connection(self, number: int, kind: Kind) -> Iterator[tuple[float, bytes, bytes]]:
        """(seconds until the next packet, header, payload) of one connection."""
        address = bytes((10, 1, number >> 8 & 255, number & 255))
        port = 20000 + number % 40000
        mine, theirs = self._random.getrandbits(32), self._random.getrandbits(32)
        mask = 0xFFFFFFFF

        def packet(to_server: bool, flags: int, payload: bytes = b"") -> tuple[bytes, bytes]:
            nonlocal mine, theirs
            seq, ack = (mine, theirs) if to_server else (theirs, mine)
            header = _header(address, port, to_server, seq, ack, flags, payload)
            step = len(payload) + (1 if flags & (_SYN | _FIN) else 0)
            if to_server:
                mine = (mine + step) & mask
            else:
                theirs = (theirs + step) & mask
            return header, payload

        yield _TRIP_S, *packet(True, _SYN)
        yield _TRIP_S, *packet(False, _SYN | _ACK)
        yield 0.0, *packet(True, _ACK)
        for _ in range(kind.requests):
            self._exchanges += 1
            which = self._random.randrange(_OBJECTS)
            request = _REQUEST.format(f"{kind.body_bytes}/{which}").encode()
            yield _TRIP_S, *packet(True, _ACK, request)
            parts = list(self._answer(kind, which))
            for count, part in enumerate(parts[:-1], 1):
                yield len(part) / _RATE_BYTES_S, *packet(False, _ACK, part)
                if not count % _ACK_EVERY or self._payload > MTU_PAYLOAD:
                    yield 0.0, *packet(True, _ACK)
            # What ends an answer is acknowledged by the next request.
            yield self._random.expovariate(1 / kind.pause_s), *packet(False, _ACK, parts[-1])
        yield _TRIP_S, *packet(True, _FIN | _ACK)
        yield _TRIP_S, *packet(False, _FIN | _ACK)
        yield 0.0, *packet(True, _ACK)

    def _answer(self, kind: Kind, which: int) -> Iterator[bytes]:
        """The segments of an answer: with which object."""
        how = "Transfer-Encoding: chunked" if kind.chunk_bytes else f"Content-Length: {kind.body_bytes}"
        date = formatdate(_BEGIN_S + int(self._now_s), usegmt=True)
        head = _RESPONSE.format(date, how, 0x65CBD3D0 + which, kind.body_bytes).encode()
        if kind.chunk_bytes:
            body = bytearray(head)
            for at in range(0, kind.body_bytes, kind.chunk_bytes):
                size = min(kind.chunk_bytes, kind.body_bytes - at)
                body += b"%x\r\n%b\r\n" % (size, self._pool[:size])
            whole = bytes(body + b"0\r\n\r\n")
            at = 0
            while at < len(whole):
                size = self._size()
                yield whole[at : at + size]
                at += size
            return
        first = min(kind.body_bytes, self._size() - len(head))
        yield head + self._pool[:first]
        left = kind.body_bytes - first
        while left:
            size = min(left, self._size())
            yield self._whole.get(size) or self._pool[:size]
            left -= size

    def _size(self) -> int:
        """Payload of the next segment that is full."""
        return MTU_PAYLOAD * (self._random.choice(_TOGETHER) if self._payload > MTU_PAYLOAD else 1)


def idle_blocks(count: int) -> Iterator[FrameBlock]:
    """Connections that each had one request answered and say nothing since; from addresses of their own."""
    request = _REQUEST.format("idle").encode()
    answer = _RESPONSE.format(formatdate(_BEGIN_S, usegmt=True), "Content-Length: 2", 1, 2).encode() + b"ok"
    frames: list[tuple[float, int, bytes]] = []
    for number in range(count):
        address = bytes((10, 64 + (number >> 16), number >> 8 & 255, number & 255))
        for to_server, flags, seq, ack, payload in (
            (True, _SYN, 0, 0, b""),
            (False, _SYN | _ACK, 0, 1, b""),
            (True, _ACK, 1, 1, request),
            (False, _ACK, 1, 1 + len(request), answer),
        ):
            frame = _header(address, 30000, to_server, seq, ack, flags, payload) + payload
            frames.append((number * 1e-4, len(frame), frame))
        if len(frames) >= 1 << 14:
            yield block_of(frames)
            frames.clear()
    if frames:
        yield block_of(frames)


def _header(
    address: bytes, port: int, to_server: bool, seq: int, ack: int, flags: int, payload: bytes
) -> bytes:
    """A segment's headers, between a client and port 80 of the server."""
    addresses = (address, _SERVER, port, 80) if to_server else (_SERVER, address, 80, port)
    return _FRAME.pack(
        _MACS[to_server], 0x45, 0, 52 + len(payload), 7, 0x4000, 64, 6, 0, *addresses,
        seq, ack, 0x8000 | flags, 501, 0, 0, _OPTIONS,
    )  # fmt: skip
