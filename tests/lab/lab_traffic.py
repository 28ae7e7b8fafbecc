"""TCP between two places of a lab, measured: what a link lets through, and how long an echo takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from virtgrid.lab.site import Place

_SINK = """
import socket, sys, time
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
count, began, skipped = 0, None, float(sys.argv[2])
first = time.monotonic()
while data := peer.recv(1 << 20):
    now = time.monotonic()
    if began is None and now - first >= skipped:
        began = now
    elif began is not None:
        count += len(data)
        last = now
print(count / (last - began), flush=True)
"""
_SOURCE = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
end = time.monotonic() + float(sys.argv[3])
block = bytes(1 << 20)
while time.monotonic() < end:
    peer.sendall(block)
"""
_ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
while data := peer.recv(100):
    peer.sendall(data)
"""
_ASK = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30)
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
best = []
for _ in range(10):
    began = time.monotonic()
    peer.sendall(b"x")
    peer.recv(1)
    best.append(time.monotonic() - began)
print(sorted(best)[5])
"""
_PYTHON = sys.executable


@dataclass(frozen=True)
class Listening:
    process: subprocess.Popen[str]
    port: str


def _listen(place: Place, script: str, *arguments: str) -> Listening:
    process = subprocess.Popen(
        place.argv([_PYTHON, "-c", script, *arguments]), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return Listening(process, process.stdout.readline().strip())


def throughput_bytes_s(
    source: Place, sink: Place, address: str, *, seconds: float = 3.0, skip_s: float = 1.0
) -> float:
    """Payload bytes per second of one TCP stream, its first ``skip_s`` (slow start) left out."""
    there = _listen(sink, _SINK, address, str(skip_s))
    try:
        source.run([_PYTHON, "-c", _SOURCE, address, there.port, str(seconds)], timeout_s=seconds + 60)
        said, _ = there.process.communicate(timeout=60)
        return float(said.split()[-1])
    finally:
        there.process.kill()
        there.process.wait()


def echo_s(source: Place, sink: Place, address: str) -> float:
    """The median time of a byte there and back on an open connection."""
    there = _listen(sink, _ECHO, address)
    try:
        return float(source.run([_PYTHON, "-c", _ASK, address, there.port]).stdout)
    finally:
        there.process.kill()
        there.process.communicate()


def reachable(source: Place, address: str, port: int = 16514, *, timeout_s: float = 1.0) -> bool:
    """Does a TCP connection to the port come up (or get refused) within the time?"""
    script = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))\n"
        "except ConnectionRefusedError: pass\n"
        "except OSError: sys.exit(1)\n"
    )
    command = [_PYTHON, "-c", script, address, str(port), str(timeout_s)]
    return source.run(command, check=False).returncode == 0
