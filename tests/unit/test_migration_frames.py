"""The frames virtgrid sends: an ARP probe that changes nobody's table, a tickle nobody answers."""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.net import tickle
from virtgrid.net.probe import answers_arp, arp_answer, arp_probe_frame

MAC = bytes.fromhex("525400aabbcc")
ADDRESS = "10.77.0.60"


def reply(address: str = ADDRESS, *, operation: int = 2, ethertype: int = 0x0806) -> bytes:
    packed = ipaddress.IPv4Address(address).packed
    return (
        b"\x02" * 6 + MAC + ethertype.to_bytes(2, "big") + bytes.fromhex("0001080006040000")[:6]
        + operation.to_bytes(2, "big") + MAC + packed + b"\x02" * 6 + b"\0" * 4
    )  # fmt: skip


def test_a_probe_is_a_broadcast_asked_by_nobody() -> None:
    frame = arp_probe_frame(MAC, ADDRESS)
    assert len(frame) == 42
    assert frame[:6] == b"\xff" * 6
    assert frame[6:12] == frame[22:28] == MAC
    assert frame[12:14] == b"\x08\x06"
    assert frame[28:32] == b"\0" * 4, "RFC 5227: the sender's address is all zero"
    assert frame[38:42] == socket.inet_aton(ADDRESS)


def test_the_answer_of_the_address_asked_for_is_heard_with_its_mac() -> None:
    assert arp_answer(reply(), ADDRESS) == MAC
    assert arp_answer(reply() + b"\0" * 18, ADDRESS) == MAC, "padded to the least Ethernet length"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        reply("10.77.0.61"),
        reply(operation=1),
        reply(ethertype=0x0800),
        reply()[:-1],
        arp_probe_frame(MAC, ADDRESS),
    ],
)
def test_anything_else_is_no_answer(frame: bytes) -> None:
    assert arp_answer(frame, ADDRESS) is None


@given(st.binary(max_size=100))
def test_no_frame_is_a_traceback(frame: bytes) -> None:
    found = arp_answer(frame, ADDRESS)
    assert found is None or len(found) == 6


async def test_asking_on_an_interface_that_is_not_there_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match=r"device|permitted"):
        await answers_arp("vgnone0", ADDRESS, deadline_s=0.1)


def test_a_tickle_is_a_minimal_frame_of_a_type_for_experiments() -> None:
    frame = tickle.frame("52:54:00:AA:BB:CC")
    assert len(frame) == 60
    assert frame[:6] == MAC
    assert frame[6] & 0b11 == 0b10, "from a locally administered address that is no group"
    assert frame[12:14] == b"\x88\xb5"


@pytest.mark.parametrize("mac", ["", "52:54:00", "52:54:00:aa:bb:cc:dd", "not a mac", "zz:zz:zz:zz:zz:zz"])
def test_what_is_no_mac_is_refused(mac: str) -> None:
    with pytest.raises(ValueError, match=r"MAC|fromhex"):
        tickle.frame(mac)


def test_a_tickler_whose_tap_is_gone_ends_and_stopping_it_is_no_error() -> None:
    with tickle.Tickler("vgnone0", "52:54:00:aa:bb:cc") as tickler:
        tickler.start()
        tickler.start()
        assert tickler._process is not None
        tickler._process.wait(timeout=20)
        assert not tickler.running
    assert not tickler.running
    tickler.stop()


def test_a_tickler_ends_with_whoever_started_it() -> None:
    # Its standard input ends then: here the parent is a process that dies without a word.
    parent = (
        "import os, sys, virtgrid.net.tickle as t\n"
        "tickler = t.Tickler('lo', '00:00:00:00:00:00')\n"
        "tickler.start()\n"
        "print(tickler._process.pid, flush=True)\n"
        "os._exit(9)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, timeout=30, check=False
    )
    pid = int(died.stdout)
    assert gone(pid), "the tickler outlived its parent"


def gone(pid: int) -> bool:
    """Wait for a process that is not our child to end; at most 20 s."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 20)[0])
    finally:
        os.close(handle)
