"""The processes of the live measurement: who watches, who asks, who downloads. JSON lines in and out.

Each is ``python -m virtgrid.bench.live_parts ROLE NAMESPACE JSON``: it says ``ready``, works until its
work is done, prints what it found, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections import deque
from typing import Any, Final

from virtgrid.core.clock import SystemClock
from virtgrid.net import netns, syscalls
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.definition import load_all
from virtgrid.tracker.tracker import Tracker

#: How often the driver asks the gate's question while it holds a guest.
_ASKED_HZ: Final = 30
_CLOSE_S: Final = 0.5
#: Connections stay open until the watcher has been asked about them.
_kept: Final[list[socket.socket]] = []


def watch(namespace: str, tap: str, mac: str) -> dict[str, Any]:
    """Follow a tap as a migration does, until standard input ends."""
    tracker = Tracker(load_all(), guest_macs=[parse_mac(mac)])
    with netns.run_in(namespace, lambda: TapWatcher(tap, mac, tracker, SystemClock())) as watcher:
        _say("ready")
        began_s, cpu_s = time.monotonic(), time.process_time()
        asked = 0
        while not select.select([sys.stdin], [], [], 1 / _ASKED_HZ)[0]:
            # What the driver asks at each look.
            watcher.snapshot()
            watcher.drain_events()
            asked += 1
        cpu_s, wall_s = time.process_time() - cpu_s, time.monotonic() - began_s
        snapshot = watcher.snapshot()
        return {
            "cpu_s": cpu_s,
            "wall_s": wall_s,
            "asked": asked,
            "capture": watcher.capture,
            "dropped": watcher.dropped,
            "frames": tracker.frames,
            "responses": sum(c.responses for c in snapshot.connections),
            "gaps": sum(c.gaps for c in snapshot.connections),
        }


def ask(
    namespace: str, address: str, path: str, rate_hz: float, seconds: float, connections: int, within_s: float
) -> dict[str, Any]:
    """Requests at a steady rate over kept connections, each counted from when it was due.

    The load is open: a request that finds all connections busy waits, and its wait counts.
    """
    syscalls.finest_timers()
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    sockets = [
        netns.run_in(namespace, lambda: socket.create_connection((address, 80), timeout=10))
        for _ in range(connections)
    ]
    _kept.extend(sockets)
    poll = select.epoll()
    by_descriptor = {}
    for sock in sockets:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        poll.register(sock.fileno(), select.EPOLLIN)
        by_descriptor[sock.fileno()] = sock
    size = _answer_bytes(sockets[0], request)
    free = deque(sockets)
    due_of: dict[int, float] = {}
    missing: dict[int, int] = {}
    waiting: deque[float] = deque()
    took: list[float] = []
    _say("ready")
    total = round(rate_hz * seconds)
    began_s = time.monotonic()
    sent = 0
    while len(took) < total and time.monotonic() < began_s + seconds + _CLOSE_S:
        now_s = time.monotonic()
        while sent < total and began_s + sent / rate_hz <= now_s:
            waiting.append(began_s + sent / rate_hz)
            sent += 1
        while waiting and free:
            sock = free.popleft()
            due_of[sock.fileno()] = waiting.popleft()
            missing[sock.fileno()] = size
            sock.send(request)
        next_s = began_s + sent / rate_hz - time.monotonic() if sent < total else 0.01
        for descriptor, _ in poll.poll(max(0.0, next_s)):
            sock = by_descriptor[descriptor]
            got = len(sock.recv(65536))
            missing[descriptor] -= got
            if not got:
                raise ConnectionError("the server closed a connection")
            if missing[descriptor] <= 0:
                took.append(time.monotonic() - due_of[descriptor])
                free.append(sock)
    took.sort()
    return {
        "asked": total,
        "answered": len(took),
        "within": sum(1 for one in took if one <= within_s),
        "median_s": took[len(took) // 2] if took else None,
        "p99_s": took[int(len(took) * 0.99)] if took else None,
    }


def _answer_bytes(sock: socket.socket, request: bytes) -> int:
    """How long an answer is, head and body; all are alike."""
    sock.send(request)
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    return len(head) + 4 + length


def pull(namespace: str, address: str, path: str, rate_bytes_s: float, seconds: float) -> dict[str, Any]:
    """A download at a steady rate; the bytes are thrown away in the kernel."""
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode()
    sock = netns.run_in(namespace, lambda: socket.create_connection((address, 80), timeout=10))
    _kept.append(sock)
    _say("ready")
    sock.send(request)
    began_s = time.monotonic()
    got = 0
    while (now_s := time.monotonic()) < began_s + seconds:
        wanted = int(rate_bytes_s * (now_s - began_s)) - got
        if wanted < 256 << 10:
            time.sleep(0.002)
            continue
        got += len(sock.recv(min(wanted, 4 << 20), socket.MSG_TRUNC))
    return {"bytes": got, "rate_bytes_s": got / (time.monotonic() - began_s)}


def _say(text: str) -> None:
    print(text, flush=True)


def _main() -> None:
    role, namespace, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if (processor := options.pop("processor", None)) is not None:
        os.sched_setaffinity(0, {processor})
    found = {"watch": watch, "ask": ask, "pull": pull}[role](namespace, **options)  # type: ignore[operator]
    _say(json.dumps(found))
    sys.stdin.read()


if __name__ == "__main__":
    _main()
