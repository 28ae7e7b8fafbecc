"""Captured frames as whole byte streams that know when each byte was there: the checker's own reassembly.

Nothing here comes from the tracker but its file reader's frames. dpkt takes the headers apart,
a direction is one long string with the moment of every byte, and where the capture cannot tell
(a hole, a repeated byte with another value, a cut frame), the connection says from when on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

import dpkt

from virtgrid.tracker.pcap import Frame

INF: Final = float("inf")
#: Where servers of the protocols that are read listen.
_SERVER_PORTS: Final = frozenset({21, 25, 80, 110, 143, 587, 8080})
_HALF: Final = 1 << 31
_WINDOW: Final = 1 << 30
TCP: Final = dpkt.ip.IP_PROTO_TCP


@dataclass(slots=True)
class Flow:
    """One direction. data: its bytes from the first on, without a hole; marks: (end, moment).

    unseen: what the snap length cut off. reach: the furthest offset of any segment.
    """

    first: int | None = None
    data: bytearray = field(default_factory=bytearray)
    marks: list[tuple[int, float]] = field(default_factory=list)
    unseen: list[tuple[int, int]] = field(default_factory=list)
    early: dict[int, bytes] = field(default_factory=dict)
    early_s: dict[int, float] = field(default_factory=dict)
    early_cut: dict[int, int] = field(default_factory=dict)
    fin: int | None = None
    fin_s: float = INF
    beyond_s: float = INF
    reach: int = 0

    def at(self, offset: int) -> float:
        """The moment from which byte ``offset`` and all before it were there; infinity: never."""
        index = bisect_right(self.marks, offset, key=lambda mark: mark[0])
        return self.marks[index][1] if index < len(self.marks) else INF

    def place(self, seq: int) -> int:
        """A sequence number as an offset, near the end of what is known."""
        assert self.first is not None
        distance = (seq - self.first - len(self.data)) % (1 << 32)
        return len(self.data) + (distance if distance < _HALF else distance - (1 << 32))

    def put(self, offset: int, data: bytes, wire: int, at_s: float) -> bool:
        """Take a segment; False when it contradicts what is known."""
        end = offset + wire
        if end <= 0:
            return True  # from before the capture
        if wire == 1 and end == len(self.data):
            return True  # a keep-alive probe: its byte is the last one's place, not its value
        self.reach = max(self.reach, end)
        if offset > len(self.data):
            if offset - len(self.data) > _WINDOW:
                return True
            if wire > len(self.early.get(offset, b"")) + self.early_cut.get(offset, 0):
                self.early[offset] = data
                self.early_s[offset] = at_s
                self.early_cut[offset] = wire - len(data)
            return True
        known = self.data[max(offset, 0) : offset + len(data)]
        again = data[max(0, -offset) :][: len(known)]
        same = known == again or any(a < end and offset < b for a, b in self.unseen)
        if end > len(self.data):
            begin = len(self.data)
            self.data += data[begin - offset :]
            if len(self.data) < end:
                self.unseen.append((len(self.data), end))
                self.data += bytes(end - len(self.data))
            self.marks.append((end, at_s))
        return same

    def settle(self, at_s: float) -> bool:
        """Take what was waiting and has become whole."""
        same = True
        for offset in sorted(self.early):
            if offset > len(self.data):
                break
            data, cut = self.early.pop(offset), self.early_cut.pop(offset)
            del self.early_s[offset]
            same &= self.put(offset, data, len(data) + cut, at_s)
        return same

    def unseen_within(self, begin: int, end: int) -> bool:
        return any(a < end and begin < b for a, b in self.unseen)


@dataclass(slots=True)
class Talk:
    """One connection. known_until_s: from then on the capture cannot tell. over_s: its end.

    ending_s: the first FIN of either side, or over_s.
    """

    client: str
    server: str
    up: Flow = field(default_factory=Flow)
    down: Flow = field(default_factory=Flow)
    begun_s: float = 0.0
    over_s: float = INF
    ending_s: float = INF
    known_until_s: float = INF

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(name.rpartition(":")[0] for name in (self.client, self.server))

    @property
    def moved(self) -> int:
        """Bytes in the busier direction, captured or not."""
        return max(self.up.reach, self.down.reach)


def clocked(frames: Iterable[Frame]) -> list[Frame]:
    """The frames with times that begin at 1 and never stand still: every frame is a moment of its own."""
    out: list[Frame] = []
    begin, now = None, 1.0
    for frame in frames:
        begin = frame.at_s if begin is None else begin
        now = max(now + 1e-6, frame.at_s - begin + 1.0)
        out.append(frame._replace(at_s=now))
    return out


def _name(address: bytes, port: int) -> str:
    text = str(ip_address(address))
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _segment(frame: Frame) -> tuple[bytes, bytes, dpkt.tcp.TCP, int] | None:
    """Source, destination, TCP header and payload's length on the wire."""
    try:
        packet = dpkt.ethernet.Ethernet(frame.data).data
    except (dpkt.UnpackError, IndexError, ValueError):
        return None
    if isinstance(packet, dpkt.ip.IP):
        if packet.p != TCP or packet.offset or packet.mf or not isinstance(packet.data, dpkt.tcp.TCP):
            return None
        head = packet.hl * 4
        wire = (packet.len or frame.wire_len - 14) - head
    elif isinstance(packet, dpkt.ip6.IP6):
        if not isinstance(packet.data, dpkt.tcp.TCP):
            return None
        if any(isinstance(h, dpkt.ip6.IP6FragmentHeader) for h in packet.all_extension_headers):
            return None
        extra = sum(h.length for h in packet.all_extension_headers)
        wire = (packet.plen or frame.wire_len - 54) - extra
    else:
        return None
    tcp = packet.data
    length = wire - tcp.off * 4
    if length < 0 or wire > frame.wire_len:
        return None
    return packet.src, packet.dst, tcp, length


