"""The eBPF filter of a capture, which can be told to leave out the inside of a body.

Beside what the classic filter drops (filters.py) it drops segments that lie wholly inside a range
of sequence numbers, one range per direction of a connection, kept in a map. The range's last
byte is what the tracker sees again: a segment that reaches past the range is delivered whole.

    segment [seq, seq + n), range [begin, end): dropped when  seq + n - begin <= end - begin

in arithmetic modulo 2^32, so that it holds over a wrap. What ends before ``begin`` lies, in that
arithmetic, far above and is delivered; an old segment that reaches into the range was seen
already. Entries are replaced as a whole, so the program never sees half of one. SYN, FIN and RST
are always delivered. A segment in flight before its range was set is delivered: that is harmless.

Not skipped: bodies that end with a pattern (chunked ones as a whole, mail). The pattern may be cut
in two by a segment's end, and the kernel looks at one segment at a time.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Final

from virtgrid.net import ebpf
from virtgrid.net.ebpf import FP, R0, R1, R2, R3, R4, R6, R7, R8, R9
from virtgrid.net.filters import WHOLE

_SO_ATTACH_BPF: Final = 50
#: Directions skipped at once; with more, the longest unused is delivered again.
SKIPS_MAX: Final = 16384
_V4_KEY_BYTES: Final = 12
_V6_KEY_BYTES: Final = 36
_VALUE: Final = struct.Struct("=III")  # begin, end, reached

#: Where the TCP header comes to lie on the stack. Behind 14 bytes of Ethernet and 20 or 40 of IP the
#: 32-bit fields are aligned, as the verifier wants it, when TCP begins at a multiple of 4.
_TCP: Final = -32
_LEN: Final = 0  # __sk_buff.len


def skip_program(v4_map: int, v6_map: int) -> list[ebpf.Instruction]:
    """The filter, for maps of these descriptors. r6: the packet, r7: payload bytes."""
    a = ebpf.Assembler()
    a.copy(R6, R1)
    a.load_packet(2, 12)
    a.if_equal(R0, 0x0800, "v4")
    a.if_equal(R0, 0x86DD, "v6")
    for kind in (0x0806, 0x8100, 0x88A8):  # ARP tells addresses; tags are for the decoder
        a.if_equal(R0, kind, "keep")
    a.go("drop")

    a.label("v4")
    a.load_packet(1, 23)
    a.if_not_equal(R0, 6, "drop")
    a.load_packet(2, 20)
    a.if_any_bit(R0, 0x3FFF, "drop")  # fragments: no TCP header, or not all of the payload
    a.load_packet(1, 14)
    a.if_not_equal(R0, 0x45, "keep")  # with options: rare, the decoder knows them
    _tcp(a, "v4", ip_bytes=20, length_at=16, key_at=26, map_descriptor=v4_map)

    a.label("v6")
    a.load_packet(1, 20)
    a.if_equal(R0, 6, "v6 tcp")
    for kind in (0, 43, 60, 44, 58):  # extension headers; ICMPv6 tells addresses
        a.if_equal(R0, kind, "keep")
    a.go("drop")
    a.label("v6 tcp")
    _tcp(a, "v6", ip_bytes=40, length_at=18, key_at=22, map_descriptor=v6_map)

    a.label("keep")
    a.set(R0, WHOLE)
    a.exit()
    a.label("drop")
    a.set(R0, 0)
    a.exit()
    return a.program()


def _load_bytes(a: ebpf.Assembler, stack: int, size: int) -> None:
    """The packet's bytes from offset r2 on to the stack; r0 is 0 when they are there."""
    a.copy(R1, R6)
    a.copy(R3, FP)
    a.add(R3, stack)
    a.set(R4, size)
    a.call(ebpf.HELPER_SKB_LOAD_BYTES)


def _tcp(
    a: ebpf.Assembler, name: str, *, ip_bytes: int, length_at: int, key_at: int, map_descriptor: int
) -> None:
    """TCP behind an IP header of this length; the offsets are the frame's."""
    frame = _TCP - 14 - ip_bytes
    a.set(R2, 0)
    _load_bytes(a, frame, 14 + ip_bytes + 20)
    a.if_not_equal(R0, 0, "drop")
    a.load(1, R8, FP, _TCP + 13)
    a.if_any_bit(R8, 0x07, "keep")
    a.load(2, R7, FP, frame + length_at)
    a.from_network(R7, 16)
    if ip_bytes == 20:  # IPv4 counts its own header, IPv6 does not
        a.if_equal(R7, 0, f"{name} offload")
        a.add(R7, -ip_bytes)
        a.go(f"{name} length")
    else:
        a.if_not_equal(R7, 0, f"{name} length")
    a.label(f"{name} offload")  # a length of 0: the frame's counts
    a.load(4, R7, R6, _LEN)
    a.add(R7, -14 - ip_bytes)
    a.label(f"{name} length")
    a.load(1, R1, FP, _TCP + 12)
    a.shift_right(R1, 4)
    a.shift_left(R1, 2)
    a.subtract(R7, R1)
    a.if_not_positive(R7, "drop")
    a.set_map(R1, map_descriptor)
    a.copy(R2, FP)
    a.add(R2, frame + key_at)
    a.call(ebpf.HELPER_MAP_LOOKUP)
    a.if_equal(R0, 0, "keep")
    a.load(4, R9, FP, _TCP + 4)
    a.from_network(R9, 32)
    a.add32(R9, R7)
    a.load(4, R1, R0, 0)
    a.load(4, R2, R0, 4)
    a.subtract32(R2, R1)
    a.copy(R3, R9)
    a.subtract32(R3, R1)
    a.if_above32(R3, R2, "keep")
    a.store(4, R0, 8, R9)
    a.go("drop")


class SkipFilter:
    """The program and its maps. Errors of making one: OSError, when the kernel refuses."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self._maps: dict[int, ebpf.Map] = {}
            for key_bytes in (_V4_KEY_BYTES, _V6_KEY_BYTES):
                one = ebpf.Map(ebpf.MAP_LRU_HASH, key_bytes, _VALUE.size, SKIPS_MAX)
                undo.callback(one.close)
                self._maps[key_bytes] = one
            v4, v6 = self._maps.values()
            self.descriptor = ebpf.load(skip_program(v4.descriptor, v6.descriptor))
            undo.callback(os.close, self.descriptor)
            self._undo = undo.pop_all()

    def attach(self, sock: socket.socket) -> None:
        """Put the filter before a packet socket. Errors: OSError."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, self.descriptor)

    def skip(self, key: bytes, begin: int, end: int) -> None:
        """Leave out the segments inside [begin, end) of a direction; an empty range ends that.

        key: addresses and ports as they stand in its packets (source, destination, ports).
        end - begin: below 2^31, so that old segments are told from new ones.
        """
        if begin == end:
            self._maps[len(key)].discard(key)
        else:
            self._maps[len(key)][key] = _VALUE.pack(begin, end, begin)

    def reached(self, key: bytes) -> int | None:
        """The sequence number behind the last segment left out; None when nothing is skipped."""
        value = self._maps[len(key)].get(key)
        return None if value is None else int(_VALUE.unpack(value)[2])

    def close(self) -> None:
        self._undo.close()
