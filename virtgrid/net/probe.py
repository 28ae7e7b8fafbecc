"""Asking a guest whether it is there: ARP probes on a bridge.

An ARP probe (RFC 5227: sender address 0.0.0.0) needs no address of our own on the segment and
changes nobody's ARP table. It is answered by the guest's kernel, so a crashed guest stays silent
while QEMU still says "running".
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from typing import Final

_ETH_P_ARP: Final = 0x0806
_ARP: Final = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_BROADCAST: Final = b"\xff" * 6
_REPLY: Final = 2
_INTERVAL_S: Final = 0.25


def arp_probe_frame(own_mac: bytes, address: str) -> bytes:
    """A broadcast "who has ADDRESS", asked by nobody (RFC 5227 section 2.1.1)."""
    target = ipaddress.IPv4Address(address).packed
    return _ARP.pack(
        _BROADCAST, own_mac, _ETH_P_ARP, 1, 0x0800, 6, 4, 1, own_mac, b"\0" * 4, b"\0" * 6, target
    )


def arp_answer(frame: bytes, address: str) -> bytes | None:
    """The MAC that says it has ADDRESS, when ``frame`` is such an answer."""
    if len(frame) < _ARP.size:
        return None
    _, _, ethertype, _, _, _, _, operation, sender_mac, sender, _, _ = _ARP.unpack_from(frame)
    if ethertype != _ETH_P_ARP or operation != _REPLY or sender != ipaddress.IPv4Address(address).packed:
        return None
    return bytes(sender_mac)


async def answers_arp(interface: str, address: str, *, deadline_s: float) -> float | None:
    """Seconds until ADDRESS answered on ``interface`` (a bridge of this host), None when it did not.

    Errors: OSError when the interface is not there or we may not (needs CAP_NET_RAW).
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP)) as raw:
        raw.setblocking(False)
        raw.bind((interface, _ETH_P_ARP))
        own_mac = raw.getsockname()[4]
        probe = arp_probe_frame(own_mac, address)
        while (elapsed := loop.time() - began) < deadline_s:
            with contextlib.suppress(BlockingIOError):
                raw.send(probe)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_INTERVAL_S, deadline_s - elapsed)):
                    while True:
                        if arp_answer(await loop.sock_recv(raw, 2048), address):
                            return loop.time() - began
    return None