def talks(frames: Iterable[Frame]) -> list[Talk]:
    """The connections in ``frames`` (see ``clocked``), in the order in which they began."""
    out: list[Talk] = []
    live: dict[tuple[str, str], Talk] = {}
    for frame in frames:
        found = _segment(frame)
        if found is None:
            continue
        source, destination, tcp, length = found
        a, b = _name(source, tcp.sport), _name(destination, tcp.dport)
        at_s = frame.at_s
        syn, ack = bool(tcp.flags & dpkt.tcp.TH_SYN), bool(tcp.flags & dpkt.tcp.TH_ACK)
        seq = (tcp.seq + syn) % (1 << 32)
        talk = live.get((a, b)) or live.get((b, a))
        if talk is not None and syn:
            flow = talk.up if talk.client == a else talk.down
            if flow.first not in (None, seq) or (not ack and talk.client != a):
                talk.over_s = min(talk.over_s, at_s)
                talk = None
        if talk is None:
            if not length and not syn:
                continue
            talk = Talk(client=b, server=a) if syn and ack else Talk(client=a, server=b)
            talk.begun_s = at_s
            if not syn:
                # Who asks whom is not known without the beginning; the readers look at the bytes.
                talk.client, talk.server = (b, a) if _is_answer(tcp.data) else (a, b)
                if _usual(talk.client) and not _usual(talk.server):
                    talk.known_until_s = at_s  # a server that asks: part of some body, more likely
            live[talk.client, talk.server] = talk
            live.pop((talk.server, talk.client), None)
            out.append(talk)
        _take(talk, a == talk.client, tcp, seq, length, at_s)
    for talk in out:
        talk.ending_s = min(talk.ending_s, talk.over_s)
        for flow in (talk.up, talk.down):
            if flow.early_s:
                talk.known_until_s = min(talk.known_until_s, *flow.early_s.values())
            talk.known_until_s = min(talk.known_until_s, flow.beyond_s)
    return out


def _usual(end: str) -> bool:
    """Whether servers listen on this port."""
    return int(end.rpartition(":")[2]) in _SERVER_PORTS


def _is_answer(data: bytes) -> bool:
    return data[:5] == b"HTTP/" or data[:3].isdigit() or data[:4] in (b"+OK ", b"-ERR", b"* OK")


def _take(talk: Talk, up: bool, tcp: dpkt.tcp.TCP, seq: int, length: int, at_s: float) -> None:
    flow, peer = (talk.up, talk.down) if up else (talk.down, talk.up)
    if flow.first is None and (length or tcp.flags & dpkt.tcp.TH_SYN):
        flow.first = seq
    if tcp.flags & dpkt.tcp.TH_ACK and peer.first is not None and peer.place(tcp.ack) > len(peer.data) + 1:
        # The receiver has what the capture has not.
        peer.beyond_s = min(peer.beyond_s, at_s)
    if tcp.flags & dpkt.tcp.TH_RST:
        talk.over_s = min(talk.over_s, at_s)
        return
    if flow.first is None:
        if tcp.flags & dpkt.tcp.TH_FIN:
            talk.known_until_s = min(talk.known_until_s, at_s)  # an end without a beginning
        return
    offset = flow.place(seq)
    if flow.fin is not None and offset >= flow.fin:
        return  # nothing can come behind the end
    if length and not (flow.put(offset, tcp.data[:length], length, at_s) and flow.settle(at_s)):
        talk.known_until_s = min(talk.known_until_s, at_s)
    if tcp.flags & dpkt.tcp.TH_FIN and flow.fin is None:
        flow.fin = offset + length
        flow.fin_s = at_s
        talk.ending_s = min(talk.ending_s, at_s)
    if not up and flow.fin is not None and len(flow.data) >= flow.fin:
        talk.over_s = min(talk.over_s, at_s)
