"""One Ethernet frame in, one TCP segment out (or None), without copying more than the addresses.

The frame may be cut short by the capture's snap length: what counts is the length on the wire,
taken from the IP header, or from the frame where the IP header says 0 (segmentation offload:
IPv4 total length 0, IPv6 payload length 0). Checksums are not verified: with offload they are
not there yet on a tap.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from ipaddress import IPv6Address
from typing import Final, NamedTuple

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

_TCP: Final = struct.Struct("!HHIIH")
_TAGS: Final = frozenset({b"\x81\x00", b"\x88\xa8", b"\x91\x00"})
#: IPv6 headers that may stand before TCP and carry their own length: hop-by-hop, routing,
#: destination options; 44 is the fragment header, 51 authentication.
_EXTENSIONS: Final = frozenset({0, 43, 60})
_EXTENSIONS_MAX: Final = 8


class Segment(NamedTuple):
    """One TCP segment.

    key: source address, destination address, source port, destination port, as bytes; ``reverse``
    the same for the other direction. length: payload on the wire; payload: what was captured of it.
    """

    key: bytes
    reverse: bytes
    seq: int
    ack: int
    flags: int
    length: int
    payload: bytes


def decode(frame: bytes, wire_len: int) -> Segment | None:
    """The TCP segment in an Ethernet frame; None for anything else, fragments and cut headers."""
    kind = frame[12:14]
    at = 14
    while kind in _TAGS:
        kind = frame[at + 2 : at + 4]
        at += 4
    if kind == b"\x08\x00":
        if len(frame) < at + 40:
            return None
        first = frame[at]
        # A fragment's bytes cannot be placed without its siblings; the hole they leave is seen
        # as a gap by the stream, which is the truth.
        if first >> 4 != 4 or frame[at + 9] != 6 or frame[at + 6] & 0x3F or frame[at + 7]:
            return None
        total = frame[at + 2] << 8 | frame[at + 3]
        end = at + total if total else wire_len
        tcp = at + (first & 15) * 4
        source, destination = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
    elif kind == b"\x86\xdd":
        if len(frame) < at + 60 or frame[at] >> 4 != 6:
            return None
        total = frame[at + 4] << 8 | frame[at + 5]
        end = at + 40 + total if total else wire_len
        source, destination = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
        found = frame[at + 6]
        tcp = at + 40
        if found != 6:
            tcp = _after_extensions(frame, found, tcp)
            if not tcp:
                return None
    else:
        return None
    if len(frame) < tcp + 20:
        return None
    _, _, seq, ack, word = _TCP.unpack_from(frame, tcp)
    start = tcp + (word >> 12) * 4
    if start < tcp + 20:
        return None
    length = end - start
    if length < 0 or end > wire_len:
        return None
    ports = frame[tcp : tcp + 4]
    return Segment(
        source + destination + ports,
        destination + source + ports[2:] + ports[:2],
        seq,
        ack,
        word & 0x1FF,
        length,
        frame[start:end] if length else b"",
    )


def _after_extensions(frame: bytes, kind: int, at: int) -> int:
    """Where TCP begins behind IPv6 extension headers; 0 when it is not there to be found."""
    for _ in range(_EXTENSIONS_MAX):
        if kind == 6:
            return at
        if len(frame) < at + 8:
            return 0
        if kind in _EXTENSIONS:
            size = (frame[at + 1] + 1) * 8
        elif kind == 44 and not (frame[at + 2] or frame[at + 3] & 0xF9):  # an atomic fragment is whole
            size = 8
        elif kind == 51:
            size = (frame[at + 1] + 2) * 4
        else:
            return 0
        kind = frame[at]
        at += size
    return 0


def endpoints(key: bytes) -> tuple[str, str]:
    """``address:port`` of source and destination of a segment's key (IPv6 in brackets)."""
    half = (len(key) - 4) // 2
    return _endpoint(key[:half], key[-4:-2]), _endpoint(key[half:-4], key[-2:])


def _endpoint(address: bytes, port: bytes) -> str:
    return f"{_address(address)}:{port[0] << 8 | port[1]}"


@lru_cache(1 << 13)
def _address(address: bytes) -> str:
    if len(address) == 4:
        a, b, c, d = address
        return f"{a}.{b}.{c}.{d}"
    return f"[{IPv6Address(address)}]"
