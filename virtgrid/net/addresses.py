"""Addresses in frames: whose a frame is, and which addresses a guest goes by."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final

from virtgrid.core.frames import FrameBlock

_LOOKS_MAX: Final = 64
_MARKS_MAX: Final = 1024


class GuestAddresses:
    """The IPv4 and IPv6 addresses a guest was seen to go by, in the order they appeared.

    mac: the guest's hardware address; None: nothing is learnt.
    """

    def __init__(self, mac: bytes | None) -> None:
        self._mac = mac
        self._marks: set[bytes] = set()
        self.known: dict[str, None] = {}

    def learn(self, block: FrameBlock) -> None:
        """Look at the frames, in a crowded block at some of them."""
        for index in range(0, len(block) if self._mac else 0, max(1, len(block) // _LOOKS_MAX)):
            at = int(block.offsets[index])
            head = bytes(block.buffer[at : at + min(int(block.captured[index]), 62)])
            by_guest = head[6:12] == self._mac
            if not by_guest and head[:6] != self._mac:
                continue
            # The bytes that hold the addresses, as a cheap test for "known already".
            mark = head[:14] + (head[22:54] if head[12:14] == b"\x86\xdd" else head[26:34])
            if mark in self._marks or len(self._marks) > _MARKS_MAX:
                continue
            self._marks.add(mark)
            if address := (sender_address(head) if by_guest else receiver_address(head)):
                self.known.setdefault(address)


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` -> six bytes. Errors: ValueError."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(p) == 2 for p in parts):
        raise ValueError(f"'{text}' is not a hardware address")
    return bytes(int(p, 16) for p in parts)


def sender_address(frame: bytes) -> str | None:
    """The sender's own IPv4 or IPv6 address in an ARP, IPv4 or IPv6 frame; None when there is none."""
    kind = frame[12:14]
    at = 14
    while kind in (b"\x81\x00", b"\x88\xa8"):
        kind = frame[at + 2 : at + 4]
        at += 4
    if kind == b"\x08\x06" and len(frame) >= at + 28:
        raw = frame[at + 14 : at + 18]
    elif kind == b"\x08\x00" and len(frame) >= at + 20:
        raw = frame[at + 12 : at + 16]
    elif kind == b"\x86\xdd" and len(frame) >= at + 40:
        six = IPv6Address(frame[at + 8 : at + 24])
        return None if six.is_unspecified else str(six)
    else:
        return None
    return None if raw == b"\0\0\0\0" else str(IPv4Address(raw))


def receiver_address(frame: bytes) -> str | None:
    """The IPv4 or IPv6 address a unicast frame is for: a guest that only listens is known by it.

    ARP is left out: a request may ask for an address that nobody has.
    """
    kind = frame[12:14]
    at = 14
    while kind in (b"\x81\x00", b"\x88\xa8"):
        kind = frame[at + 2 : at + 4]
        at += 4
    if kind == b"\x08\x00" and len(frame) >= at + 20:
        return str(IPv4Address(frame[at + 16 : at + 20]))
    if kind == b"\x86\xdd" and len(frame) >= at + 40:
        return str(IPv6Address(frame[at + 24 : at + 40]))
    return None
