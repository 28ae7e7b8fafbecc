"""Frames for tests of the tracker: a conversation between a client and a server, byte by byte."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from ipaddress import ip_address

from virtgrid.tracker.decode import ACK, FIN, RST, SYN
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import ConnectionView

GUEST_MAC = bytes.fromhex("525400000001")
OTHER_MAC = bytes.fromhex("525400000002")
MASK = 0xFFFFFFFF


def ip_frame(
    source: str,
    destination: str,
    tcp: bytes,
    *,
    payload_on_wire: int,
    vlan: int | None = None,
    offload: bool = False,
) -> bytes:
    """An Ethernet frame without MAC addresses; ``offload``: the IP header says length 0."""
    a, b = ip_address(source), ip_address(destination)
    tag = b"" if vlan is None else struct.pack("!HH", 0x8100, vlan)
    length = len(tcp) + payload_on_wire
    if a.version == 4:
        total = 0 if offload else 20 + length
        head = struct.pack("!BBHHHBBH", 0x45, 0, total, 0, 0x4000, 64, 6, 0) + a.packed + b.packed
        return tag + b"\x08\x00" + head + tcp
    head = struct.pack("!IHBB", 6 << 28, 0 if offload else length, 6, 64) + a.packed + b.packed
    return tag + b"\x86\xdd" + head + tcp


@dataclass
class Talk:
    """One connection, fed to a tracker; ``at_s`` is the time of what is sent next.

    The guest is the server unless ``by_guest``. snap: how many bytes of a frame are captured; rests:
    the others can be had too. pace_s: how long it is silent after each ``ask`` and ``answer``.
    """

    tracker: Tracker
    client: str = "10.0.0.9"
    client_port: int = 40022
    server: str = "10.0.0.1"
    server_port: int = 80
    at_s: float = 100.0
    client_seq: int = 1000
    server_seq: int = 5000
    by_guest: bool = False
    vlan: int | None = None
    offload: bool = False
    snap: int = 1 << 17
    rests: bool = False
    pace_s: float = 0.0
    sent: list[tuple[bytes, int]] = field(default_factory=list)

    def frame(self, to_server: bool, seq: int, ack: int, flags: int, data: bytes) -> tuple[bytes, int]:
        """As it is captured, and its length on the wire."""
        whole = self.whole(to_server, seq, ack, flags, data)
        return whole[: self.snap], len(whole)

    def whole(self, to_server: bool, seq: int, ack: int, flags: int, data: bytes) -> bytes:
        ports = (self.client_port, self.server_port)
        source, destination = self.client, self.server
        if not to_server:
            ports, source, destination = ports[::-1], destination, source
        tcp = struct.pack("!HHIIHHHH", *ports, seq & MASK, ack & MASK, 0x5000 | flags, 65535, 0, 0)
        guest_sends = to_server == self.by_guest
        macs = OTHER_MAC + GUEST_MAC if guest_sends else GUEST_MAC + OTHER_MAC
        body = ip_frame(
            source, destination, tcp, payload_on_wire=len(data), vlan=self.vlan, offload=self.offload
        )
        return macs + body + data

    def put(self, to_server: bool, seq: int, ack: int, flags: int, data: bytes = b"") -> Talk:
        frame = self.frame(to_server, seq, ack, flags, data)
        self.sent.append(frame)
        if self.rests and len(frame[0]) < frame[1]:
            rest = self.whole(to_server, seq, ack, flags, data)[self.snap :]
            self.tracker.feed(*frame, self.at_s, lambda: rest)
        else:
            self.tracker.feed(*frame, self.at_s)
        return self

    def syn(self) -> Talk:
        self.put(True, self.client_seq, 0, SYN)
        self.client_seq += 1
        return self

    def synack(self) -> Talk:
        self.put(False, self.server_seq, self.client_seq, SYN | ACK)
        self.server_seq += 1
        return self

    def open(self) -> Talk:
        return self.syn().synack()

    def ask(self, data: bytes, size: int = 1448) -> Talk:
        """The client sends ``data`` in segments."""
        for at in range(0, len(data), size):
            part = data[at : at + size]
            self.put(True, self.client_seq, self.server_seq, ACK, part)
            self.client_seq += len(part)
        return self.later(self.pace_s)

    def answer(self, data: bytes, size: int = 1448) -> Talk:
        """The server sends ``data`` in segments."""
        for at in range(0, len(data), size):
            part = data[at : at + size]
            self.put(False, self.server_seq, self.client_seq, ACK, part)
            self.server_seq += len(part)
        return self.later(self.pace_s)

    def lose(self, *, to_server: bool, length: int) -> Talk:
        """Bytes that were sent but not captured."""
        if to_server:
            self.client_seq += length
        else:
            self.server_seq += length
        return self

    def fin(self, *, to_server: bool) -> Talk:
        if to_server:
            self.put(True, self.client_seq, self.server_seq, FIN | ACK)
            self.client_seq += 1
        else:
            self.put(False, self.server_seq, self.client_seq, FIN | ACK)
            self.server_seq += 1
        return self

    def reset(self, *, to_server: bool) -> Talk:
        if to_server:
            return self.put(True, self.client_seq, self.server_seq, RST | ACK)
        return self.put(False, self.server_seq, self.client_seq, RST | ACK)

    def later(self, seconds: float) -> Talk:
        self.at_s += seconds
        return self

    @property
    def view(self) -> ConnectionView:
        """This connection as the tracker sees it now."""
        found = [
            c
            for c in self.tracker.snapshot(self.at_s).connections
            if c.client.endswith(f":{self.client_port}") and c.server.endswith(f":{self.server_port}")
        ]
        assert len(found) == 1, found
        return found[0]

    @property
    def is_open(self) -> bool:
        connections = self.tracker.snapshot(self.at_s).connections
        return any(c.client.endswith(f":{self.client_port}") for c in connections)


def get(path: str = "/x", method: str = "GET", *fields: str) -> bytes:
    """A request without a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *fields, "", ""]).encode()


def response(length: int | None, status: str = "200 OK", *fields: str) -> bytes:
    """A response's head."""
    counted = [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([f"HTTP/1.1 {status}", *counted, *fields, "", ""]).encode()
