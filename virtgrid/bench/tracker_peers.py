"""What the tracker's speed is compared with: a loop over dpkt, and tshark. Each says what it counted.

The dpkt loop is what a sensible person writes who wants requests and answers and nothing else: dpkt
takes the packets apart, a connection's direction is a small object, bodies are counted and not
kept, segments out of order wait. No verdicts, no times, no states.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding:[^\r]*chunked", re.IGNORECASE)
_MASK: Final = 0xFFFFFFFF


class Counted(NamedTuple):
    """What a peer found."""

    requests: int
    responses: int


class _Direction:
    __slots__ = ("buffer", "chunked", "expected", "skip", "waiting")

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.buffer = b""
        self.skip = 0
        self.chunked = False
        self.waiting: dict[int, bytes] = {}


def dpkt_loop(path: Path) -> Counted | None:
    """Requests and answers by dpkt; None when it is not installed."""
    try:
        import dpkt
    except ImportError:
        return None
    Ethernet, IP, TCP = dpkt.ethernet.Ethernet, dpkt.ip.IP, dpkt.tcp.TCP
    syn, over = dpkt.tcp.TH_SYN, dpkt.tcp.TH_FIN | dpkt.tcp.TH_RST
    directions: dict[tuple[bytes, int, bytes, int], _Direction] = {}
    counts = [0, 0]
    with path.open("rb") as file:
        for _, frame in dpkt.pcap.Reader(file):
            ip = Ethernet(frame).data
            if not isinstance(ip, IP) or not isinstance(ip.data, TCP):
                continue
            tcp = ip.data
            key = (ip.src, tcp.sport, ip.dst, tcp.dport)
            if tcp.flags & syn:
                directions[key] = _Direction((tcp.seq + 1) & _MASK)
                continue
            one = directions.get(key)
            if one is None:
                continue
            data = tcp.data
            if data:
                if tcp.seq == one.expected:
                    one.expected = (tcp.seq + len(data)) & _MASK
                    if one.skip >= len(data):
                        one.skip -= len(data)
                    else:
                        _read(one, data, counts)
                else:
                    one.waiting[tcp.seq] = data
                while one.waiting and one.expected in one.waiting:
                    data = one.waiting.pop(one.expected)
                    one.expected = (one.expected + len(data)) & _MASK
                    _read(one, data, counts)
            if tcp.flags & over:
                directions.pop(key, None)
    return Counted(*counts)


def _read(one: _Direction, data: bytes, counts: list[int]) -> None:
    """Bytes in order: skip what is a body, count heads."""
    if one.skip:
        cut = min(one.skip, len(data))
        one.skip -= cut
        data = data[cut:]
    data = one.buffer + data if one.buffer else data
    while data:
        if one.chunked:
            line, found, rest = data.partition(b"\r\n")
            if not found:
                break
            size = int(line, 16)
            one.chunked = size > 0
            one.skip = size + 2
            data = rest
        else:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                break
            head = data[: end + 2]
            counts[head.startswith(b"HTTP/")] += 1
            length = _LENGTH.search(head)
            one.skip = int(length[1]) if length else 0
            one.chunked = not length and _CHUNKED.search(head) is not None
            data = data[end + 4 :]
        cut = min(one.skip, len(data))
        one.skip -= cut
        data = data[cut:]
    one.buffer = data


def tshark_version() -> str | None:
    """The first line of its version; None when it is not installed."""
    if shutil.which("tshark") is None:
        return None
    told = subprocess.run(["tshark", "--version"], capture_output=True, text=True, check=False)
    return told.stdout.partition("\n")[0].partition("(")[0].strip() or None


def tshark(path: Path) -> tuple[Counted, float]:
    """What tshark counts without putting bodies together, and its CPU seconds."""
    before = os.times()
    options = ["tcp.desegment_tcp_streams", "http.desegment_headers", "http.desegment_body"]
    told = subprocess.run(
        [
            "tshark", "-n", "-r", str(path), *(f"-o{name}:FALSE" for name in options),
            "-Y", "http.request or http.response", "-T", "fields",
            "-e", "http.request.method", "-e", "http.response.code",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip
    after = os.times()
    requests = responses = 0
    for line in told.stdout.splitlines():
        method, _, code = line.partition(b"\t")
        requests += len(method.split(b",")) if method else 0
        responses += len(code.split(b",")) if code else 0
    spent_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Counted(requests, responses), spent_s
