"""The classic BPF filter of a capture: what says nothing never leaves the kernel.

Dropped are TCP segments without payload, SYN, FIN or RST, and everything that is neither TCP nor
tells addresses (ARP, ICMPv6). skipfilter.py has the same in eBPF, and skips bodies as well; this
one serves where the kernel refuses that. How much is kept of a frame is the ring's business (ring.py).
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import Final

_SO_ATTACH_FILTER: Final = 26

# Instructions as <linux/filter.h> composes them: class, size, mode.
_LDW, _LDH, _LDB, _LDB_IND, _LD_MEM, _LDX_MSH = 0x20, 0x28, 0x30, 0x50, 0x60, 0xB1
_JEQ, _JSET, _RET, _TAX, _ST = 0x15, 0x45, 0x06, 0x07, 0x02
_SUB_X, _AND, _RSH = 0x1C, 0x54, 0x74
#: A filter's verdict is how many bytes to keep: more than any frame has.
WHOLE: Final = 1 << 18
_PACKET_KIND: Final = 0xFFFFF004  # SKF_AD_OFF + SKF_AD_PKTTYPE
_OUTGOING: Final = 4


def tcp_filter() -> list[tuple[int, int, int, int]]:
    """The classic BPF program: (code, jump if true, jump if false, k) per instruction.

    VLAN-tagged frames and IPv6 with extension headers are passed: the decoder sorts them out.
    A length of 0 in the IP header (segmentation offload) means there is payload.
    """
    keep, drop = "keep", "drop"
    # Instructions with labels: (label, code, if true, if false, k); None falls through.
    code: list[tuple[str | None, int, str | None, str | None, int]] = [
        (None, _LDH, None, None, 12),
        (None, _JEQ, "v4", None, 0x0800),
        (None, _JEQ, "v6", None, 0x86DD),
        (None, _JEQ, keep, None, 0x0806),
        (None, _JEQ, keep, None, 0x8100),
        (None, _JEQ, keep, drop, 0x88A8),
        ("v4", _LDB, None, None, 23),
        (None, _JEQ, None, drop, 6),
        (None, _LDH, None, None, 20),
        (None, _JSET, drop, None, 0x3FFF),  # fragments: no TCP header, or not all of the payload
        (None, _LDX_MSH, None, None, 14),
        (None, _LDB_IND, None, None, 14 + 13),
        (None, _JSET, keep, None, 0x07),
        (None, _LDH, None, None, 16),
        (None, _JEQ, keep, None, 0),
        (None, _SUB_X, None, None, 0),
        (None, _ST, None, None, 0),
        (None, _LDB_IND, None, None, 14 + 12),
        (None, _RSH, None, None, 2),
        (None, _AND, None, None, 0x3C),
        (None, _TAX, None, None, 0),
        (None, _LD_MEM, None, None, 0),
        (None, _SUB_X, None, None, 0),
        (None, _JEQ, drop, keep, 0),
        ("v6", _LDB, None, None, 20),
        (None, _JEQ, "v6tcp", None, 6),
        (None, _JEQ, keep, None, 0),
        (None, _JEQ, keep, None, 43),
        (None, _JEQ, keep, None, 60),
        (None, _JEQ, keep, None, 58),  # ICMPv6: neighbour discovery tells addresses
        (None, _JEQ, keep, drop, 44),
        ("v6tcp", _LDB, None, None, 14 + 40 + 13),
        (None, _JSET, keep, None, 0x07),
        (None, _LDB, None, None, 14 + 40 + 12),
        (None, _RSH, None, None, 2),
        (None, _AND, None, None, 0x3C),
        (None, _TAX, None, None, 0),
        (None, _LDH, None, None, 18),
        (None, _JEQ, keep, None, 0),
        (None, _SUB_X, None, None, 0),
        (None, _JEQ, drop, keep, 0),
        (keep, _RET, None, None, WHOLE),
        (drop, _RET, None, None, 0),
    ]
    where = {label: index for index, (label, *_) in enumerate(code) if label}

    def jump(index: int, label: str | None) -> int:
        return where[label] - index - 1 if label else 0

    return [(c, jump(i, t), jump(i, f), k) for i, (_, c, t, f, k) in enumerate(code)]


def sent_by_host() -> list[tuple[int, int, int, int]]:
    """The program that keeps, whole, what the host sends over an interface, and nothing it receives."""
    return [(_LDB, 0, 0, _PACKET_KIND), (_JEQ, 0, 1, _OUTGOING), (_RET, 0, 0, WHOLE), (_RET, 0, 0, 0)]


def sent_by_host_to(mac: bytes) -> list[tuple[int, int, int, int]]:
    """The same of what goes to one hardware address."""
    high, low = int.from_bytes(mac[:4], "big"), int.from_bytes(mac[4:], "big")
    return [
        (_LDB, 0, 0, _PACKET_KIND),
        (_JEQ, 0, 5, _OUTGOING),
        (_LDW, 0, 0, 0),
        (_JEQ, 0, 3, high),
        (_LDH, 0, 0, 4),
        (_JEQ, 0, 1, low),
        (_RET, 0, 0, WHOLE),
        (_RET, 0, 0, 0),
    ]


def attach(sock: socket.socket, instructions: Sequence[tuple[int, int, int, int]]) -> None:
    """Put a program before a packet socket (SO_ATTACH_FILTER, socket(7)). Errors: OSError."""
    program = b"".join(struct.pack("=HBBI", *i) for i in instructions)
    buffer = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    )
